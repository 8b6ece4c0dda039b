"""How fast the cores of each node read the memory of each: measured once, remembered on disk."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import math
import mmap
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import msgspec
import numpy as np

from numoe.cluster.topology import NumaNode, Topology
from numoe.engine.cpu.isa import cache_root, choose_isa
from numoe.engine.cpu.memory import address
from numoe.engine.cpu.reading import READ_STEP_BYTES, read
from numoe.engine.errors import ResourceError
from numoe.engine.numa import bind_memory

_METHOD: Final = 1
"""Counts up when figures of the code before would not be comparable."""
_ROUNDS: Final = 5
_ROUND_S: Final = 0.1
_CACHES: Final = 4
"""The buffer is this many times the caches, so that they hold little of it when it is read again."""
_LEAST_BYTES, _MOST_BYTES = 256 << 20, 4 << 30
_SHARE_OF_FREE: Final = 4
_GUARD_BYTES: Final = 1 << 16
"""Behind the buffer, as the loop prefetches."""
_PATTERN: Final = 0x2C  # as float32, a normal number

Progress = Callable[[int, int], None]
"""Is told of how many nodes the memory has been read, and of how many it will be."""


class ReadSpeed(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes a second at which all cores of a node together read memory of a node."""

    cores: int
    memory: int
    bytes_s: float


class Bandwidth(msgspec.Struct, frozen=True, kw_only=True):
    """The speed of each pair of nodes, each measured alone, and when (seconds since 1970)."""

    measured: float
    reads: tuple[ReadSpeed, ...]

    def between(self, cores: int, memory: int) -> float | None:
        """Bytes a second between two nodes; None if it could not be measured."""
        return next((r.bytes_s for r in self.reads if (r.cores, r.memory) == (cores, memory)), None)

    def local(self, topology: Topology, cores: int) -> float | None:
        """Bytes a second at which the cores of a node read the memory that is nearest."""
        return self.between(cores, topology.memory_for(cores).id)

    def total(self, topology: Topology) -> float:
        """Bytes a second that all nodes read of the memory that is nearest to each."""
        return sum(self.local(topology, node.id) or 0.0 for node in topology.compute_nodes)


def bandwidth(topology: Topology, *, again: bool = False, progress: Progress | None = None) -> Bandwidth:
    """What was measured on such a host before, else (or if `again`) what is measured now and remembered.

    Of processes that ask at once one measures. Raises ResourceError without the memory for it.
    """
    with _one_at_a_time(_file(topology).parent):
        found = None if again else remembered(topology)
        return found or _remember(topology, measure(topology, progress))


def remembered(topology: Topology) -> Bandwidth | None:
    """What was measured before with this processor, these nodes and these cores."""
    try:
        return msgspec.json.decode(_file(topology).read_bytes(), type=Bandwidth)
    except (OSError, msgspec.DecodeError):
        return None


def measure(topology: Topology, progress: Progress | None = None) -> Bandwidth:
    """Read the memory of each node with one thread on each physical core of each node: the best of a few rounds."""
    read(0, 0)  # compiles it
    memories = [node for node in topology.nodes if node.has_memory] or list(topology.compute_nodes)
    speeds: list[ReadSpeed] = []
    with contextlib.ExitStack() as stack:
        teams = {node.id: stack.enter_context(_Readers(node)) for node in topology.compute_nodes}
        for turn, memory in enumerate(memories, 1):
            toucher = min(teams, key=lambda node: topology.distance(node, memory.id))
            with _buffer(topology, memory, teams[toucher]) as buffer:
                if buffer:
                    speeds += [
                        ReadSpeed(cores=number, memory=memory.id, bytes_s=team.speed(*buffer))
                        for number, team in teams.items()
                    ]
            if progress:
                progress(turn, len(memories))
    return Bandwidth(measured=time.time(), reads=tuple(speeds))


class _Readers:
    """A thread on each physical core of a node."""

    def __init__(self, node: NumaNode) -> None:
        cpus = [core[0] for core in node.cores]
        self.count = len(cpus)
        self._pool = ThreadPoolExecutor(
            self.count, "numoe-read", initializer=lambda: os.sched_setaffinity(0, {cpus.pop()})
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown()

    def run(self, start: int, nbytes: int, work: Callable[[int, int], object]) -> float:
        """Have each thread do `work(start, bytes)` with its share of a buffer; seconds from the first to the last."""
        share = nbytes // self.count // READ_STEP_BYTES * READ_STEP_BYTES
        gate = threading.Barrier(self.count)

        def turn(thread: int) -> tuple[float, float]:
            gate.wait()
            began = time.perf_counter()
            work(start + thread * share, share)
            return began, time.perf_counter()

        began, ended = zip(*self._pool.map(turn, range(self.count)), strict=True)
        return float(max(ended) - min(began))

    def speed(self, start: int, nbytes: int) -> float:
        """Bytes a second of reading a buffer."""
        nbytes = nbytes // self.count // READ_STEP_BYTES * READ_STEP_BYTES * self.count
        passes = max(1, math.ceil(_ROUND_S / self.run(start, nbytes, read)))

        def passes_over(start: int, nbytes: int) -> None:
            for _ in range(passes):
                read(start, nbytes)

        return passes * nbytes / min(self.run(start, nbytes, passes_over) for _ in range(_ROUNDS))


@contextlib.contextmanager
def _buffer(topology: Topology, node: NumaNode, toucher: _Readers) -> Iterator[tuple[int, int] | None]:
    """Address and size of memory on a node, in huge pages if they can be had; None if it cannot be bound there."""
    caches = max(other.cache_bytes for other in topology.nodes)
    wanted = min(max(_LEAST_BYTES, _CACHES * caches), _MOST_BYTES)
    free = min(node.available_bytes or wanted * _SHARE_OF_FREE, topology.limits.memory_available_bytes or 1 << 60)
    nbytes = min(wanted, free // _SHARE_OF_FREE)
    if nbytes < _LEAST_BYTES // 4:
        raise ResourceError(
            f"node {node.id} has {free / 1e9:.2f} GB of memory free, too little to measure its bandwidth: free some"
        )
    mapping = mmap.mmap(-1, nbytes + _GUARD_BYTES)
    try:
        start = address(np.frombuffer(mapping, np.uint8))
        with contextlib.suppress(OSError):
            mapping.madvise(mmap.MADV_HUGEPAGE)
        bound = _bind(topology, node, start, len(mapping))
        if bound:
            toucher.run(start, nbytes, lambda part, size: ctypes.memset(part, _PATTERN, size))
        yield (start, nbytes) if bound else None
    finally:
        mapping.close()


def _bind(topology: Topology, node: NumaNode, start: int, nbytes: int) -> bool:
    """Whether memory will come from the node: because it is bound, or because the cores that touch it are there."""
    if len(topology.nodes) > 1:
        try:
            bind_memory(start, nbytes, node.id)
        except OSError:
            return bool(node.cores)
    return True


def _file(topology: Topology) -> Path:
    """Where figures are remembered: a name for the processor, its nodes, and the cores that may be used.

    Memory counts in whole GiB, because kernels take a little of it that differs from boot to boot.
    """
    digest = hashlib.sha256(repr((_METHOD, choose_isa(), topology.cpu_model)).encode())
    for node in topology.nodes:
        memory = round(node.memory_bytes / (1 << 30)), node.memory_allowed
        digest.update(repr((node.id, node.cores, node.package, memory, sorted(node.distances.items()))).encode())
    return cache_root() / "bandwidth" / f"{digest.hexdigest()[:16]}.json"


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, where it can be had."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield


def _remember(topology: Topology, found: Bandwidth) -> Bandwidth:
    """Write the figures, whole or not at all; a folder that cannot be written only costs measuring again."""
    path = _file(topology)
    with contextlib.suppress(OSError):
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(msgspec.json.encode(found))
        Path(file.name).replace(path)
    return found
