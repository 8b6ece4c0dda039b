"""Operations on rows of activations, float32 [rows, cols] in VRAM, on the current stream (`cuda/rows.cu`).

`rows` is how many of an array's rows are meant. 8-bit rows for the shards are made in `cuda/exchange.cu`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from numoe.engine.gpu.compiler import module

if TYPE_CHECKING:
    import cupy as cp

_THREADS, _ARGMAX_THREADS = 512, 1024

MOST_LISTED = 1024
"""Tokens of a row that `shortlist` writes at most."""


def _launch(kernel: str, blocks: int, *args: Any, threads: int = _THREADS) -> None:
    if blocks:
        module("rows").get_function(kernel)((blocks,), (threads,), args)


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


def argmax(logits: cp.ndarray, ids: Any, largest: Any, rows: int) -> None:
    """ids[i] = the id of the largest of logits[i], the lowest of equals; largest[i] = that logit, NaN where any is.

    ids: int32 [rows]; largest: float32 [rows]; arrays, or addresses that the GPU can write to.
    """
    _launch("argmax", rows, logits, np.int32(logits.shape[1]), ids, largest, threads=_ARGMAX_THREADS)


def shortlist(logits: cp.ndarray, counts: Any, ids: Any, values: Any, totals: Any, rows: int) -> None:
    """The largest logits of each row, 256 or a few more, in no order, and the sum of exp(logit - largest) over all.

    counts: int32 [rows], how many; of more than MOST_LISTED (many equals) not all are there. ids: int32 and
    values: float32 [rows, MOST_LISTED]. totals: float64 [rows]. Arrays, or addresses that the GPU can write to.
    """
    arguments = (logits, np.int32(logits.shape[1]), counts, ids, values, totals)
    _launch("shortlist", rows, *arguments, threads=_ARGMAX_THREADS)
