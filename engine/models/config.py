"""`ModelConfig`: the dimensions and constants of a model, read from its file and checked against it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final, Literal, Self

import numpy as np
from gguf import ExpertGatingFuncType

from numoe.engine.errors import ModelFileError, UnsupportedError
from numoe.engine.gguf import GgufFile
from numoe.engine.gguf.scanner import DAMAGED, quoted
from numoe.engine.models.architecture import (
    ARCHITECTURES,
    IGNORED_TENSORS,
    Architecture,
    Gating,
    MoeDefaults,
    RopeStyle,
)
from numoe.engine.models.metadata import MetadataReader

RopeScaling = Literal["none", "linear", "yarn"]
MAX_EXPERTS: Final = 4096
MAX_LAYERS: Final = 4096
MAX_HEAD_DIM: Final = 4096


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding; `rope.rope_frequencies` turns it into numbers.

    dims:              rotated elements of a head, even.
    theta:             base of the frequencies.
    style:             pairs (2i, 2i+1) are "norm", pairs (i, i + dims/2) "neox".
    factor:            how many times the context grew; 1 without scaling.
    original_context:  tokens the model was trained on before scaling.
    ext_factor, attn_factor, beta_fast, beta_slow: of YaRN, see `rope_frequencies`.
    frequency_factors: divisors of the frequencies, [dims/2], from tensor rope_freqs.weight.
    """

    dims: int
    theta: float
    style: RopeStyle
    scaling: RopeScaling = "none"
    factor: float = 1.0
    original_context: int = 0
    ext_factor: float = 0.0
    attn_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    frequency_factors: tuple[float, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class MoeConfig:
    """Routed experts: how many there are, how many a token uses, an expert's width, the routing.

    leading_dense_layers: layers 0 .. this-1 have a dense FFN instead.
    normalize_weights:    the weights of the used experts are divided by their sum, then all are
                          multiplied by weights_scale.
    """

    n_experts: int
    n_used: int
    ffn: int
    normalize_weights: bool
    gating: Gating
    weights_scale: float = 1.0
    leading_dense_layers: int = 0


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One model. Counts are of elements; `context` and `vocab` of tokens.

    n_heads, n_kv_heads: query heads and key/value heads; a group of n_heads / n_kv_heads query
                         heads shares one KV head.
    dense_ffn:           width of the dense FFN, 0 where no layer has one.
    moe:                 None for a dense model.
    tied_embeddings:     the output matrix is token_embd.weight.
    """

    architecture: str
    n_layers: int
    hidden: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocab: int
    context: int
    rms_eps: float
    dense_ffn: int
    rope: RopeConfig
    moe: MoeConfig | None
    qk_norm: bool
    tied_embeddings: bool

    def is_moe_layer(self, layer: int) -> bool:
        """Whether layer `layer` has routed experts instead of a dense FFN."""
        return self.moe is not None and layer >= self.moe.leading_dense_layers

    @property
    def output_tensor(self) -> str:
        """The tensor that turns the last hidden state into logits."""
        return "token_embd.weight" if self.tied_embeddings else "output.weight"

    @classmethod
    def from_gguf(cls, gguf: GgufFile) -> Self:
        """Read and check the configuration of `gguf`, and every tensor's presence and shape.

        Raises UnsupportedError for an architecture or feature that numoe lacks, ModelFileError for
        missing, absurd or contradictory metadata and tensors. Weight formats are not looked at:
        see `GgufFile.check_weight_types`.
        """
        architecture = _architecture(gguf)
        meta = MetadataReader(gguf)
        hidden = meta.integer("embedding_length")
        n_heads = meta.integer("attention.head_count", high=1 << 16)
        head_dim = _head_dim(meta, hidden, n_heads)
        n_kv_heads = meta.integer("attention.head_count_kv", n_heads, high=1 << 16)
        if n_heads % n_kv_heads:
            raise meta.error("attention.head_count_kv", f"is {n_kv_heads}, no divisor of {n_heads} heads")
        n_layers = meta.integer("block_count", high=MAX_LAYERS)
        context = meta.integer("context_length", high=1 << 30)
        moe = _moe(meta, architecture.moe)
        config = cls(
            architecture=architecture.name,
            n_layers=n_layers,
            hidden=hidden,
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            head_dim=head_dim,
            vocab=_vocab(gguf, meta),
            context=context,
            rms_eps=meta.real("attention.layer_norm_rms_epsilon", low=1e-30, high=1.0),
            dense_ffn=meta.integer("feed_forward_length") if moe is None else 0,
            rope=_rope(meta, architecture, head_dim, context),
            moe=moe,
            qk_norm=architecture.qk_norm,
            tied_embeddings="output.weight" not in gguf.tensors,
        )
        _check_tensors(gguf, architecture, config)
        if "rope_freqs.weight" in gguf.tensors:
            config = replace(config, rope=replace(config.rope, frequency_factors=_factors(gguf)))
        return config


def _architecture(gguf: GgufFile) -> Architecture:
    name = gguf.architecture
    if name not in ARCHITECTURES:
        raise UnsupportedError(
            f"{gguf.path}: architecture {quoted(name)} is not supported; "
            f"use a model of architecture {' or '.join(sorted(ARCHITECTURES))}"
        )
    return ARCHITECTURES[name]


def _head_dim(meta: MetadataReader, hidden: int, n_heads: int) -> int:
    """Elements of a head: the same for keys and values, hidden / heads if nothing says otherwise."""
    if "attention.key_length" not in meta and hidden % n_heads:
        raise meta.error("attention.head_count", f"is {n_heads}, no divisor of embedding length {hidden}")
    head_dim = meta.integer("attention.key_length", hidden // n_heads, high=MAX_HEAD_DIM)
    value_dim = meta.integer("attention.value_length", head_dim, high=MAX_HEAD_DIM)
    if value_dim != head_dim:
        what = f"is {value_dim}, unlike attention.key_length {head_dim}; use a model where both are equal"
        raise meta.unsupported("attention.value_length", what)
    return head_dim


def _vocab(gguf: GgufFile, meta: MetadataReader) -> int:
    """Tokens of the vocabulary: of the tokenizer, else vocab_size, else rows of the embedding."""
    tokens = gguf.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list) and tokens:
        return len(tokens)
    embedding = gguf.tensors.get("token_embd.weight")
    rows = embedding.shape[0] if embedding is not None else None
    return meta.integer("vocab_size", rows) if rows is not None else meta.integer("vocab_size")


def _moe(meta: MetadataReader, defaults: MoeDefaults | None) -> MoeConfig | None:
    n_experts = meta.integer("expert_count", 0, low=0, high=MAX_EXPERTS)
    if n_experts == 0:
        if defaults is not None and defaults.required:
            raise meta.error("expert_count", "is missing or 0, in an architecture of experts")
        return None
    if defaults is None:
        raise meta.unsupported("expert_count", f"is {n_experts}; only dense models of it are supported")
    n_used = meta.integer("expert_used_count", high=MAX_EXPERTS)
    if n_used > n_experts:
        raise meta.error("expert_used_count", f"is {n_used}, more than expert_count {n_experts}")
    return MoeConfig(
        n_experts=n_experts,
        n_used=n_used,
        ffn=_expert_ffn(meta, defaults, n_used),
        normalize_weights=_routing(
            meta,
            "expert_weights_norm",
            meta.flag("expert_weights_norm", defaults.normalize_weights),
            defaults,
        ),
        gating=_routing(meta, "expert_gating_func", _gating(meta, defaults.gating), defaults),
        weights_scale=_routing(
            meta, "expert_weights_scale", meta.real("expert_weights_scale", 1.0, high=1e4) or 1.0, defaults
        ),
    )


def _expert_ffn(meta: MetadataReader, defaults: MoeDefaults, n_used: int) -> int:
    if not defaults.ffn_divides or defaults.ffn_key in meta:
        return meta.integer(defaults.ffn_key)
    total = meta.integer("feed_forward_length")
    if total % n_used:
        raise meta.error(defaults.ffn_key, "is missing")
    return total // n_used


def _gating(meta: MetadataReader, default: Gating) -> Gating:
    names: dict[int, Gating] = {
        0: default,
        int(ExpertGatingFuncType.SOFTMAX): "softmax",
        int(ExpertGatingFuncType.SIGMOID): "sigmoid",
    }
    number = meta.integer("expert_gating_func", 0, low=0, high=1 << 16)
    if number not in names:
        raise meta.unsupported(
            "expert_gating_func", f"is {number}; only 1 (softmax) and 2 (sigmoid) are known"
        )
    return names[number]


def _routing(meta: MetadataReader, name: str, value: Any, defaults: MoeDefaults) -> Any:
    """Return `value`, refused if the architecture's routing is fixed and the file wants another."""
    fixed = {
        "expert_weights_norm": defaults.normalize_weights,
        "expert_gating_func": defaults.gating,
        "expert_weights_scale": 1.0,
    }[name]
    if value != fixed and not defaults.configurable:
        what = f"asks for {value!r}, but {meta.architecture} models route with {fixed!r} only"
        raise meta.unsupported(name, what)
    return value


def _rope(meta: MetadataReader, architecture: Architecture, head_dim: int, context: int) -> RopeConfig:
    """RoPE as llama.cpp reads it: a factor without a type is linear, "none" ignores the factor."""
    dims = meta.integer("rope.dimension_count", head_dim, high=MAX_HEAD_DIM)
    if dims % 2 or dims > head_dim or (dims != head_dim and not architecture.partial_rope):
        raise meta.error("rope.dimension_count", f"is {dims}, where heads have {head_dim} elements")
    scaling = meta.text("rope.scaling.type", "linear")
    if scaling not in ("none", "linear", "yarn"):
        what = f"is {quoted(scaling)}; only none, linear and yarn are supported"
        raise meta.unsupported("rope.scaling.type", what)
    factor = meta.real("rope.scaling.factor", 0.0, high=1e6) or meta.real("rope.scale_linear", 0.0, high=1e6)
    if factor == 0.0 or scaling == "none":
        factor = 1.0
    rope = RopeConfig(
        dims=dims,
        theta=meta.real("rope.freq_base", 10000.0, low=1.0 + 1e-6),
        style=architecture.rope_style,
        scaling="yarn" if scaling == "yarn" else "none" if factor == 1.0 else "linear",
        factor=factor,
        original_context=meta.integer("rope.scaling.original_context_length", 0, low=0, high=1 << 30)
        or context,
        ext_factor=float(scaling == "yarn"),
        attn_factor=meta.real("rope.scaling.attn_factor", 1.0, high=1e6),
    )
    if not architecture.yarn_keys:
        return rope
    return replace(
        rope,
        ext_factor=meta.real("rope.scaling.yarn_ext_factor", rope.ext_factor, high=1e6),
        beta_fast=meta.real("rope.scaling.yarn_beta_fast", rope.beta_fast, low=1e-6, high=1e6),
        beta_slow=meta.real("rope.scaling.yarn_beta_slow", rope.beta_slow, low=1e-6, high=1e6),
    )


def _factors(gguf: GgufFile) -> tuple[float, ...]:
    factors = gguf.dequantize("rope_freqs.weight")
    if not np.isfinite(factors).all() or (factors <= 0).any():
        raise ModelFileError(f"{gguf.path}: tensor rope_freqs.weight is not finite and positive; {DAMAGED}")
    return tuple(factors.tolist())


def _check_tensors(gguf: GgufFile, architecture: Architecture, config: ModelConfig) -> None:
    """Every tensor the architecture needs is there in its shape, and none that it does not know."""
    if not gguf.tensors:
        raise ModelFileError(f"{gguf.path}: holds no tensors, only metadata; give a file with the weights")
    known: set[str] = set()
    for spec in architecture.tensors(config):
        known.add(spec.name)
        info = gguf.tensors.get(spec.name)
        if info is None:
            if spec.optional:
                continue
            raise ModelFileError(
                f"{gguf.path}: tensor {spec.name} {list(spec.shape)} is missing; "
                "convert the model again with a current llama.cpp"
            )
        if info.shape != spec.shape:
            raise ModelFileError(
                f"{info.path}: tensor {spec.name} has shape {list(info.shape)}, "
                f"the metadata ask for {list(spec.shape)}; {DAMAGED}"
            )
    for name, info in gguf.tensors.items():
        if name not in known and not name.endswith(IGNORED_TENSORS):
            raise UnsupportedError(
                f"{info.path}: tensor {quoted(name)} is not part of a {architecture.name} model as numoe "
                "computes it; use a model without it"
            )
