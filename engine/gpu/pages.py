"""The GPU's KV pages in canonical bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from queue import SimpleQueue
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from numoe.engine.cpu import portable
from numoe.engine.cpu.memory import address
from numoe.engine.gpu.device import cupy
from numoe.engine.gpu.kv_pool import GpuKvPool
from numoe.engine.models.config import ModelConfig
from numoe.engine.store.chunks import ChunkShape
from numoe.engine.store.portable import addresses, check_layers, chunk_shape, layers_within

if TYPE_CHECKING:
    from typing_extensions import Buffer

_LANES = 4
"""Threads that can move pages at once; more take turns."""
_BUFFERS = 2
_BUFFER_BYTES = 8 << 20
_DEFAULT_COPY = 4  # cudaMemcpyDefault: addresses tell which way


class GpuPages:
    """The `PagePort` of a `GpuKvPool` on the current device.

    Layers pass, a few at a time, through pinned memory that is there from the start, where the host
    converts them; the GPU only copies, on streams of its own. So nothing is allocated, and nobody waits for
    a stream on which steps run or are captured.
    """

    def __init__(self, config: ModelConfig, pool: GpuKvPool) -> None:
        portable.prepare(portable.transfer_interleaved)
        self._config, self._pool = config, pool
        self._device = cupy().cuda.Device()
        kinds = (pool.kind.keys, pool.kind.values)
        self._record = portable.page_record(config.n_kv_heads, config.head_dim, kinds, pool.key_bytes, pool.head_bytes)
        at_once = max(1, _BUFFER_BYTES // pool.layer_bytes)
        self._parts = [
            range(first, min(first + at_once, config.n_layers)) for first in range(0, config.n_layers, at_once)
        ]
        self._lanes: SimpleQueue[_Lane] = SimpleQueue()
        for _ in range(_LANES):
            self._lanes.put(_Lane(len(self._parts[0]) * pool.layer_bytes))

    def shape(self, tokens: int) -> ChunkShape:
        """As `PagePort.shape`."""
        return chunk_shape(self._config, self._pool.kind, tokens)

    def export_page(
        self, page: int, tokens: int, out: npt.NDArray[np.uint8] | None = None
    ) -> list[npt.NDArray[np.uint8]]:
        """As `PagePort.export_page`."""
        place, layers = self._place(page), layers_within(out, self.shape(tokens))
        with self._lane() as lane:
            self._start_export(lane, place, 0)
            for number in range(len(self._parts)):
                if number + 1 < len(self._parts):
                    self._start_export(lane, place, number + 1)
                lane.wait(number)
                self._convert(lane, number, layers, tokens, to_page=False)
        return layers

    def import_page(self, page: int, layers: Sequence[Buffer], tokens: int) -> None:
        """As `PagePort.import_page`."""
        place, arrays = self._place(page), check_layers(layers, self.shape(tokens))
        with self._lane() as lane:
            for number, part in enumerate(self._parts):
                lane.wait(number)  # for the copy from this buffer before
                self._convert(lane, number, arrays, tokens, to_page=True)
                nbytes = len(part) * self._pool.layer_bytes
                lane.copy(place + part.start * self._pool.layer_bytes, lane.address(number), nbytes, number)

    def copy_page(self, source: int, target: int) -> None:
        """As `PagePort.copy_page`."""
        places = self._place(target), self._place(source)
        with self._lane() as lane:
            lane.copy(*places, self._pool.page_bytes, 0)

    def _place(self, page: int) -> int:
        """The address of a page."""
        return int(self._pool.data[page].data.ptr)

    @contextmanager
    def _lane(self) -> Iterator[_Lane]:
        """A lane for this thread alone; all of its copies are done afterwards."""
        lane = self._lanes.get()
        try:
            with self._device:
                try:
                    yield lane
                finally:
                    for number in range(_BUFFERS):
                        lane.wait(number)
        finally:
            self._lanes.put(lane)

    def _start_export(self, lane: _Lane, place: int, number: int) -> None:
        part, layer_bytes = self._parts[number], self._pool.layer_bytes
        lane.copy(lane.address(number), place + part.start * layer_bytes, len(part) * layer_bytes, number)

    def _convert(
        self, lane: _Lane, number: int, layers: Sequence[npt.NDArray[np.uint8]], tokens: int, *, to_page: bool
    ) -> None:
        """Between a buffer and the canonical bytes of the layers that it holds."""
        part = self._parts[number]
        rows = addresses(layers[part.start : part.stop])
        portable.transfer_interleaved(
            address(self._record), lane.address(number), address(rows), len(part), tokens, int(to_page)
        )


class _Lane:
    """A stream and the pinned buffers that it copies to and from; buffer `number` is one of `_BUFFERS` in turns."""

    def __init__(self, buffer_bytes: int) -> None:
        import cupyx

        cuda = cupy().cuda
        self._stream = cuda.Stream(non_blocking=True)
        self._buffers = [cupyx.empty_pinned(buffer_bytes, np.uint8) for _ in range(_BUFFERS)]
        # Blocking events: who waits for one sleeps, and leaves the core to a step.
        self._copied = [cuda.Event(block=True, disable_timing=True) for _ in range(_BUFFERS)]

    def address(self, number: int) -> int:
        """Of a buffer."""
        return address(self._buffers[number % _BUFFERS])

    def copy(self, target: int, source: int, nbytes: int, number: int) -> None:
        """Start a copy, for which `wait(number)` waits."""
        cupy().cuda.runtime.memcpyAsync(target, source, nbytes, _DEFAULT_COPY, self._stream.ptr)
        self._copied[number % _BUFFERS].record(self._stream)

    def wait(self, number: int) -> None:
        """Wait for the last copy of a buffer."""
        self._copied[number % _BUFFERS].synchronize()
