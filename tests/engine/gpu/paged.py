"""Sequences in a GPU's KV pool, and what NumPy makes of them in float64."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from numoe.engine.gpu.attention import GpuAttention
from numoe.engine.gpu.kv_pool import BLOCK, GpuKvPool
from numoe.engine.kv.pages import PAGE_TOKENS, pages_for
from numoe.engine.models.config import ModelConfig, RopeConfig
from numoe.engine.models.reference import softmax
from numoe.engine.worker.kv_pool import F16, KvType

BIAS = {"q8_0": 128, "q4_0": 8}


def model(heads: int, kv_heads: int, dim: int, *, rope: RopeConfig | None = None, layers: int = 2) -> ModelConfig:
    return ModelConfig(
        architecture="qwen3", n_layers=layers, hidden=64, n_heads=heads, n_kv_heads=kv_heads, head_dim=dim, vocab=256,
        context=1 << 20, rms_eps=1e-5, dense_ffn=64, rope=rope or RopeConfig(dims=dim, theta=1e4, style="neox"),
        moe=None, qk_norm=False, tied_embeddings=True,
    )  # fmt: skip


def encode(x: np.ndarray, kind: str) -> np.ndarray:
    """float32 [256, dim] as a page's bytes: the reference of `append` in `rope_append.cu`."""
    if kind == "f16":
        return x.astype(np.float16).view(np.uint8).ravel()
    blocks = x.reshape(len(x), -1, BLOCK)
    high, low = blocks.max(axis=2), blocks.min(axis=2)
    if kind == "q8_0":
        scales = np.maximum(np.maximum(high, -low) / np.float32(127), np.float32(6.2e-5)).astype(np.float16)
    else:
        scales = (np.where(high > -low, high, low) / np.float32(-8)).astype(np.float16)
    divisors = scales.astype(np.float32)[:, :, None]
    least, most = (-127, 127) if kind == "q8_0" else (-8, 7)
    codes = np.clip(np.rint(blocks / np.where(divisors == 0, np.inf, divisors)), least, most) + BIAS[kind]
    # [tokens, blocks, 8, 4] to [tokens, 8, blocks, 4]
    codes = codes.astype(np.uint8).reshape(*blocks.shape[:2], 8, 4).swapaxes(1, 2).reshape(len(x), -1)
    if kind == "q4_0":
        codes = codes[:, ::2] | codes[:, 1::2] << 4
    return np.concatenate([codes.ravel(), scales.view(np.uint8).ravel()])


def decode(cell: np.ndarray, kind: str, dim: int) -> np.ndarray:
    """A page's bytes of one head's keys or values as float64 [256, dim]."""
    if kind == "f16":
        return cell.view(np.float16).reshape(PAGE_TOKENS, dim).astype(np.float64)
    bits = 8 if kind == "q8_0" else 4
    codes, scales = np.split(cell, [PAGE_TOKENS * dim * bits // 8])
    if kind == "q4_0":
        codes = np.stack([codes & 15, codes >> 4], axis=1).ravel()
    codes = codes.reshape(PAGE_TOKENS, 8, dim // BLOCK, 4).swapaxes(1, 2).reshape(PAGE_TOKENS, -1, BLOCK)
    scaled = (codes.astype(np.float64) - BIAS[kind]) * scales.view(np.float16).reshape(PAGE_TOKENS, -1, 1)
    return scaled.reshape(PAGE_TOKENS, dim)


def overwrite(cell: np.ndarray, new: np.ndarray, tokens: int, kind: str) -> None:
    """The first `tokens` tokens of a page's bytes of one head's keys or values."""
    share = {"f16": 1.0, "q8_0": 32 / 34, "q4_0": 16 / 18}[kind]  # of the codes
    for part in (slice(0, round(len(cell) * share)), slice(round(len(cell) * share), None)):
        length = len(cell[part]) * tokens // PAGE_TOKENS
        cell[part][:length] = new[part][:length]


class Sequences:
    """Slots of given capacities, in pages out of order; unwritten memory is NaN throughout."""

    def __init__(self, config: ModelConfig, capacities: list[int], kind: KvType = F16, *, max_rows: int = 64) -> None:
        import cupy

        self.config, self.kind = config, kind
        counts = [pages_for(capacity) for capacity in capacities]
        pages = np.random.default_rng(5).permutation(sum(counts) + 3)
        self.tables = np.full((len(counts), max(counts)), -1, np.int32)
        for slot, count in enumerate(counts):
            self.tables[slot, :count], pages = pages[:count], pages[count:]
        self.pool = GpuKvPool(config, sum(counts) + 3, kind)
        self.pool.data.fill(0xFF)
        self.attention = GpuAttention(config, self.pool, max_rows, *self.tables.shape)
        self.device_tables = cupy.asarray(self.tables)

    def fill(self, slot: int, length: int, rng: np.random.Generator, *, layer: int = 1, loud: float = 1.0) -> None:
        """Random keys and values for a slot's first `length` tokens, written by NumPy."""
        kinds = (self.kind.keys, self.kind.values)
        for page in range(pages_for(length)):
            here = min(PAGE_TOKENS, length - page * PAGE_TOKENS)
            host = self.pool.data[self.tables[slot, page], layer].get()
            for head in host.reshape(self.config.n_kv_heads, -1):
                for cell, kind in zip(np.split(head, [self.pool.key_bytes]), kinds, strict=True):
                    x = rng.standard_normal((PAGE_TOKENS, self.config.head_dim)) * loud
                    overwrite(cell, encode(x.astype(np.float32), kind), here, kind)
            self.pool.data[self.tables[slot, page], layer].set(host)

    def tokens(self, slot: int, length: int, layer: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values float64 [length, KV heads, dim] of a slot."""
        pages, dim = pages_for(length), self.config.head_dim
        both = [np.empty((pages * PAGE_TOKENS, self.config.n_kv_heads, dim)) for _ in range(2)]
        for page in range(pages):
            host = self.pool.data[self.tables[slot, page], layer].get().reshape(self.config.n_kv_heads, -1)
            for head, cells in enumerate(host):
                parts = np.split(cells, [self.pool.key_bytes])
                for out, cell, kind in zip(both, parts, (self.kind.keys, self.kind.values), strict=True):
                    out[page * PAGE_TOKENS : (page + 1) * PAGE_TOKENS, head] = decode(cell, kind, dim)
        return both[0][:length], both[1][:length]

    def inputs(self, rows: list[tuple[int, int]]) -> SimpleNamespace:
        """As StepInputs, for (slot, position) rows."""
        import cupy

        slots, positions = (cupy.asarray(np.array(column, np.int32)) for column in zip(*rows, strict=True))
        return SimpleNamespace(slots=slots, positions=positions, page_tables=self.device_tables)

    def attend(self, way: str, q: np.ndarray, rows: list[tuple[int, int]], layer: int = 1) -> np.ndarray:
        """`decode` or `prefill` of q float32 [rows, heads, dim]."""
        import cupy

        inputs, out = self.inputs(rows), cupy.full(q.shape, np.nan, np.float32)
        run = getattr(self.attention, way)
        run(layer, cupy.asarray(q), inputs.positions, inputs.slots, inputs.page_tables, out, len(rows))
        return out.get()


def softmax_attention(q: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """One row, float64: q [heads, dim] over keys and values [tokens, KV heads, dim]."""
    group = q.shape[0] // keys.shape[1]
    q = q.reshape(keys.shape[1], group, -1).astype(np.float64)
    weights = softmax(np.einsum("kgd,tkd->kgt", q, keys) / np.sqrt(q.shape[2]))
    return np.einsum("kgt,tkd->kgd", weights, values).reshape(-1, q.shape[2])


def nmse(found: np.ndarray, want: np.ndarray) -> float:
    """Mean squared error over the mean square; NaN stays NaN."""
    return float(((found - want) ** 2).mean() / (want**2).mean())
