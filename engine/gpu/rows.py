"""Operations on rows of activations, float32 [rows, cols] in VRAM, on the current stream (`cuda/rows.cu`).

`rows` is how many of an array's rows are meant. 8-bit rows for the shards are made in `cuda/exchange.cu`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from numoe.engine.gpu.compiler import module

if TYPE_CHECKING:
    import cupy as cp

_THREADS = 512


def _launch(kernel: str, blocks: int, *args: Any) -> None:
    if blocks:
        module("rows").get_function(kernel)((blocks,), (_THREADS,), args)


def rms_norm(x: cp.ndarray, weight: cp.ndarray, eps: float, out: cp.ndarray, rows: int) -> None:
    """out = x / sqrt(mean(x^2) + eps) * weight. weight: float32 [cols]; out may be x; cols a multiple of 4."""
    _launch("rms_norm", rows, x, weight, np.float32(eps), np.int32(x.shape[1]), out)


def swiglu(gate: cp.ndarray, up: cp.ndarray, out: cp.ndarray, rows: int) -> None:
    """out = silu(gate) * up. out may be gate or up; cols a multiple of 4."""
    count = rows * gate.shape[1]
    _launch("swiglu", -(-count // (4 * _THREADS)), gate, up, np.int64(count), out)


def gather(x: cp.ndarray, indices: cp.ndarray, out: cp.ndarray, rows: int) -> None:
    """out[i] = x[indices[i]] for i < rows. indices: int32; cols a multiple of 4."""
    _launch("gather", rows, x, indices, np.int32(x.shape[1]), out)
