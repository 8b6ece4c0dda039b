"""Attention on the GPU over pages of KV: rotary embedding, appending to the cache, decode, prefill.

Everything runs on the current stream and may be captured into a graph. What a row gives is the same bits
whatever the other rows of a decode step are.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from numoe.engine.gpu import device
from numoe.engine.gpu.compiler import module
from numoe.engine.gpu.kv_pool import GpuKvPool
from numoe.engine.kv.pages import PAGE_TOKENS
from numoe.engine.models.config import ModelConfig
from numoe.engine.models.rope import rope_frequencies

if TYPE_CHECKING:
    import cupy as cp

    from numoe.engine.gpu.step import StepInputs

DECODE_ROWS = 16
"""Rows that `decode` takes at a time."""

_THREADS = 128
_WARPS = 4
_MERGE_THREADS = 512
_KINDS = {"f16": "F16", "q8_0": "Q8_0", "q4_0": "Q4_0"}
_MAX_PREFILL_SPLITS = 32
_GOOD_OCCUPANCY = 0.9


class GpuAttention:
    """The attention of all layers of a model over a pool; `begin` once in a step, then `run` for each layer.

    max_rows: rows of a step at most. max_pages: of a sequence. Buffers are those of one layer at a
    time, so all layers of a step must run on one stream.
    """

    def __init__(self, config: ModelConfig, pool: GpuKvPool, max_rows: int, max_pages: int) -> None:
        import cupy

        self._config, self._pool, self._max_pages = config, pool, max_pages
        self._gpu = device.current()
        frequencies, magnitude = rope_frequencies(config.rope, np.float64)
        self._frequencies, self._magnitude = cupy.asarray(frequencies), float(magnitude)
        self._table = cupy.empty((max_rows, len(frequencies), 2), np.float32)
        self._group = config.n_heads // config.n_kv_heads
        self._scale = np.float32(math.log2(math.e) / math.sqrt(config.head_dim))
        self._load_kernels()
        parts = max(DECODE_ROWS * config.n_heads * self._splits, 3 * self._prefill_slots * self._prefill_m)
        self._parts = cupy.empty((parts, config.head_dim), np.float32)
        self._states = cupy.empty((parts, 2), np.float32)

    def _load_kernels(self) -> None:
        import cupy

        config, dim, sms = self._config, self._config.head_dim, self._gpu.sms
        kinds = f"{_KINDS[self._pool.kind.keys]}, {_KINDS[self._pool.kind.values]}"
        append = f"rope_append<{kinds}>"
        rope = module("rope_append", append)
        self._rope_table, self._append = rope.get_function("rope_table"), rope.get_function(append)

        heads8 = 1 if self._group <= 8 else 2
        widest = max(_code_bytes(kind, dim) for kind in (self._pool.kind.keys, self._pool.kind.values))
        self._decode_tiles, resident = _decode_shape(dim, heads8, widest)
        decode = f"decode<{dim}, {heads8}, {kinds}, {self._decode_tiles}, {resident}>"
        self._decode = module("attention_decode", decode).get_function(decode)
        self._merge = module("attention_merge").get_function("merge")
        self._head_parts = -(-self._group // (8 * heads8))
        # As many blocks as are on the device at once, for one row.
        blocks = sms * resident // (config.n_kv_heads * self._head_parts)
        most = -(-self._max_pages * PAGE_TOKENS // (2 * 16 * _WARPS))
        self._splits = min(max(1, blocks), most)

        old = self._gpu.capability < (8, 0)  # 64 KB of shared memory
        rows16, tokens = (2, 32 if old else 64) if dim <= 128 else (1, 16 if old else 32)
        prefill = f"prefill<{dim}, {kinds}, {rows16}, {tokens}>"
        self._prefill_m = 16 * rows16 * _WARPS
        self._prefill = module("attention_prefill", prefill).get_function(prefill)
        raw = sum(
            tokens * (_code_bytes(kind, dim) + dim // 16)
            for kind in (self._pool.kind.keys, self._pool.kind.values)
            if kind != "f16"
        )
        self._prefill_shared = (self._prefill_m + 2 * tokens) * (2 * dim + 16) + raw
        self._prefill.max_dynamic_shared_size_bytes = self._prefill_shared
        shared = int(cupy.cuda.Device().attributes["MaxSharedMemoryPerMultiprocessor"])
        self._prefill_slots: int = sms * min(2 if dim <= 128 else 1, shared // (self._prefill_shared + 1024))

    def begin(self, positions: cp.ndarray, rows: int) -> None:
        """Compute the rotary table of a step's rows; positions int32 [rows]."""
        half = len(self._frequencies)
        self._rope_table(
            (-(-rows * half // _THREADS),), (_THREADS,),
            (self._frequencies, np.int32(half), self._magnitude, positions, np.int32(rows), self._table),
        )  # fmt: skip

    def run(
        self, layer: int, q: cp.ndarray, k: cp.ndarray, v: cp.ndarray, q_norm: cp.ndarray | None,
        k_norm: cp.ndarray | None, inputs: StepInputs, out: cp.ndarray, rows: int, *, decode_rows: int = 0,
    ) -> None:  # fmt: skip
        """Normalise, rotate, append and attend, for `rows` rows of a layer.

        q: float32 [rows, heads * dim], overwritten. k, v: float32 [rows, KV heads * dim]. norms:
        float32 [dim]. out: float32 [rows, heads * dim]. decode_rows: that many rows at the front
        are of a sequence each and take the way of `decode`; all rows do if there are few.
        """
        positions, slots, tables = inputs.positions, inputs.slots, inputs.page_tables
        self.append(layer, q, k, v, q_norm, k_norm, positions, slots, tables, rows)
        first = rows if rows <= DECODE_ROWS else decode_rows
        for start in range(0, first, DECODE_ROWS):
            count = min(DECODE_ROWS, first - start)
            self.decode(layer, q[start:], positions[start:], slots[start:], tables, out[start:], count)
        if first < rows:
            self.prefill(layer, q[first:], positions[first:], slots[first:], tables, out[first:], rows - first)

    def append(
        self, layer: int, q: cp.ndarray, k: cp.ndarray, v: cp.ndarray, q_norm: cp.ndarray | None,
        k_norm: cp.ndarray | None, positions: cp.ndarray, slots: cp.ndarray, page_tables: cp.ndarray, rows: int,
    ) -> None:  # fmt: skip
        """Normalise and rotate queries in place, and keys on their way to the pool, as values."""
        config = self._config
        units = config.n_heads + 2 * config.n_kv_heads
        null = np.uint64(0)
        self._append(
            (-(-units // _WARPS), rows), (_THREADS,),
            (
                q, k, v, np.int32(config.n_heads), np.int32(config.n_kv_heads), np.int32(config.head_dim),
                self._table, np.int32(len(self._frequencies)), np.int32(config.rope.style == "neox"),
                null if q_norm is None else q_norm, null if k_norm is None else k_norm, np.float32(config.rms_eps),
                positions, slots, *self._place(layer, page_tables),
            ),
        )  # fmt: skip

    def decode(
        self, layer: int, q: cp.ndarray, positions: cp.ndarray, slots: cp.ndarray, page_tables: cp.ndarray,
        out: cp.ndarray, rows: int,
    ) -> None:  # fmt: skip
        """Attention of up to DECODE_ROWS rows, whatever sequences they are of; arguments as of `run`."""
        config, splits = self._config, np.int32(self._splits)
        self._decode(
            (config.n_kv_heads * self._head_parts, rows, self._splits), (_THREADS,),
            (
                q, np.int32(config.n_kv_heads), np.int32(self._group), self._scale, positions, slots,
                *self._place(layer, page_tables), splits, self._parts, self._states,
            ),
        )  # fmt: skip
        self._merge_parts(self._splits, positions, self._decode_tiles, out, rows)

    def prefill(
        self, layer: int, q: cp.ndarray, positions: cp.ndarray, slots: cp.ndarray, page_tables: cp.ndarray,
        out: cp.ndarray, rows: int,
    ) -> None:  # fmt: skip
        """Attention of many rows, those of a sequence side by side and in order; arguments as of `run`."""
        config = self._config
        blocks = -(-rows * self._group // self._prefill_m)
        splits = self._prefill_splits(blocks * config.n_kv_heads, rows * config.n_heads)
        self._prefill(
            (blocks, config.n_kv_heads, splits), (_THREADS,),
            (
                q, np.int32(rows), np.int32(config.n_kv_heads), np.int32(self._group), self._scale, positions, slots,
                *self._place(layer, page_tables), np.int32(splits), self._parts, self._states, out,
            ),
            shared_mem=self._prefill_shared,
        )  # fmt: skip
        if splits > 1:
            self._merge_parts(splits, positions, 0, out, rows)

    def _prefill_splits(self, blocks: int, heads: int) -> int:
        """Into how many shares contexts are cut so that the last wave of blocks leaves few places empty."""
        slots = self._prefill_slots
        most = max(1, min(_MAX_PREFILL_SPLITS, len(self._parts) // heads))

        def occupancy(splits: int) -> float:
            return blocks * splits / (-(-blocks * splits // slots) * slots)

        good = (splits for splits in range(1, most + 1) if occupancy(splits) >= _GOOD_OCCUPANCY)
        return next(good, None) or max(range(1, most + 1), key=occupancy)

    def _merge_parts(self, splits: int, positions: cp.ndarray, tiles: int, out: cp.ndarray, rows: int) -> None:
        config = self._config
        lanes = 32 if config.head_dim <= 128 else 64
        self._merge(
            (config.n_heads, rows), (lanes * min(splits, _MERGE_THREADS // lanes),),
            (
                self._parts, self._states, np.int32(config.head_dim), np.int32(splits), positions, np.int32(tiles),
                out,
            ),
            shared_mem=4 * splits,
        )  # fmt: skip

    def _place(self, layer: int, page_tables: cp.ndarray) -> tuple[Any, ...]:
        """What KV_PARAMETERS of `cuda/kv.cuh` stands for."""
        pool = self._pool
        return (
            np.uint64(pool.layer_address(layer)), np.int64(pool.page_bytes), np.int32(pool.head_bytes),
            np.int32(pool.key_bytes), page_tables, np.int32(page_tables.shape[1]),
        )  # fmt: skip


def _decode_shape(dim: int, heads8: int, widest: int) -> tuple[int, int]:
    """Tiles that a warp of decode takes at once and blocks on a multiprocessor, as registers allow.

    heads8: query heads of a block over 8. widest: bytes of a token's keys or values.
    """
    return 1 if widest >= 128 <= dim else 2, 1 if dim > 128 else 3 if heads8 == 1 else 2


def _code_bytes(kind: str, dim: int) -> int:
    """Bytes of a token's codes."""
    return dim * {"f16": 16, "q8_0": 8, "q4_0": 4}[kind] // 8
