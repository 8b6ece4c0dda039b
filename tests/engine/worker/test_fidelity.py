"""Against llama.cpp itself: on quantized files our error is no larger than its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from numoe.engine.gguf import GgufFile
from numoe.engine.models.reference import reference_logits
from tests.engine.models import oracle
from tests.engine.worker.local import local_forward, sequence_logits
from tests.models import WEIGHT_TYPES, make_model

TOKENS = np.random.default_rng(1).integers(0, 256, 48).tolist()
pytestmark = pytest.mark.oracle


@pytest.mark.parametrize("qtype", [qtype for qtype in WEIGHT_TYPES if qtype != "F32"])
def test_the_error_is_no_larger_than_llama_cpps(qtype: str, tmp_path: Path) -> None:
    """Errors against float64 over the dequantized weights, summed over several models.

    Every expert is used: with top-k routing, rounding may swap two that nearly tie, on either side.
    """
    oracle.require()
    ours = theirs = 0.0
    for arch in ("qwen3moe", "llama-moe"):
        for seed in (1, 2, 3):
            options = {"n_experts": 4, "n_used": 4, "hidden": 256, "expert_ffn": 256, "seed": seed}
            path = make_model(tmp_path / "m.gguf", arch, experts_type=qtype, attn_type=qtype, **options)
            with GgufFile.open(path) as gguf, local_forward(path) as forward:
                want = reference_logits(gguf, TOKENS)
                ours += oracle.nmse(sequence_logits(forward, TOKENS), want)
            theirs += oracle.nmse(oracle.logits(path, TOKENS, tmp_path), want)
    assert ours <= theirs


@pytest.mark.parametrize("arch", ["qwen3moe", "llama-moe", "llama"])
def test_float_files_equal_llama_cpp(arch: str, tmp_path: Path) -> None:
    oracle.require()
    path = make_model(tmp_path / "m.gguf", arch, **({} if arch == "llama" else {"n_experts": 4, "n_used": 4}))
    with local_forward(path) as forward:
        found = sequence_logits(forward, TOKENS)
    want = oracle.logits(path, TOKENS, tmp_path)
    assert oracle.nmse(found, want) <= 1e-6
    assert (found.argmax(axis=1) == want.argmax(axis=1)).all()
