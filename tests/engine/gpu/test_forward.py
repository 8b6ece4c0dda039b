"""The forward pass on a GPU: as the float64 reference and the CPU compute it, through real shards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from numoe.engine.errors import UnavailableError
from numoe.engine.gguf import GgufFile
from numoe.engine.gpu.forward import GpuForward
from numoe.engine.models.reference import reference_logits
from numoe.engine.worker.kv_pool import KvType
from tests.engine.worker.local import batch, local_forward, sequence_logits
from tests.models import WEIGHT_TYPES, make_model

pytestmark = pytest.mark.gpu

TOKENS = np.random.default_rng(7).integers(0, 256, 300).tolist()
ALL_USED = {"n_experts": 4, "n_used": 4}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3moe": ("qwen3moe", ALL_USED),
    "routed": ("qwen3moe", {"n_experts": 8, "n_used": 2}),
    "llama-moe": ("llama-moe", ALL_USED),
    "llama": ("llama", {}),
    "tied": ("llama", {"tied": True}),
    "yarn": ("qwen3moe", {"rope_scaling": "yarn", "rope_factor": 4.0, **ALL_USED}),
    "odd sizes": ("qwen3moe", {"hidden": 96, "heads": 6, "head_dim": 48, "expert_ffn": 160, "vocab": 283, **ALL_USED}),
}


def nmse(found: np.ndarray, want: np.ndarray) -> float:
    return float(((found - want) ** 2).mean() / want.var())


@pytest.fixture(params=["shards", "streamed"])
def experts(request: pytest.FixtureRequest) -> Callable[[GpuForward], None]:
    """Who computes the experts of many rows."""
    threshold = {"shards": 1 << 30, "streamed": 17}[request.param]

    def choose(forward: GpuForward) -> None:
        forward.stream_from = threshold

    return choose


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("chunk", [1, 16, 96])
def test_float_models_equal_the_float64_reference(
    name: str, chunk: int, experts: Callable[[GpuForward], None], tmp_path: Path
) -> None:
    arch, options = MODELS[name]
    path, tokens = make_model(tmp_path / "m.gguf", arch, **options), TOKENS[:70]
    with GgufFile.open(path) as gguf, local_forward(path, shards=2, make=GpuForward) as forward:
        experts(forward)
        found = sequence_logits(forward, tokens, chunk=chunk)
        assert nmse(found, reference_logits(gguf, tokens, np.float64)) < 1e-4


@pytest.mark.parametrize("qtype", WEIGHT_TYPES)
def test_every_format_of_experts_agrees_with_the_cpu(
    qtype: str, experts: Callable[[GpuForward], None], tmp_path: Path
) -> None:
    path, tokens = make_model(tmp_path / "m.gguf", "qwen3moe", experts_type=qtype, **ALL_USED), TOKENS[:70]
    with local_forward(path, shards=2) as cpu:
        want = sequence_logits(cpu, tokens)
    with local_forward(path, shards=2, make=GpuForward) as forward:
        experts(forward)
        assert nmse(sequence_logits(forward, tokens, chunk=70), want) < 2e-3


@pytest.mark.parametrize("qtype", WEIGHT_TYPES)
@pytest.mark.parametrize("gpu_layers", [1, 2])
@pytest.mark.parametrize("chunk", [1, 70])
def test_experts_in_vram_agree_with_the_cpu(qtype: str, gpu_layers: int, chunk: int, tmp_path: Path) -> None:
    path, tokens = make_model(tmp_path / "m.gguf", "qwen3moe", experts_type=qtype, **ALL_USED), TOKENS[:70]
    with local_forward(path, shards=2) as cpu:
        want = sequence_logits(cpu, tokens)
    with local_forward(path, shards=2, gpu_layers=gpu_layers, make=GpuForward) as forward:
        forward.stream_from = 17
        assert nmse(sequence_logits(forward, tokens, chunk=chunk), want) < 2e-3


@pytest.mark.parametrize("gpu_layers", [1, 2])
def test_float_experts_in_vram_equal_the_float64_reference(gpu_layers: int, tmp_path: Path) -> None:
    path, tokens = make_model(tmp_path / "m.gguf", "qwen3moe", n_experts=8, n_used=2, expert_ffn=160), TOKENS[:70]
    with GgufFile.open(path) as gguf, local_forward(path, gpu_layers=gpu_layers, make=GpuForward) as forward:
        want = reference_logits(gguf, tokens, np.float64)
        for chunk in (1, 16):
            assert nmse(sequence_logits(forward, tokens, chunk=chunk), want) < 1e-4


@pytest.mark.parametrize("kind", ["f16", "q8_0", "q4_0"])
def test_kv_types_over_page_ends(kind: str, tmp_path: Path) -> None:
    path = make_model(tmp_path / "m.gguf", "qwen3moe", **ALL_USED)
    with GgufFile.open(path) as gguf, local_forward(path, make=GpuForward, kv_type=KvType(kind, kind)) as forward:
        found = sequence_logits(forward, TOKENS, chunk=90)
        bound = {"f16": 1e-4, "q8_0": 1e-3, "q4_0": 0.2}[kind]
        assert nmse(found, reference_logits(gguf, TOKENS, np.float64)) < bound


@pytest.mark.parametrize("gpu_layers", [0, 2])
def test_a_row_is_the_same_bits_in_every_batch(gpu_layers: int, tmp_path: Path) -> None:
    path = make_model(tmp_path / "m.gguf", "qwen3moe", experts_type="Q4_K", attn_type="Q8_0")
    with local_forward(path, slots=16, max_rows=96, gpu_layers=gpu_layers, make=GpuForward) as forward:
        prompts = [TOKENS[i : i + 5 + i] for i in range(16)]
        alone = []
        for slot, prompt in enumerate(prompts):
            for i, token in enumerate(prompt):
                found = forward.run(batch(forward, [(token, i, slot)], [0]))
            alone.append(np.array(found)[0])
        rows = [(prompt[-1], len(prompt) - 1, slot) for slot, prompt in enumerate(prompts)]
        together = forward.run(batch(forward, rows, range(16)))
        np.testing.assert_array_equal(np.array(together), alone)
        assert [together.likeliest(row)[0] for row in range(16)] == [int(row.argmax()) for row in alone]


def test_a_shard_that_never_answers_is_named_and_the_gpu_goes_on(tmp_path: Path) -> None:
    path, late = make_model(tmp_path / "m.gguf", "qwen3moe"), []
    with local_forward(path, shards=2, absent=[1], late=late, bound_s=0.3, make=GpuForward) as forward:
        with pytest.raises(UnavailableError, match="expert shard 1 did not answer"):
            forward.run(batch(forward, [(1, 0, 0)], [0]))
        for shard in late:
            shard.start()
