"""The test stand of `numoe bench kernels`: a buffer of weights, activation rows, and threads."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import numpy as np
from gguf import GGMLQuantizationType as QuantType

from numoe.deploy.commands.bench import loops
from numoe.engine.cpu.memory import address, aligned_bytes
from numoe.engine.cpu.products import product_kernel
from numoe.engine.cpu.reading import READ_STEP_BYTES, read
from numoe.engine.cpu.rows import activation_bytes, quantize_row
from numoe.engine.errors import ResourceError
from numoe.engine.formats import GROUP_ROWS, shape_of

COLS = 2048
_MOST_MACS = 20e9
"""Multiply-adds of one measurement at most: many rows take a part of the buffer."""
_PEAK_ROUNDS = 200_000
_GUARD_BYTES = 1 << 16
"""Behind the buffer, as kernels prefetch."""


class Stand:
    """A buffer of `nbytes`, `rows` activation rows of each kind, and `threads` threads.

    Its bytes are from 0x2c to 0x3b: read as float16, bfloat16 or float32, at any place, they are
    normal numbers, and so they are packed weights of every format. Speeds do not depend on values.
    """

    def __init__(self, nbytes: int, threads: int, rows: int) -> None:
        self._threads = threads
        self.nbytes = nbytes // (threads * READ_STEP_BYTES) * threads * READ_STEP_BYTES
        if self.nbytes < 16 * loops.OPERAND_BYTES:
            raise ResourceError(f"a buffer of {nbytes} bytes is too small for {threads} threads")
        generator = np.random.default_rng(0)
        self._buffer = aligned_bytes(self.nbytes + _GUARD_BYTES)
        pattern = generator.integers(0x2C, 0x3C, min(len(self._buffer), 1 << 20), np.uint8)
        for start in range(0, len(self._buffer), len(pattern)):
            part = self._buffer[start : start + len(pattern)]
            part[:] = pattern[: len(part)]
        self.weights = address(self._buffer)
        self._outs = aligned_bytes(threads * rows * 4 * GROUP_ROWS * loops.PRODUCT_GROUPS)
        self.pointers = self._activations(generator.standard_normal((rows, COLS)).astype(np.float32))
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="numoe-bench")
        out = address(self._outs)
        read(self.weights, READ_STEP_BYTES)
        loops.dots(1, self.weights, out)
        loops.fmas(1, self.weights, out)

    def _activations(self, x: np.ndarray) -> dict[str, np.ndarray]:
        """Pointer tables of the rows `x`, float32 [rows, COLS], in the forms that products read."""
        stride = activation_bytes(COLS, "q8")
        self._rows = {"f32": x, "q8": aligned_bytes(len(x) * stride)}
        pointers = {
            kind: address(self._rows[kind]) + step * np.arange(len(x), dtype=np.int64)
            for kind, step in (("q8", stride), ("f32", x.strides[0]))
        }
        for source, target in zip(pointers["f32"], pointers["q8"], strict=True):
            quantize_row(int(source), COLS, int(target))
        return pointers

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown()

    def read(self) -> float:
        """Bytes a second of reading the whole buffer."""
        share = self.nbytes // self._threads
        return self.nbytes / self.timed(lambda i: read(self.weights + i * share, share))

    def peak(self, activations: str) -> float:
        """Multiply-adds a second of registers alone: of integers for "q8", of float32 for "f32"."""
        loop, macs = (loops.dots, loops.DOTS_MACS) if activations == "q8" else (loops.fmas, loops.FMAS_MACS)
        taken = self.timed(lambda i: loop(_PEAK_ROUNDS, self.weights, self.out(i)))
        return self._threads * _PEAK_ROUNDS * macs / taken

    def out(self, thread: int) -> int:
        """The address of a thread's results."""
        return address(self._outs) + thread * (len(self._outs) // self._threads)

    def timed(self, work: Callable[[int], Any]) -> float:
        """Seconds until `work(thread)` is done on all threads."""
        start = time.perf_counter()
        list(self._pool.map(work, range(self._threads)))
        return time.perf_counter() - start

    def split(self, count: int, thread: int) -> tuple[int, int]:
        """The part of `count` items that falls to a thread."""
        return count * thread // self._threads, count * (thread + 1) // self._threads

    def products(self, qtype: QuantType) -> Products:
        """The products of a format over the buffer; compiles its kernel if need be."""
        return Products(self, qtype)


class Products:
    """The buffer as one matrix [16 x groups, COLS] of a format."""

    def __init__(self, stand: Stand, qtype: QuantType) -> None:
        group = shape_of(qtype, GROUP_ROWS, COLS)
        self._stand, self._kernel, self._blocks = stand, int(product_kernel(qtype).address), group.blocks
        self._group_bytes, self._groups = group.group_bytes, stand.nbytes // group.group_bytes
        self.activations = group.format.activations
        self.bytes_per_weight = group.group_bytes / (GROUP_ROWS * COLS)
        self._next = 0
        if self._groups == 0:
            raise ResourceError(f"the buffer does not hold {group.group_bytes} bytes of {qtype.name}")
        self.run(1)

    def run(self, rows: int) -> float:
        """Multiply-adds a second for `rows` rows; a part of the buffer starts where the last one ended."""
        macs = rows * GROUP_ROWS * COLS
        count = max(1, min(self._groups, int(_MOST_MACS / macs)))
        start = self._next if self._next + count <= self._groups else 0
        self._next = start + count
        pointers = address(self._stand.pointers[self.activations])

        def work(thread: int) -> None:
            first, last = self._stand.split(count, thread)
            loops.products(
                self._kernel, self._stand.weights, start + first, start + last, self._group_bytes, self._blocks,
                pointers, rows, self._stand.out(thread),
            )  # fmt: skip

        return count * macs / self._stand.timed(work)
