"""Models of any dimensions that the kernels take, against the float64 reference."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from numoe.engine.gguf import GgufFile
from numoe.engine.models.config import ModelConfig
from numoe.engine.models.reference import reference_logits
from numoe.engine.worker.requirements import check_kernel_shapes
from tests.engine.worker.local import local_forward, sequence_logits
from tests.models import ARCHES, make_model


@st.composite
def model_options(draw: st.DrawFn) -> dict[str, object]:
    """Widths are multiples of 32 and seldom of 256, head sizes of 16, the vocabulary any number.

    Every expert is used: of many near ties in the routing, rounding would swap some.
    """
    kv_heads, group, experts = draw(st.integers(1, 4)), draw(st.integers(1, 9)), draw(st.integers(1, 9))
    head_dim = draw(st.sampled_from([32, 64, 96] if kv_heads % 2 else [16, 32, 48, 64, 80]))
    blocks = st.integers(1, 12).map(lambda n: 32 * n)
    return {
        "hidden": draw(blocks), "expert_ffn": draw(blocks), "head_dim": head_dim,
        "heads": kv_heads * group, "kv_heads": kv_heads, "n_experts": experts, "n_used": experts,
        "vocab": draw(st.integers(275, 300)), "layers": draw(st.integers(1, 2)),
    }  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(
    arch=st.sampled_from(ARCHES), options=model_options(), shards=st.integers(1, 3), threads=st.integers(1, 3),
    tokens=st.integers(1, 33), chunk=st.integers(1, 33), seed=st.integers(0, 99),
)  # fmt: skip
def test_a_model_of_any_shape_equals_the_reference(
    arch: str, options: dict[str, object], shards: int, threads: int, tokens: int, chunk: int, seed: int
) -> None:
    prompt = np.random.default_rng(seed).integers(0, 275, tokens).tolist()
    with tempfile.TemporaryDirectory() as folder:
        path = make_model(Path(folder) / "m.gguf", arch, seed=seed, **options)
        with GgufFile.open(path) as gguf:
            check_kernel_shapes(ModelConfig.from_gguf(gguf))
            want = reference_logits(gguf, prompt)
        with local_forward(path, shards=shards, threads=threads, max_rows=chunk) as forward:
            found = sequence_logits(forward, prompt, chunk=chunk)
    assert ((found - want) ** 2).mean() <= 5e-6 * want.var()
