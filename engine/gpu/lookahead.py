"""What the GPU does while the shards work: it brings what it will read next to its second-level cache.

A layer's experts take the shards many times as long as its attention takes the GPU, which waits meanwhile,
its memory idle. So the next layer's weights, and as much of its keys and values as there is room for, are
fetched then, and found in the cache a moment later.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from numoe.engine.gpu.compiler import module
from numoe.engine.gpu.device import cupy, current
from numoe.engine.gpu.kv_pool import GpuKvPool
from numoe.engine.gpu.matrices import GpuMatrix

if TYPE_CHECKING:
    from numoe.engine.gpu.step import StepInputs

_THREADS, _MOST_RANGES, _PIECE = 256, 8, 4096
_SHARE = 0.8
"""Of the cache, for what is fetched ahead."""

_RANGES = np.dtype([("start", "u8", _MOST_RANGES), ("bytes", "i8", _MOST_RANGES), ("count", "i8")])
_PARTS = np.dtype([("offset", "i4", 4), ("token_bytes", "i4", 4), ("count", "i8")])


class Lookahead:
    """Fetches weights, and keys and values of a pool, to the current device's second-level cache."""

    def __init__(self, pool: GpuKvPool, kv_heads: int) -> None:
        self._pool, self._kv_heads, self._blocks = pool, kv_heads, current().sms
        self._budget = int(_SHARE * cupy().cuda.Device().attributes["L2CacheSize"]) // _PIECE * _PIECE
        self._kernel = module("lookahead").get_function("look_ahead")
        self._parts = np.zeros((), _PARTS)
        parts = pool.token_parts()
        self._parts["count"] = len(parts)
        for i, part in enumerate(parts):
            self._parts["offset"][i], self._parts["token_bytes"][i] = part

    def run(self, matrices: Sequence[GpuMatrix], layer: int | None, inputs: StepInputs, rows: int) -> None:
        """Start to fetch matrices, the first one first, then what the step's rows attend to in a layer of the pool."""
        ranges, pool = np.zeros((), _RANGES), self._pool
        ranges["count"] = len(matrices)
        for i, matrix in enumerate(matrices):
            ranges["start"][i], ranges["bytes"][i] = matrix.data.data.ptr, matrix.nbytes // 16 * 16
        kv_heads = 0 if layer is None else self._kv_heads
        arguments: tuple[Any, ...] = (
            ranges, self._parts, np.int64(self._budget), np.int32(kv_heads), np.int32(rows), inputs.positions,
            inputs.slots, *pool.place(layer or 0, inputs.page_tables),
        )  # fmt: skip
        self._kernel((self._blocks,), (_THREADS,), arguments)
