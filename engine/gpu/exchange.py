"""The GPU's side of the mailbox: routing, asking the shards, adding up their answers (`cuda/exchange.cu`).

The mailbox is host memory that CUDA has mapped, so that kernels read and write it themselves: between
two layers of a step no thread of the host runs. Shards spin while a step is under way, because a GPU
cannot wake a sleeper.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from numoe.engine.cpu.rows import activation_bytes
from numoe.engine.experts.mailbox import REQUEST_SEQUENCE, SHARDS_AT, Mailbox
from numoe.engine.gpu.compiler import module
from numoe.engine.gpu.device import cupy
from numoe.engine.gpu.registered import RegisteredMemory
from numoe.engine.models.config import MoeConfig

if TYPE_CHECKING:
    import cupy as cp

_THREADS, _SEND_THREADS, _WARP = 512, 1024, 32
_FUSED_ROWS = 16
"""Rows up to which each row's block waits for the shards itself."""

WORDS = np.dtype([
    ("sequence", "u4"), ("failed", "u4"), ("arrived", "u4"), ("unused", "u4"),
    ("published", "u8"), ("experts", "u8"), ("wait", "u8"),
])  # fmt: skip
"""`Words` of exchange.cu: experts and wait are nanoseconds, added up over a step's layers."""

_MAILBOX = np.dtype([
    ("request", "u8"), ("replies", "u8"), ("ids", "u8"), ("weights", "u8"), ("q8_rows", "u8"), ("f32_rows", "u8"),
    ("partials", "u8"), ("q8_stride", "i8"), ("f32_stride", "i8"), ("partial_stride", "i8"), ("shards", "i8"),
])  # fmt: skip


class GpuExchange:
    """Hands rows of a layer to the shards and adds their partial sums to the residual stream.

    reads_f32: whether any shard's weights are multiplied with float32 rows. bound_s: how long a shard
    may show no sign of life.
    """

    def __init__(self, mailbox: Mailbox, moe: MoeConfig, *, reads_f32: bool, bound_s: float) -> None:

        self._mailbox, self._moe, self._bound = mailbox, moe, np.int64(bound_s * 1e9)
        self._memory = RegisteredMemory(mailbox.segment.array)
        layout, base = mailbox.layout, self._memory.device_address
        self._hidden = layout.hidden
        box = np.zeros((), _MAILBOX)
        box["request"], box["replies"] = base + REQUEST_SEQUENCE, base + SHARDS_AT
        box["ids"], box["weights"] = base + layout.ids, base + layout.weights
        box["q8_rows"], box["f32_rows"] = base + layout.q8_rows, base + layout.f32_rows if reads_f32 else 0
        box["partials"], box["shards"] = base + layout.partials, layout.shards
        box["q8_stride"] = activation_bytes(layout.hidden, "q8")
        box["f32_stride"] = activation_bytes(layout.hidden, "f32")
        box["partial_stride"] = layout.max_rows * layout.hidden
        self._box = box
        self.words = cupy().zeros(WORDS.itemsize, np.uint8)
        start = np.zeros((), WORDS)
        start["sequence"] = mailbox.segment.array[REQUEST_SEQUENCE : REQUEST_SEQUENCE + 4].view(np.uint32)[0]
        self.words.set(np.frombuffer(start.tobytes(), np.uint8))
        kernels = module("exchange")
        self._begin, self._send = kernels.get_function("begin"), kernels.get_function("send")
        self._receive, self._wait = kernels.get_function("receive"), kernels.get_function("wait")

    def begin(self) -> None:
        """Forget the failure and the times of the step before."""
        self._begin((1,), (1,), (self.words,))

    def send(self, normed: cp.ndarray, logits: cp.ndarray, rows: int, layer: int) -> None:
        """Route the rows and publish the request.

        normed: float32 [rows, hidden]. logits: the router's, float32 [rows, experts], by the kernel launched last,
        which must have been told `share_x`.
        """
        moe = self._moe
        self._send(
            (rows,), (_SEND_THREADS,),
            (
                normed, np.int32(self._hidden), logits, np.int32(moe.n_experts), np.int32(moe.n_used),
                np.int32(moe.normalize_weights), np.float32(moe.weights_scale), self._box, self.words, np.uint32(layer),
            ),
            shared_mem=self._hidden // 32 * 48 + 4 * (moe.n_experts + 2 * moe.n_used),
        )  # fmt: skip

    def receive(self, x: cp.ndarray, rows: int) -> None:
        """Wait for every shard and add the partial sums to x, float32 [rows, hidden]."""
        if rows > _FUSED_ROWS:
            self._wait((1,), (max(_WARP, self._mailbox.layout.shards),), (self._box, self.words, self._bound))
        arguments = (x, np.int32(self._hidden), self._box, self.words, self._bound)
        self._receive((rows,), (_THREADS + _WARP,), arguments)

    def close(self) -> None:
        """Give the mailbox's memory back to the host alone."""
        self._memory.close()
