"""Architectures as data: one `Architecture` value per name in general.architecture.

An architecture says how its metadata default, which tensors it needs and in which shapes. What the
tensors compute is defined by `reference.py`; what differs between architectures there is read from
`ModelConfig` alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

if TYPE_CHECKING:
    from numoe.engine.models.config import ModelConfig

RopeStyle = Literal["norm", "neox"]
Gating = Literal["softmax", "sigmoid"]


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that a model file must hold (may hold, if optional), shape in NumPy order."""

    name: str
    shape: tuple[int, ...]
    optional: bool = False


@dataclass(frozen=True, kw_only=True)
class MoeDefaults:
    """Routing where the metadata are silent, and whether they may change it.

    ffn_key:     the key that holds an expert's width; `ffn_is_total` the fallback of llama.cpp:
                 the dense width divided by the number of used experts.
    configurable: expert_weights_norm, expert_weights_scale and expert_gating_func are honoured;
                 otherwise llama.cpp ignores them, and a file that says other than the default is
                 refused.
    """

    required: bool
    ffn_key: str
    ffn_divides: bool = False
    normalize_weights: bool = True
    gating: Gating = "softmax"
    configurable: bool = False


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One model family.

    rope_style:    which pairs of a head are rotated together: "norm" (2i, 2i+1) or "neox"
                   (i, i + dims/2).
    partial_rope:  whether fewer elements than head_dim may be rotated.
    yarn_keys:     whether rope.scaling.yarn_* override YaRN's constants; llama.cpp reads them for
                   few architectures and ignores them in files of the others.
    qk_norm:       RMSNorm over each head of q and k before RoPE.
    moe:           routing, or None where there never are experts.
    layer_tensors: the tensors of layer `i` of a model.
    """

    name: str
    rope_style: RopeStyle
    qk_norm: bool
    moe: MoeDefaults | None
    layer_tensors: Callable[[ModelConfig, int], Iterator[TensorSpec]]
    partial_rope: bool = False
    yarn_keys: bool = False

    def tensors(self, config: ModelConfig) -> Iterator[TensorSpec]:
        """Every tensor of a model with `config`, in the order of the forward pass."""
        yield TensorSpec("token_embd.weight", (config.vocab, config.hidden))
        for layer in range(config.n_layers):
            yield from self.layer_tensors(config, layer)
        yield TensorSpec("output_norm.weight", (config.hidden,))
        yield TensorSpec("output.weight", (config.vocab, config.hidden), optional=True)
        yield TensorSpec("rope_freqs.weight", (config.rope.dims // 2,), optional=True)


def gqa_tensors(config: ModelConfig, layer: int) -> Iterator[TensorSpec]:
    """List grouped-query attention [query heads, KV heads] with its norm, then the FFN."""
    prefix = f"blk.{layer}."
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    yield TensorSpec(f"{prefix}attn_norm.weight", (config.hidden,))
    yield TensorSpec(f"{prefix}attn_q.weight", (q, config.hidden))
    yield TensorSpec(f"{prefix}attn_k.weight", (kv, config.hidden))
    yield TensorSpec(f"{prefix}attn_v.weight", (kv, config.hidden))
    yield TensorSpec(f"{prefix}attn_output.weight", (config.hidden, q))
    if config.qk_norm:
        yield TensorSpec(f"{prefix}attn_q_norm.weight", (config.head_dim,))
        yield TensorSpec(f"{prefix}attn_k_norm.weight", (config.head_dim,))
    yield from ffn_tensors(config, layer)


def ffn_tensors(config: ModelConfig, layer: int) -> Iterator[TensorSpec]:
    """List the FFN's norm and matrices: router and stacked experts, or one dense FFN."""
    prefix = f"blk.{layer}."
    yield TensorSpec(f"{prefix}ffn_norm.weight", (config.hidden,))
    if not config.is_moe_layer(layer):
        yield TensorSpec(f"{prefix}ffn_gate.weight", (config.dense_ffn, config.hidden))
        yield TensorSpec(f"{prefix}ffn_up.weight", (config.dense_ffn, config.hidden))
        yield TensorSpec(f"{prefix}ffn_down.weight", (config.hidden, config.dense_ffn))
        return
    moe = config.moe
    assert moe is not None
    yield TensorSpec(f"{prefix}ffn_gate_inp.weight", (moe.n_experts, config.hidden))
    yield TensorSpec(f"{prefix}ffn_gate_exps.weight", (moe.n_experts, moe.ffn, config.hidden))
    yield TensorSpec(f"{prefix}ffn_up_exps.weight", (moe.n_experts, moe.ffn, config.hidden))
    yield TensorSpec(f"{prefix}ffn_down_exps.weight", (moe.n_experts, config.hidden, moe.ffn))


LLAMA: Final = Architecture(
    name="llama",
    rope_style="norm",
    qk_norm=False,
    moe=MoeDefaults(required=False, ffn_key="feed_forward_length"),
    layer_tensors=gqa_tensors,
)

QWEN3MOE: Final = Architecture(
    name="qwen3moe",
    rope_style="neox",
    qk_norm=True,
    moe=MoeDefaults(required=True, ffn_key="expert_feed_forward_length", ffn_divides=True),
    layer_tensors=gqa_tensors,
)

ARCHITECTURES: Final[dict[str, Architecture]] = {a.name: a for a in (LLAMA, QWEN3MOE)}
"""The architectures numoe serves, by general.architecture."""

IGNORED_TENSORS: Final = (".attn_rot_embd.weight", ".attn.rot_embd.weight")
"""Suffixes of tensors that old converters wrote and that llama.cpp skips."""
