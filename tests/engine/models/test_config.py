"""ModelConfig: what a file says, and every way in which a file may say nonsense."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from numoe.engine.errors import ModelFileError, UnsupportedError
from numoe.engine.gguf import GgufFile
from numoe.engine.models import ModelConfig, MoeConfig, RopeConfig
from tests import models


def config_of(tmp_path, model: models.TinyModel) -> ModelConfig:
    with GgufFile.open(model.write(tmp_path / "m.gguf")) as gguf:
        return ModelConfig.from_gguf(gguf)


def changed(arch: str = "qwen3moe", **keys: Any) -> models.TinyModel:
    """A one-layer model with `keys` (dots as __) replaced, or removed if None."""
    model = models.build_model(arch, layers=1)
    for name, value in keys.items():
        key = f"{model.architecture}.{name.replace('__', '.')}"
        if value is None:
            del model.metadata[key]
        else:
            model.metadata[key] = value
    return model


def test_qwen3moe(tmp_path):
    config = config_of(tmp_path, models.build_model("qwen3moe", n_used=3, rope_theta=1e6, context=1024))
    assert config == ModelConfig(
        architecture="qwen3moe",
        n_layers=2,
        hidden=128,
        n_heads=4,
        n_kv_heads=2,
        head_dim=64,
        vocab=288,
        context=1024,
        rms_eps=pytest.approx(1e-5),
        dense_ffn=0,
        rope=RopeConfig(dims=64, theta=1e6, style="neox", original_context=1024),
        moe=MoeConfig(n_experts=8, n_used=3, ffn=128, normalize_weights=True, gating="softmax"),
        qk_norm=True,
        tied_embeddings=False,
    )
    assert config.is_moe_layer(0)
    assert config.output_tensor == "output.weight"


def test_llama_dense_and_tied(tmp_path):
    config = config_of(tmp_path, models.build_model("llama", tied=True))
    assert (config.moe, config.dense_ffn, config.qk_norm) == (None, 128, False)
    assert config.rope.style == "norm"
    assert config.output_tensor == "token_embd.weight"
    assert not config.is_moe_layer(1)


def test_llama_moe(tmp_path):
    config = config_of(tmp_path, models.build_model("llama-moe"))
    assert config.architecture == "llama"
    assert config.moe == MoeConfig(n_experts=8, n_used=2, ffn=128, normalize_weights=True, gating="softmax")


def test_rope_scaling(tmp_path):
    yarn = config_of(tmp_path, models.build_model(rope_scaling="yarn", context=4096)).rope
    assert (yarn.scaling, yarn.factor, yarn.original_context, yarn.ext_factor) == ("yarn", 4.0, 1024, 1.0)
    linear = config_of(tmp_path, models.build_model(rope_scaling="linear")).rope
    assert (linear.scaling, linear.factor, linear.ext_factor) == ("linear", 4.0, 0.0)
    none = config_of(tmp_path, models.build_model(rope_scaling="none")).rope
    assert (none.scaling, none.factor) == ("none", 1.0)


def test_a_factor_without_a_type_is_linear(tmp_path):
    assert config_of(tmp_path, changed(rope__scaling__factor=2.0)).rope.scaling == "linear"
    assert config_of(tmp_path, changed(rope__scale_linear=2.0)).rope.factor == 2.0


def test_frequency_factors(tmp_path):
    factors = config_of(tmp_path, models.build_model("llama", frequency_factors=True)).rope.frequency_factors
    assert factors is not None
    assert len(factors) == 32
    assert factors[0] == 1.0


def test_optional_keys_have_the_defaults_of_llama_cpp(tmp_path):
    rope = config_of(tmp_path, changed(rope__freq_base=None, rope__dimension_count=None)).rope
    assert (rope.theta, rope.dims) == (10000.0, 64)
    model = models.build_model("llama", layers=1, head_dim=32)
    for key in ("attention.key_length", "attention.value_length", "vocab_size"):
        del model.metadata[f"llama.{key}"]
    config = config_of(tmp_path, model)
    assert (config.head_dim, config.vocab) == (32, 288)


def test_without_kv_heads_every_head_has_its_own(tmp_path):
    model = models.build_model("llama", layers=1, kv_heads=4)
    del model.metadata["llama.attention.head_count_kv"]
    assert config_of(tmp_path, model).n_kv_heads == 4


def test_per_layer_lists_of_one_value(tmp_path):
    model = models.build_model("llama", layers=2)
    model.metadata["llama.attention.head_count_kv"] = [2, 2]
    assert config_of(tmp_path, model).n_kv_heads == 2
    model.metadata["llama.attention.head_count_kv"] = [2, 1]
    with pytest.raises(UnsupportedError, match="head_count_kv differs between layers"):
        config_of(tmp_path, model)


BAD_KEYS: dict[str, tuple[dict[str, Any], str]] = {
    "no layers key": ({"block_count": None}, r"qwen3moe\.block_count is missing"),
    "no layers": ({"block_count": 0}, "block_count is 0, not in 1"),
    "2^32 layers": ({"block_count": 2**32 - 1}, "block_count is 4294967295"),
    "layers text": ({"block_count": "two"}, "'two', not an integer"),
    "layers true": ({"block_count": True}, "not an integer"),
    "no hidden": ({"embedding_length": None}, "embedding_length is missing"),
    "no heads": ({"attention__head_count": 0}, "head_count is 0"),
    "kv heads": ({"attention__head_count_kv": 3}, "3, no divisor of 4 heads"),
    "no eps": ({"attention__layer_norm_rms_epsilon": None}, "layer_norm_rms_epsilon is missing"),
    "eps NaN": ({"attention__layer_norm_rms_epsilon": float("nan")}, "is nan"),
    "eps text": ({"attention__layer_norm_rms_epsilon": "x"}, "not a number"),
    "theta 0": ({"rope__freq_base": 0.0}, "freq_base is 0"),
    "theta inf": ({"rope__freq_base": float("inf")}, "freq_base is inf"),
    "rope dims odd": ({"rope__dimension_count": 63}, "dimension_count is 63"),
    "rope dims": ({"rope__dimension_count": 128}, "dimension_count is 128, where heads have 64"),
    "factor": ({"rope__scaling__factor": -1.0}, "factor is -1"),
    "scaling type": ({"rope__scaling__type": 3}, "not a string"),
    "context": ({"context_length": 0}, "context_length is 0"),
    "no experts": ({"expert_count": 0}, "expert_count is missing or 0"),
    "experts": ({"expert_count": 5000}, r"5000, not in 0 \.\. 4096"),
    "used experts": ({"expert_used_count": 9}, "9, more than expert_count 8"),
    "no used experts": ({"expert_used_count": None}, "expert_used_count is missing"),
    "expert width": ({"expert_feed_forward_length": 0}, "expert_feed_forward_length is 0"),
    "norm flag": ({"expert_weights_norm": 1}, "not a boolean"),
}


@pytest.mark.parametrize("name", BAD_KEYS)
def test_bad_metadata_are_named(tmp_path, name):
    keys, expected = BAD_KEYS[name]
    with pytest.raises(ModelFileError, match=expected) as caught:
        config_of(tmp_path, changed(**keys))
    message = str(caught.value)
    assert message.startswith(str(tmp_path / "m.gguf"))
    assert "\n" not in message
    assert "; " in message


UNSUPPORTED_KEYS: dict[str, tuple[dict[str, Any], str]] = {
    "longrope": ({"rope__scaling__type": "longrope"}, "'longrope'; only none, linear and yarn"),
    "value length": ({"attention__value_length": 32}, "32, unlike attention.key_length 64"),
    "sigmoid": ({"expert_gating_func": 2}, "'sigmoid', but qwen3moe models route with 'softmax'"),
    "gating": ({"expert_gating_func": 9}, "9; only 1"),
    "no norm": ({"expert_weights_norm": False}, "expert_weights_norm asks for False"),
    "scale": ({"expert_weights_scale": 2.5}, "expert_weights_scale asks for 2.5"),
}


@pytest.mark.parametrize("name", UNSUPPORTED_KEYS)
def test_sound_but_unsupported_metadata_are_named(tmp_path, name):
    keys, expected = UNSUPPORTED_KEYS[name]
    with pytest.raises(UnsupportedError, match=expected):
        config_of(tmp_path, changed(**keys))


def test_unknown_architecture_lists_the_known_ones(tmp_path):
    model = models.build_model("llama", layers=1)
    model.architecture = "mamba"
    with pytest.raises(UnsupportedError, match=r"'mamba' is not supported; .* llama or qwen3moe"):
        config_of(tmp_path, model)


@pytest.mark.parametrize("name", list(models.build_model("qwen3moe", layers=1).tensors))
def test_missing_tensor_is_named_with_its_shape(tmp_path, name):
    model = models.build_model("qwen3moe", layers=1)
    del model.tensors[name]
    if name == "output.weight":
        assert config_of(tmp_path, model).tied_embeddings
        return
    with pytest.raises(ModelFileError, match=rf"{name} \[.*\] is missing"):
        config_of(tmp_path, model)


@pytest.mark.parametrize("name", list(models.build_model("qwen3moe", layers=1).tensors))
def test_wrong_shape_is_named_with_both_shapes(tmp_path, name):
    model = models.build_model("qwen3moe", layers=1)
    data, qtype = model.tensors[name]
    model.tensors[name] = (np.ascontiguousarray(data[: len(data) // 2]), qtype)
    with pytest.raises(ModelFileError, match=rf"{name} has shape \[.*\], the metadata ask for \[.*\]"):
        config_of(tmp_path, model)


@pytest.mark.parametrize("name", ["blk.0.attn_q.bias", "blk.0.ffn_gate_shexp.weight", "blk.1.attn_q.weight"])
def test_a_tensor_that_would_change_the_result_is_refused(tmp_path, name):
    model = models.build_model("llama", layers=1)
    model.tensors[name] = (np.ones(256, np.float32), "F32")
    with pytest.raises(UnsupportedError, match=f"'{name}' is not part of a llama model"):
        config_of(tmp_path, model)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_bad_frequency_factors_are_refused(tmp_path, value):
    model = models.build_model("llama", layers=1, frequency_factors=True)
    model.tensors["rope_freqs.weight"][0][3] = value
    with pytest.raises(ModelFileError, match=r"rope_freqs\.weight is not finite and positive"):
        config_of(tmp_path, model)


def test_vocabulary_only_file_is_told_apart(tmp_path):
    model = models.build_model("llama", layers=1)
    model.tensors.clear()
    with pytest.raises(ModelFileError, match="holds no tensors"):
        config_of(tmp_path, model)
