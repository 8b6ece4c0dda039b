"""The model by definition: a forward pass in float64 NumPy, written to be read.

Everything faster is tested against this, and this against llama.cpp. There is no KV cache and no
rounding of activations: all tokens at once, weights dequantized one matrix at a time. Shapes:
T tokens, H heads, G KV heads, D head_dim, C hidden, F FFN width, E experts, K used experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from numoe.engine.errors import InputError
from numoe.engine.gguf import GgufFile, dequantize_rows
from numoe.engine.models.config import ModelConfig, MoeConfig, RopeConfig
from numoe.engine.models.rope import rope_frequencies

Array = npt.NDArray[Any]


def reference_logits(
    gguf: GgufFile, token_ids: Sequence[int], dtype: npt.DTypeLike = np.float64
) -> npt.NDArray[np.float64]:
    """Logits after every token of one sequence at positions 0, 1, ...: float64 [T, vocab].

    `dtype` is that of the arithmetic: float64, or float32 to learn what rounding alone does.
    Raises InputError for an empty sequence or an id outside the vocabulary.
    """
    return Reference(gguf, dtype).logits(token_ids)


class Reference:
    """The forward pass of one model in `dtype`; each method is one box of the usual diagram."""

    def __init__(self, gguf: GgufFile, dtype: npt.DTypeLike = np.float64) -> None:
        self.config = ModelConfig.from_gguf(gguf)
        self._gguf = gguf
        self._dtype = np.dtype(dtype)

    def logits(self, token_ids: Sequence[int]) -> npt.NDArray[np.float64]:
        """Token ids [T] to logits float64 [T, vocab]."""
        config = self.config
        if not token_ids or not all(0 <= token < config.vocab for token in token_ids):
            raise InputError(f"token ids must be one or more of 0 .. {config.vocab - 1}")
        x = self._embed(token_ids)
        for layer in range(config.n_layers):
            prefix = f"blk.{layer}."
            x = x + self.attention(prefix, self._norm(f"{prefix}attn_norm", x))
            y = self._norm(f"{prefix}ffn_norm", x)
            x = x + (self.experts(prefix, y) if config.is_moe_layer(layer) else self.dense_ffn(prefix, y))
        x = self._norm("output_norm", x)
        return (x @ self._weight(config.output_tensor).T).astype(np.float64)

    def attention(self, prefix: str, x: Array) -> Array:
        """Causal grouped-query attention (Ainslie et al., arXiv:2305.13245): [T, C] to [T, C].

        softmax(q k^T / sqrt(D)) v per head; query head h reads KV head h // (H / G).
        """
        config, count = self.config, len(x)
        q = (x @ self._weight(f"{prefix}attn_q.weight").T).reshape(count, config.n_heads, config.head_dim)
        k = (x @ self._weight(f"{prefix}attn_k.weight").T).reshape(count, config.n_kv_heads, config.head_dim)
        v = (x @ self._weight(f"{prefix}attn_v.weight").T).reshape(count, config.n_kv_heads, config.head_dim)
        if config.qk_norm:
            q, k = self._norm(f"{prefix}attn_q_norm", q), self._norm(f"{prefix}attn_k_norm", k)
        q, k = rotate(q, config.rope), rotate(k, config.rope)
        group = config.n_heads // config.n_kv_heads
        k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
        scores = np.einsum("thd,shd->hts", q, k) / np.sqrt(np.array(config.head_dim, self._dtype))
        future = np.triu(np.ones((count, count), bool), 1)
        weights = softmax(np.where(future, -np.inf, scores))
        mixed = np.einsum("hts,shd->thd", weights, v).reshape(count, -1)
        out: Array = mixed @ self._weight(f"{prefix}attn_output.weight").T
        return out

    def dense_ffn(self, prefix: str, x: Array) -> Array:
        """One SwiGLU FFN for every token: [T, C] to [T, C]."""
        return swiglu(
            x,
            self._weight(f"{prefix}ffn_gate.weight"),
            self._weight(f"{prefix}ffn_up.weight"),
            self._weight(f"{prefix}ffn_down.weight"),
        )

    def experts(self, prefix: str, x: Array) -> Array:
        """Sum the used experts' SwiGLU FFNs, each times its routing weight: [T, C] to [T, C]."""
        moe = self.config.moe
        assert moe is not None
        router = self._weight(f"{prefix}ffn_gate_inp.weight")
        expert_ids, weights = route(x @ router.T, moe)
        out = np.zeros_like(x)
        for expert in np.unique(expert_ids):
            tokens, slots = np.nonzero(expert_ids == expert)
            y = swiglu(x[tokens], *(self._expert(prefix, part, expert) for part in ("gate", "up", "down")))
            out[tokens] += weights[tokens, slots, None] * y
        return out

    def _embed(self, token_ids: Sequence[int]) -> Array:
        info = self._gguf.tensors["token_embd.weight"]
        rows = self._gguf.read(info.name)[np.asarray(token_ids)]
        return dequantize_rows(rows, info.qtype).astype(self._dtype)

    def _norm(self, name: str, x: Array) -> Array:
        """RMSNorm (Zhang and Sennrich, arXiv:1910.07467) over the last axis."""
        mean_square = (x * x).mean(axis=-1, keepdims=True)
        rms = np.sqrt(mean_square + np.array(self.config.rms_eps, self._dtype))
        out: Array = x / rms * self._weight(f"{name}.weight")
        return out

    def _weight(self, name: str) -> Array:
        return self._gguf.dequantize(name).astype(self._dtype)

    def _expert(self, prefix: str, part: str, expert: int) -> Array:
        info = self._gguf.tensors[f"{prefix}ffn_{part}_exps.weight"]
        return dequantize_rows(self._gguf.read(info.name)[expert], info.qtype).astype(self._dtype)


def rotate(x: Array, rope: RopeConfig) -> Array:
    """RoPE of x [T, heads, D] at positions 0 .. T-1; elements past rope.dims stay."""
    inv_freq, magnitude = rope_frequencies(rope, np.float64)
    angles = np.arange(len(x), dtype=np.float64)[:, None, None] * inv_freq
    cos = (np.cos(angles) * magnitude).astype(x.dtype)
    sin = (np.sin(angles) * magnitude).astype(x.dtype)
    half = rope.dims // 2
    first, second = (
        (slice(0, rope.dims, 2), slice(1, rope.dims, 2))
        if rope.style == "norm"
        else (slice(0, half), slice(half, rope.dims))
    )
    out = x.copy()
    out[..., first] = x[..., first] * cos - x[..., second] * sin
    out[..., second] = x[..., first] * sin + x[..., second] * cos
    return out


def route(scores: Array, moe: MoeConfig) -> tuple[npt.NDArray[np.intp], Array]:
    """Router scores [T, E] to the used experts' ids [T, K], best first, and weights [T, K].

    Probabilities over all experts, the K largest kept (of equal ones the lower id), divided by
    their sum if the model normalizes.
    """
    probabilities = softmax(scores) if moe.gating == "softmax" else 1.0 / (1.0 + np.exp(-scores))
    expert_ids = np.argsort(-probabilities, axis=-1, kind="stable")[:, : moe.n_used]
    weights = np.take_along_axis(probabilities, expert_ids, axis=-1)
    if moe.normalize_weights:
        weights = weights / weights.sum(axis=-1, keepdims=True)
    return expert_ids, weights * scores.dtype.type(moe.weights_scale)


def swiglu(x: Array, gate: Array, up: Array, down: Array) -> Array:
    """SwiGLU FFN (Shazeer, arXiv:2002.05202): x [T, C], gate and up [F, C], down [C, F] to [T, C]."""
    g = x @ gate.T
    out: Array = (g / (1.0 + np.exp(-g)) * (x @ up.T)) @ down.T
    return out


def softmax(x: Array) -> Array:
    """Softmax over the last axis."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    out: Array = e / e.sum(axis=-1, keepdims=True)
    return out
