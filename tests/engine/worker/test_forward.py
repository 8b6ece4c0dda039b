"""The forward pass against the float64 reference, and what must not change its results."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest

from numoe.engine.errors import UnavailableError, UnsupportedError
from numoe.engine.experts.mailbox import HEARTBEAT
from numoe.engine.experts.shard import ExpertShard
from numoe.engine.gguf import GgufFile
from numoe.engine.models.config import ModelConfig
from numoe.engine.models.reference import reference_logits
from numoe.engine.progress import Progress
from numoe.engine.worker.forward import CpuForward
from numoe.engine.worker.kv_pool import KvType
from numoe.engine.worker.options import ForwardOptions
from numoe.engine.worker.requirements import check_kernel_shapes
from tests.engine.worker.local import batch, local_forward, sequence_logits
from tests.models import WEIGHT_TYPES, make_model

TOKENS = np.random.default_rng(7).integers(0, 256, 70).tolist()


def nmse(found: np.ndarray, want: np.ndarray) -> float:
    return float(((found - want) ** 2).mean() / want.var())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantized mixture: what could depend on the batch would show."""
    return make_model(tmp_path_factory.mktemp("m") / "m.gguf", "qwen3moe", experts_type="Q4_K", attn_type="Q8_0")


# Every expert is used, except in "routed": of models with many near ties, rounding would swap some.
ALL_USED = {"n_experts": 4, "n_used": 4}
F32_MODELS = {
    "qwen3moe": ("qwen3moe", ALL_USED),
    "qwen3moe, routed": ("qwen3moe", {"n_experts": 8, "n_used": 2}),
    "llama-moe": ("llama-moe", ALL_USED),
    "llama-moe, routed": ("llama-moe", {"n_experts": 8, "n_used": 2}),
    "llama": ("llama", {}),
    "tied": ("llama", {"tied": True}),
    "linear": ("llama", {"rope_scaling": "linear", "rope_factor": 4.0}),
    "yarn": ("qwen3moe", {"rope_scaling": "yarn", "rope_factor": 4.0, **ALL_USED}),
    "frequency factors": ("llama", {"frequency_factors": True}),
    "one kv head, in parts": ("llama-moe", {"kv_heads": 1, "splits": 3, **ALL_USED}),
    "every head its own": ("llama-moe", {"heads": 4, "kv_heads": 4, **ALL_USED}),
    "odd sizes": ("qwen3moe", {"hidden": 96, "heads": 6, "head_dim": 48, "expert_ffn": 160, "vocab": 283, **ALL_USED}),
}


@pytest.mark.parametrize("name", F32_MODELS)
def test_float_models_equal_the_float64_reference(name: str, tmp_path: Path) -> None:
    arch, options = F32_MODELS[name]
    path = make_model(tmp_path / "m.gguf", arch, **options)
    with GgufFile.open(path) as gguf, local_forward(path) as forward:
        want, found = reference_logits(gguf, TOKENS), sequence_logits(forward, TOKENS)
    assert nmse(found, want) <= 1e-6
    assert (found.argmax(axis=1) == want.argmax(axis=1)).all()


@pytest.mark.parametrize("qtype", WEIGHT_TYPES)
def test_weight_formats_are_as_close_as_eight_bit_activations_allow(qtype: str, tmp_path: Path) -> None:
    options = {"experts_type": qtype, "attn_type": qtype, "n_experts": 4, "n_used": 4}
    path = make_model(tmp_path / "m.gguf", "qwen3moe", **options)
    with GgufFile.open(path) as gguf, local_forward(path, shards=2) as forward:
        error = nmse(sequence_logits(forward, TOKENS[:40]), reference_logits(gguf, TOKENS[:40]))
    assert error <= (1e-6 if qtype in ("F32", "F16", "BF16") else 6e-4)


@pytest.mark.parametrize("values", ["f16", "q8_0"])
@pytest.mark.parametrize("keys", ["f16", "q8_0"])
def test_the_kv_type_costs_little_and_no_bit_depends_on_the_batch(keys: str, values: str, tmp_path: Path) -> None:
    path = make_model(tmp_path / "m.gguf", "qwen3moe", n_experts=4, n_used=4)
    long = np.random.default_rng(2).integers(0, 256, 290).tolist()
    with GgufFile.open(path) as gguf, local_forward(path, kv_type=KvType(keys, values)) as forward:
        found = sequence_logits(forward, long)
        assert nmse(found, reference_logits(gguf, long)) <= (1e-6 if (keys, values) == ("f16", "f16") else 1e-4)
        assert np.array_equal(sequence_logits(forward, long, chunk=7, slot=3), found)


def test_q8_0_needs_heads_that_it_fits(tmp_path: Path) -> None:
    path = make_model(tmp_path / "m.gguf", "qwen3moe", head_dim=48)
    with GgufFile.open(path) as gguf, pytest.raises(UnsupportedError, match=r"multiple of 32.*48"):
        KvType("q8_0", "f16").check(ModelConfig.from_gguf(gguf))
    with pytest.raises(UnsupportedError, match="q5_1"):
        KvType("f16", "q5_1").check(ModelConfig.from_gguf(gguf))


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_the_chunk_size_changes_no_bit(model: Path, chunk: int) -> None:
    with local_forward(model) as forward:
        whole = sequence_logits(forward, TOKENS, chunk=len(TOKENS), slot=1)
        assert np.array_equal(sequence_logits(forward, TOKENS, chunk=chunk), whole)


def test_a_row_among_seven_other_sequences_changes_no_bit(model: Path) -> None:
    with local_forward(model) as forward:
        prompts = np.random.default_rng(1).integers(0, 256, (8, 20)).tolist()
        alone = [sequence_logits(forward, prompt, slot=slot)[-1] for slot, prompt in enumerate(prompts)]
        for slot, prompt in enumerate(prompts):
            sequence_logits(forward, prompt[:-1], slot=slot)
        rows = [(prompt[-1], 19, slot) for slot, prompt in enumerate(prompts)]
        together = np.array(forward.run(batch(forward, rows, range(8))))
        assert np.array_equal(together, np.stack(alone))


@pytest.mark.parametrize("threads", [1, 3])
def test_the_number_of_threads_changes_no_bit(model: Path, threads: int) -> None:
    """With one thread attention never splits a sequence's pages, with three it does."""
    long = np.random.default_rng(2).integers(0, 256, 300).tolist()
    results = []
    for count in (2, threads):
        with local_forward(model, threads=count) as forward:
            sequence_logits(forward, long[:-1], chunk=96)
            results.append(np.array(forward.run(batch(forward, [(long[-1], 299, 0)], [0]))))
    assert np.array_equal(*results)


@pytest.mark.parametrize("shards", [2, 3, 4])
def test_any_number_of_shards_chooses_the_same_tokens(model: Path, shards: int) -> None:
    with local_forward(model) as one, local_forward(model, shards=shards) as many:
        want, found = sequence_logits(one, TOKENS), sequence_logits(many, TOKENS)
    assert (found.argmax(axis=1) == want.argmax(axis=1)).all()
    assert nmse(found, want) <= 1e-4


def test_more_logit_rows_than_fit_at_once(model: Path) -> None:
    with local_forward(model) as forward:
        rows = [(token, i, 0) for i, token in enumerate(TOKENS)]
        every = np.array(forward.run(batch(forward, rows, range(len(rows)))))
        few = np.array(forward.run(batch(forward, rows, [3, 50])))
        none = np.array(forward.run(batch(forward, rows, [])))
    assert every.shape == (len(TOKENS), 288)
    assert np.array_equal(few, every[[3, 50]])
    assert none.shape == (0, 288)


def test_a_batch_may_be_run_again(model: Path) -> None:
    with local_forward(model) as forward:
        rows = batch(forward, [(token, i, 0) for i, token in enumerate(TOKENS)], [len(TOKENS) - 1])
        first = np.array(forward.run(rows))
        assert np.array_equal(forward.run(rows), first)


def test_a_late_shard_is_named_within_its_bound_and_the_step_can_be_run_again(model: Path) -> None:
    late: list[ExpertShard] = []
    with local_forward(model, shards=3) as whole:
        want = sequence_logits(whole, TOKENS)
    with local_forward(model, shards=3, absent={1}, late=late, bound_s=0.2) as forward:
        for _ in range(3):
            start = time.monotonic()
            with pytest.raises(UnavailableError, match="shard 1"):
                sequence_logits(forward, TOKENS)
            assert 0.2 <= time.monotonic() - start < 5
        late[0].start()
        assert np.array_equal(sequence_logits(forward, TOKENS), want)


def test_a_slow_shard_that_shows_signs_of_life_is_waited_for(model: Path) -> None:
    with local_forward(model, shards=2, absent={1}, bound_s=0.2) as forward:
        box = forward._mailbox
        assert box is not None
        reply = box.segment.array[box.layout.reply(1) :].view(np.uint32)

        def work_slowly() -> None:
            for _ in range(60):
                reply[HEARTBEAT // 4] += 1
                time.sleep(0.01)
            reply[0] = 10  # the answer to this request and to those of the layers that follow

        helper = threading.Thread(target=work_slowly)
        helper.start()
        start = time.monotonic()
        sequence_logits(forward, TOKENS[:4])
        assert time.monotonic() - start > 0.4
        helper.join()


def test_routed_experts_without_shards_are_refused(model: Path) -> None:
    options = ForwardOptions(max_rows=8, slots=1, n_pages=2, context=512, threads=1, threads_on_host=1)
    with GgufFile.open(model) as gguf, pytest.raises(UnavailableError, match="no expert shards"):
        CpuForward(ModelConfig.from_gguf(gguf), gguf, None, options, Progress(1))


def test_dimensions_that_kernels_cannot_take_are_named(tmp_path: Path) -> None:
    path = make_model(tmp_path / "m.gguf", "llama", hidden=120)
    with GgufFile.open(path) as gguf, pytest.raises(UnsupportedError, match=r"embedding length is 120.*multiple of 32"):
        check_kernel_shapes(ModelConfig.from_gguf(gguf))


def test_the_time_of_a_step_is_accounted_for(model: Path) -> None:
    with local_forward(model) as forward:
        sequence_logits(forward, TOKENS)
        times = forward.times_ms()
    assert set(times) == {"attention", "experts", "wait"}
    assert times["attention"] > 0
    assert times["experts"] > 0
