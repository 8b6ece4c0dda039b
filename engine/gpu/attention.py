"""Attention on the GPU over pages of KV: rotary embedding, appending to the cache, decode, prefill.

Everything runs on the current stream and may be captured into a graph. What a row gives is the same bits
whatever the other rows of a decode step are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from numoe.engine.gpu import device
from numoe.engine.gpu.compiler import module
from numoe.engine.gpu.device import cupy
from numoe.engine.gpu.kv_pool import KINDS, GpuKvPool
from numoe.engine.gpu.launch import Kernel
from numoe.engine.gpu.widened import WidenedPages, widens
from numoe.engine.kv.pages import PAGE_TOKENS
from numoe.engine.models.config import ModelConfig
from numoe.engine.models.rope import rope_frequencies
from numoe.engine.scheduler import Batch
from numoe.engine.worker.kv_pool import F16, KvType

if TYPE_CHECKING:
    import cupy as cp

    from numoe.engine.gpu.step import StepInputs

DECODE_ROWS = 16
"""Rows that `decode` takes at a time."""

_THREADS = 128
_WARPS = 4
_MERGE_THREADS = 512
_MOST_SPLITS = 512
_MAX_PREFILL_SPLITS = 32
_GOOD_OCCUPANCY = 0.9


@dataclass(frozen=True)
class _Prefill:
    """A kernel whose blocks take `m` rows of queries; `blocks` of them run at once."""

    kernel: Kernel
    m: int
    shared_bytes: int
    blocks: int


class GpuAttention:
    """The attention of all layers of a model over a pool; `begin` once in a step, then `run` for each layer.

    max_rows, slots: rows and sequences of a step at most. max_pages: of a sequence. Buffers are those of one
    layer at a time, so all layers of a step must run on one stream.
    """

    def __init__(self, config: ModelConfig, pool: GpuKvPool, max_rows: int, slots: int, max_pages: int) -> None:
        self._config, self._pool, self._max_pages = config, pool, max_pages
        self._gpu = device.current()
        frequencies, magnitude = rope_frequencies(config.rope, np.float64)
        self._frequencies, self._magnitude = cupy().asarray(frequencies), float(magnitude)
        self._table = cupy().empty((max_rows, len(frequencies), 2), np.float32)
        self._group = config.n_heads // config.n_kv_heads
        self._scale = np.float32(math.log2(math.e) / math.sqrt(config.head_dim))
        self._load_kernels()
        self._widened = (
            WidenedPages(config, pool, slots, max_pages) if widens(config, pool.kind, max_rows) else None
        )
        self._prefill = self._load_prefill(pool.kind)
        self._prefill_f16 = self._prefill if self._widened is None else self._load_prefill(F16)
        at_once = max(kernel.blocks * kernel.m for kernel in (self._prefill, self._prefill_f16))
        parts = max(DECODE_ROWS * config.n_heads * self._splits, 3 * at_once)
        self._parts = cupy().empty((parts, config.head_dim), np.float32)
        self._states = cupy().empty((parts, 2), np.float32)

    def _load_kernels(self) -> None:
        config, dim, sms = self._config, self._config.head_dim, self._gpu.sms
        kinds = f"{KINDS[self._pool.kind.keys]}, {KINDS[self._pool.kind.values]}"
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
        self._splits = min(max(1, blocks), most, _MOST_SPLITS)

    def _load_prefill(self, kind: KvType) -> _Prefill:
        """The kernel of `prefill` for a type of the cache."""
        dim = self._config.head_dim
        old = self._gpu.capability < (8, 0)  # 64 KB of shared memory
        rows16, tokens = (2, 32 if old else 64) if dim <= 128 else (1, 16 if old else 32)
        name = f"prefill<{dim}, {KINDS[kind.keys]}, {KINDS[kind.values]}, {rows16}, {tokens}>"
        kernel, m = module("attention_prefill", name).get_function(name), 16 * rows16 * _WARPS
        raw = sum(tokens * (_code_bytes(of, dim) + dim // 16) for of in (kind.keys, kind.values) if of != "f16")
        shared = (m + 2 * tokens) * (2 * dim + 16) + raw
        kernel.allow_shared_memory(shared)
        room = int(cupy().cuda.Device().attributes["MaxSharedMemoryPerMultiprocessor"])
        return _Prefill(kernel, m, shared, self._gpu.sms * min(2 if dim <= 128 else 1, room // (shared + 1024)))

    def plan(self, batch: Batch, decode_rows: int) -> None:
        """A step of many rows begins, the first `decode_rows` of which take the way of `decode`."""
        if self._widened is not None:
            self._widened.plan(batch, decode_rows)

    def begin(self, positions: cp.ndarray, rows: int) -> None:
        """Compute the rotary table of a step's rows; positions int32 [rows]."""
        half = len(self._frequencies)
        self._rope_table(
            (-(-rows * half // _THREADS),), (_THREADS,),
            (self._frequencies, np.int32(half), np.float64(self._magnitude), positions, np.int32(rows), self._table),
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
                positions, slots, *self._pool.place(layer, page_tables),
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
                *self._pool.place(layer, page_tables), splits, self._parts, self._states,
            ),
        )  # fmt: skip
        self._merge_parts(self._splits, positions, self._decode_tiles, out, rows)

    def prefill(
        self, layer: int, q: cp.ndarray, positions: cp.ndarray, slots: cp.ndarray, page_tables: cp.ndarray,
        out: cp.ndarray, rows: int,
    ) -> None:  # fmt: skip
        """Attention of many rows, those of a sequence side by side and in order; arguments as of `run`.

        Those of a step that `plan` has been told of, if any.
        """
        config, prefill, place = self._config, self._prefill, self._pool.place(layer, page_tables)
        if self._widened:
            self._widened.widen(layer)
            prefill, place = self._prefill_f16, self._widened.place()
        blocks = -(-rows * self._group // prefill.m)
        splits = self._prefill_splits(blocks * config.n_kv_heads, rows * config.n_heads, prefill.blocks)
        prefill.kernel(
            (blocks, config.n_kv_heads, splits), (_THREADS,),
            (
                q, np.int32(rows), np.int32(config.n_kv_heads), np.int32(self._group), self._scale, positions, slots,
                *place, np.int32(splits), self._parts, self._states, out,
            ),
            shared_mem=prefill.shared_bytes,
        )  # fmt: skip
        if splits > 1:
            self._merge_parts(splits, positions, 0, out, rows)

    def _prefill_splits(self, blocks: int, heads: int, at_once: int) -> int:
        """Into how many shares contexts are cut so that the last wave of blocks leaves few places empty."""
        most = max(1, min(_MAX_PREFILL_SPLITS, len(self._parts) // heads))

        def occupancy(splits: int) -> float:
            return blocks * splits / (-(-blocks * splits // at_once) * at_once)

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
        )  # fmt: skip


def _decode_shape(dim: int, heads8: int, widest: int) -> tuple[int, int]:
    """Tiles that a warp of decode takes at once and blocks on a multiprocessor, as registers allow.

    heads8: query heads of a block over 8. widest: bytes of a token's keys or values.
    """
    return 1 if widest >= 128 <= dim else 2, 1 if dim > 128 else 3 if heads8 == 1 else 2


def _code_bytes(kind: str, dim: int) -> int:
    """Bytes of a token's codes."""
    return dim * {"f16": 16, "q8_0": 8, "q4_0": 4}[kind] // 8
