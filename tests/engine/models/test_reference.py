"""The float64 reference is the model: it agrees with llama.cpp's logits, kept or computed now."""

from __future__ import annotations

import numpy as np
import pytest

from numoe.engine.errors import InputError
from numoe.engine.gguf import GgufFile
from numoe.engine.models.config import MoeConfig
from numoe.engine.models.reference import reference_logits, route
from tests import models
from tests.engine.models import make_goldens, oracle

LIVE = {
    "qwen3moe": {"arch": "qwen3moe"},
    "llama-moe": {"arch": "llama-moe"},
    "llama": {"arch": "llama"},
    "qwen3moe yarn": {"arch": "qwen3moe", "rope_scaling": "yarn", "context": 4096, "rope_theta": 1e6},
    "llama yarn": {"arch": "llama", "rope_scaling": "yarn", "context": 2048, "tied": True},
    "yarn that shrinks": {"arch": "llama", "rope_scaling": "yarn", "rope_factor": 0.5},
    "qwen3moe linear": {"arch": "qwen3moe", "rope_scaling": "linear"},
    "scaling none": {"arch": "llama", "rope_scaling": "none"},
    "frequency factors": {"arch": "llama-moe", "frequency_factors": True, "rope_theta": 5e5},
    "one KV head, three parts": {"arch": "qwen3moe", "kv_heads": 1, "splits": 3},
    "every expert used": {"arch": "llama-moe", "n_used": 8},
    "one expert used": {"arch": "llama-moe", "n_used": 1},
}


@pytest.mark.parametrize("name", make_goldens.CASES)
def test_agrees_with_kept_logits_of_llama_cpp(tmp_path, name):
    path = models.make_model(tmp_path / "m.gguf", **make_goldens.CASES[name])
    with GgufFile.open(path) as gguf, np.load(make_goldens.FOLDER / f"{name}.npz") as golden:
        tokens, theirs = golden["tokens"].tolist(), golden["logits"].astype(np.float64)
        ours = reference_logits(gguf, tokens)
        assert ours.dtype == np.float64
        assert oracle.nmse(ours, theirs) <= 1e-11
        assert (ours.argmax(-1) == theirs.argmax(-1)).all()
        in_float32 = reference_logits(gguf, tokens, np.float32)
        assert 0 < oracle.nmse(in_float32, ours) <= 1e-9


@pytest.mark.oracle
@pytest.mark.parametrize("name", LIVE)
def test_agrees_with_llama_cpp_now(tmp_path, name):
    oracle.require()
    path = models.make_model(tmp_path / "m.gguf", **LIVE[name], seed=21)
    tokens = np.random.default_rng(5).integers(0, 256, 200).tolist()
    theirs = oracle.logits(path, tokens, tmp_path)
    with GgufFile.open(path) as gguf:
        ours = reference_logits(gguf, tokens)
    assert oracle.nmse(ours, theirs) <= 1e-9
    assert (ours.argmax(-1) == theirs.argmax(-1)).all()


@pytest.mark.oracle
@pytest.mark.parametrize("qtype", models.WEIGHT_TYPES)
def test_every_weight_type_agrees_with_llama_cpp(tmp_path, qtype):
    """All experts are used: near ties would show llama.cpp's 8-bit activations, not the weights."""
    oracle.require()
    path = models.make_model(tmp_path / "m.gguf", experts_type=qtype, attn_type=qtype, n_experts=2, seed=22)
    tokens = list(range(40, 72))
    theirs = oracle.logits(path, tokens, tmp_path)
    with GgufFile.open(path) as gguf:
        assert oracle.nmse(reference_logits(gguf, tokens), theirs) <= (1e-9 if qtype == "F32" else 2e-3)


def test_later_tokens_do_not_change_earlier_logits(tmp_path):
    path = models.make_model(tmp_path / "m.gguf", layers=1)
    with GgufFile.open(path) as gguf:
        long, short = reference_logits(gguf, [1, 2, 3, 4]), reference_logits(gguf, [1, 2])
    assert np.allclose(long[:2], short, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tokens", [[], [-1], [0, 288]])
def test_bad_token_ids_are_refused(tmp_path, tokens):
    path = models.make_model(tmp_path / "m.gguf", "llama", layers=1)
    with GgufFile.open(path) as gguf, pytest.raises(InputError, match=r"0 \.\. 287"):
        reference_logits(gguf, tokens)


def test_route_keeps_the_likeliest_and_weighs_them_to_one():
    moe = MoeConfig(n_experts=4, n_used=2, ffn=32, normalize_weights=True, gating="softmax")
    ids, weights = route(np.log(np.array([[0.1, 0.4, 0.2, 0.3], [0.25, 0.25, 0.25, 0.25]])), moe)
    assert ids.tolist() == [[1, 3], [0, 1]]
    assert np.allclose(weights, [[4 / 7, 3 / 7], [0.5, 0.5]])


def test_route_without_normalisation_and_with_sigmoid():
    moe = MoeConfig(
        n_experts=2, n_used=2, ffn=32, normalize_weights=False, gating="sigmoid", weights_scale=2.0
    )
    ids, weights = route(np.array([[0.0, np.log(3.0)]]), moe)
    assert ids.tolist() == [[1, 0]]
    assert np.allclose(weights, [[1.5, 1.0]])
