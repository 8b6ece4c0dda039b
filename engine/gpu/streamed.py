"""Routed experts of many rows on the GPU: weights streamed from the shards' shared memory, and multiplied there.

A step of thousands of rows uses every expert of a layer. Then it is faster to bring the weights to the
GPU, whose arithmetic is far ahead of the CPU's, than the rows to the CPU. Each *portion*, some experts of
one layer, is copied into one of a ring of buffers by a stream of its own, several ahead of the one
that is being multiplied, also across layers, so that the copies never stop.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from numoe.engine.cpu.memory import address, align
from numoe.engine.experts.shard import ExpertMatrices, ShardSlice, plan_slice
from numoe.engine.formats import BLOCK_COLS
from numoe.engine.gguf import GgufFile
from numoe.engine.gpu.compiler import module
from numoe.engine.gpu.device import cupy
from numoe.engine.gpu.pairs import ExpertPairs, portion_experts
from numoe.engine.gpu.registered import RegisteredMemory, split
from numoe.engine.models.config import ModelConfig
from numoe.engine.weights import WeightSlice, linked

if TYPE_CHECKING:
    import cupy as cp

RING = 6
"""Buffers for portions: one that is multiplied, the rest on their way."""
_THREADS = 256
_HOST_TO_DEVICE = 1


@dataclass(frozen=True)
class _Portion:
    """Experts `first` to `last` of a layer."""

    layer: int
    first: int
    last: int


class StreamedExperts:
    """The experts of the layers that shards hold, multiplied in `pairs`.

    folder: of the server, with links to the shards' slices. cuts: what each of them holds; slices: how that lies
    there, for each. beside: the slices' memory is pinned beside everything else, whoever needs it waits.
    """

    def __init__(
        self, config: ModelConfig, folder: Path, cuts: Sequence[ShardSlice],
        slices: Sequence[dict[int, list[ExpertMatrices]]], pairs: ExpertPairs, *, beside: bool,
    ) -> None:  # fmt: skip
        assert config.moe is not None
        self._config, self._moe, self._pairs, self._slices = config, config.moe, pairs, slices
        self._ranges = [cut.blocks(config.moe.ffn) for cut in cuts]
        self._segments = [WeightSlice.open(linked(folder, cut.name), writable=True) for cut in cuts]
        pool = ThreadPoolExecutor(1, "numoe-pin")
        self._pinning = pool.submit(self._pin, int(cupy().cuda.Device().id))
        pool.shutdown(wait=False)
        if not beside:
            self._pinning.result()
        self._packed_bytes = _packed_bytes(self._slices, pairs.portion)
        self._portions = [
            _Portion(layer, first, min(first + pairs.portion, config.moe.n_experts))
            for layer in self._slices[0]
            for first in range(0, config.moe.n_experts, pairs.portion)
        ]
        self._ring = [cupy().empty(self._packed_bytes, np.uint8) for _ in range(RING)]
        self._unpackers = module("packed")
        self._copies = cupy().cuda.Stream(non_blocking=True)
        self._copied = [cupy().cuda.Event(disable_timing=True) for _ in range(RING)]
        self._free = [cupy().cuda.Event(disable_timing=True) for _ in range(RING)]
        self._started = self._done = 0

    def _pin(self, device: int) -> list[RegisteredMemory]:
        with cupy().cuda.Device(device):
            return [RegisteredMemory(segment.array) for segment in self._segments]

    def layer_seconds(self) -> float:
        """How long the copies of a layer take, measured with one portion."""
        self._pinning.result()
        pieces = self._pieces(self._portions[0])
        best = np.inf
        for _ in range(3):
            start = time.perf_counter()
            self._copy(pieces, 0)
            self._copies.synchronize()
            best = min(best, time.perf_counter() - start)
        layer = self._portions[0].layer
        total = sum(m.nbytes for plan in self._slices for m in plan[layer])
        return best * total / sum(nbytes for _, _, nbytes in pieces)

    def begin(self) -> None:
        """A step begins: the first portions set out."""
        self._pinning.result()
        self._started = self._done = 0
        self._start_copies()

    def run(self, x: cp.ndarray, normed: cp.ndarray, logits: cp.ndarray, rows: int) -> None:
        """x += the experts of the next layer, applied to its rows.

        x, normed: float32 [rows, hidden]; logits: the router's, float32 [rows, experts].
        Waits for the routing to be known on the host.
        """
        pairs = self._pairs
        pairs.route(logits, rows)
        offsets = pairs.group(normed, rows)
        layer = self._portions[self._done].layer
        while self._done < len(self._portions) and self._portions[self._done].layer == layer:
            self._multiply(self._done, offsets)
            self._done += 1
            self._start_copies()
        pairs.combine(x, rows, grouped=True)

    # --- copies -----------------------------------------------------------------------------------

    def _start_copies(self) -> None:
        """Start the copies of as many portions as there are free buffers."""
        while self._started < min(self._done + RING, len(self._portions)):
            slot = self._started % RING
            if self._started >= RING:
                self._copies.wait_event(self._free[slot])
            self._copy(self._pieces(self._portions[self._started]), slot)
            self._copied[slot].record(self._copies)
            self._started += 1

    def _copy(self, pieces: list[tuple[int, int, int]], slot: int) -> None:
        """Copy pieces of host memory one behind the other into a buffer of the ring."""
        at = self._ring[slot].data.ptr
        for start, offset, nbytes in pieces:
            source = start + offset
            for part, length in split(start, source, nbytes):
                to = at + part - source
                cupy().cuda.runtime.memcpyAsync(to, part, length, _HOST_TO_DEVICE, self._copies.ptr)
            at += align(nbytes)

    def _pieces(self, portion: _Portion) -> list[tuple[int, int, int]]:
        """Of each piece of a portion, for each shard gate, up and down: its slice's address, offset and bytes."""
        return [
            (address(segment.array), m.offset + portion.first * m.shape.nbytes, _bytes_of(m, portion))
            for segment, plan in zip(self._segments, self._slices, strict=True)
            for m in plan[portion.layer]
        ]

    # --- products ---------------------------------------------------------------------------------

    def _multiply(self, number: int, offsets: list[int]) -> None:
        """The products of a portion's experts with their rows."""
        portion, slot = self._portions[number], number % RING
        stream = cupy().cuda.get_current_stream()
        stream.wait_event(self._copied[slot])
        self._unpack(portion, self._ring[slot].data.ptr)
        self._free[slot].record(stream)
        self._pairs.multiply(portion.first, portion.last, offsets)

    def _unpack(self, portion: _Portion, at: int) -> None:
        """A portion's packed weights to float16: gate above up [2 ffn, hidden], down [hidden, ffn]."""
        ffn, hidden = self._moe.ffn, self._config.hidden
        gate_up, down = self._pairs.gate_up.data.ptr, self._pairs.down.data.ptr
        for plan, (start, _) in zip(self._slices, self._ranges, strict=True):
            row = BLOCK_COLS * start
            places = (
                (gate_up + 2 * row * hidden, 2 * ffn * hidden, hidden),
                (gate_up + 2 * (ffn + row) * hidden, 2 * ffn * hidden, hidden),
                (down + 2 * row, hidden * ffn, ffn),
            )
            for m, (out, out_stride, row_stride) in zip(plan[portion.layer], places, strict=True):
                self._unpack_matrices(m, portion.last - portion.first, at, out, out_stride, row_stride)
                at += align(_bytes_of(m, portion))

    def _unpack_matrices(
        self, m: ExpertMatrices, experts: int, at: int, out: int, out_stride: int, row_stride: int
    ) -> None:
        shape = m.shape
        if shape.nbytes == 0:
            return
        self._unpackers.get_function(f"unpack_{shape.format.name}")(
            (-(-shape.groups * shape.blocks // 8), experts), (_THREADS,),
            (
                np.uint64(at), np.int64(shape.nbytes), np.int32(shape.groups), np.int32(shape.blocks),
                np.int32(shape.phase), np.int32(shape.format.tile_bytes), np.int32(shape.format.super_bytes),
                np.int64(shape.group_bytes), np.uint64(out), np.int64(out_stride), np.int64(row_stride),
            ),
        )  # fmt: skip

    def close(self) -> None:
        """Give the shards' memory back to the host alone."""
        self._copies.synchronize()
        for memory, segment in zip(self._pinning.result(), self._segments, strict=True):
            memory.close()
            segment.close()


def _bytes_of(m: ExpertMatrices, portion: _Portion) -> int:
    return (portion.last - portion.first) * m.shape.nbytes


def _packed_bytes(slices: Sequence[dict[int, list[ExpertMatrices]]], experts: int) -> int:
    """Bytes of the largest portion of so many experts."""
    of_expert = max(sum(m.shape.nbytes for plan in slices for m in plan[layer]) for layer in slices[0])
    return experts * of_expert + len(slices) * 3 * align(1)


def ring_bytes(config: ModelConfig, gguf: GgufFile, cuts: Sequence[ShardSlice]) -> int:
    """Bytes of VRAM that `StreamedExperts` takes besides `ExpertPairs`."""
    if config.moe is None or not cuts:
        return 0
    slices = [plan_slice(config, gguf, cut) for cut in cuts]
    return RING * _packed_bytes(slices, portion_experts(config.moe, gguf))
