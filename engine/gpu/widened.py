"""Quantized keys and values as float16, a layer at a time, while a long prompt is read.

The blocks of a prefill take a few rows each, and each converts all codes that it attends to: more rows, more
conversions of the same codes. From WIDEN_ROWS rows of queries on, the pages of the step's prompts are converted once
a layer instead, into a pool of their own, and the kernel for float16 reads that.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from numoe.engine.gpu.compiler import module
from numoe.engine.gpu.device import cupy
from numoe.engine.gpu.kv_pool import KINDS, GpuKvPool
from numoe.engine.kv.pages import pages_for
from numoe.engine.models.config import ModelConfig
from numoe.engine.scheduler import Batch
from numoe.engine.worker.kv_pool import F16, KvType

WIDEN_ROWS = 1024
"""Rows of queries, those of all query heads of a KV head counted, from which on converting pays."""
_THREADS = 256


class WidenedPages:
    """A pool for one layer's float16 pages of the prompts in a step: up to `max_pages` of them.

    slots: of a step at most. `plan` belongs to a step, `widen` to each of its layers.
    """

    def __init__(self, config: ModelConfig, pool: GpuKvPool, slots: int, max_pages: int) -> None:
        import cupyx

        self._source, self._group = pool, config.n_heads // config.n_kv_heads
        self._pool = GpuKvPool(replace(config, n_layers=1), max_pages, F16)
        self._heads, self._count = config.n_kv_heads, 0
        kernel = f"widen<{config.head_dim}, {KINDS[pool.kind.keys]}, {KINDS[pool.kind.values]}>"
        self._widen = module("attention_widen", kernel).get_function(kernel)
        self._host = cupyx.zeros_pinned(max_pages + slots * max_pages, np.int32)
        self._device = cupy().zeros(len(self._host), np.int32)
        self._host_sources, host_tables = np.split(self._host, [max_pages])
        self._host_tables: npt.NDArray[np.int32] = host_tables.reshape(slots, max_pages)
        self._sources = self._device[:max_pages]
        self._tables = self._device[max_pages:].reshape(slots, max_pages)

    def plan(self, batch: Batch, first: int) -> None:
        """Choose the pages of a step, rows from `first` on being of prompts, if converting them pays and they fit."""
        self._count = 0
        slots, positions = batch.slots[first:], batch.positions[first:]
        if len(slots) * self._group < WIDEN_ROWS:
            return
        lasts = [*np.flatnonzero(slots[1:] != slots[:-1]), len(slots) - 1]
        counts = [pages_for(int(positions[last]) + 1) for last in lasts]
        if sum(counts) > len(self._host_sources):
            return
        for last, count in zip(lasts, counts, strict=True):
            places = slice(self._count, self._count + count)
            self._host_sources[places] = batch.page_tables[slots[last], :count]
            self._host_tables[slots[last], :count] = np.arange(places.start, places.stop)
            self._count = places.stop
        self._device.data.copy_from_host_async(self._host.ctypes.data, self._host.nbytes)

    def __bool__(self) -> bool:
        """Whether the step's prompts are read from here."""
        return self._count > 0

    def widen(self, layer: int) -> None:
        """Convert the chosen pages of a layer."""
        source = self._source
        self._widen(
            (self._count, self._heads, 2), (_THREADS,),
            (
                np.uint64(source.layer_address(layer)), np.int64(source.page_bytes), np.int32(source.head_bytes),
                np.int32(source.key_bytes), self._sources, self._pool.data,
            ),
        )  # fmt: skip

    def place(self) -> tuple[Any, ...]:
        """What KV_PARAMETERS of `cuda/kv.cuh` stands for."""
        return self._pool.place(0, self._tables)


def widens(config: ModelConfig, kind: KvType, max_rows: int) -> bool:
    """Whether steps of up to so many rows ever read pages made float16."""
    return kind != F16 and max_rows * (config.n_heads // config.n_kv_heads) >= WIDEN_ROWS


def widened_bytes(config: ModelConfig, kind: KvType, max_rows: int, max_pages: int) -> int:
    """Bytes of VRAM that the float16 pages take."""
    return GpuKvPool.nbytes(replace(config, n_layers=1), max_pages, F16) if widens(config, kind, max_rows) else 0
