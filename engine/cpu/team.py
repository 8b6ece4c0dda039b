"""Teams of persistent threads that run programs, parked while there is nothing to run."""

from __future__ import annotations

import threading

import numpy as np
import numpy.typing as npt
from numba import njit, types

from numoe.engine.cpu import memory
from numoe.engine.cpu.program import run_program
from numoe.engine.cpu.sync import (
    BARRIER_BYTES,
    CACHE_LINE,
    TEAM_LOOKS,
    atomic_add,
    atomic_load,
    atomic_store,
    await_counter,
    futex_wake_all,
    handoff_looks,
    publish,
)
from numoe.engine.numa import Pins, current_cpu, last_cpus

# Fields of a team's record.
_OPERATIONS, _COUNT, _STEP, _THREADS, _LOOKS, _WORDS = range(6)
# Words at _WORDS: the barrier, then the generation, its sleepers, the stop flag.
_GENERATION, _SLEEPERS, _STOP = BARRIER_BYTES, BARRIER_BYTES + CACHE_LINE, BARRIER_BYTES + 2 * CACHE_LINE
_WORD_BYTES = BARRIER_BYTES + 3 * CACHE_LINE
_PARK_NS = 10_000_000_000


@njit(nogil=True, error_model="numpy", cache=True)
def _member(team: int, thread: int) -> None:
    """A thread other than the leader: run every program that the leader starts."""
    words = memory.field(team, _WORDS)
    wanted = np.uint32(1)
    while True:
        started = await_counter(words + _GENERATION, words + _SLEEPERS, wanted, TEAM_LOOKS, _PARK_NS)
        if atomic_load(words + _STOP):
            return
        if started:
            _run_share(team, thread)
            wanted = np.uint32(wanted + np.uint32(1))


@njit(nogil=True, error_model="numpy", cache=True)
def _lead(team: int) -> None:
    """Start the program on all threads and run the leader's share."""
    words = memory.field(team, _WORDS)
    generation = atomic_load(words + _GENERATION)
    publish(words + _GENERATION, words + _SLEEPERS, np.uint32(generation + np.uint32(1)))
    _run_share(team, 0)


@njit(nogil=True, error_model="numpy", cache=True)
def _run_share(team: int, thread: int) -> None:
    operations, count, step = memory.field(team, _OPERATIONS), memory.field(team, _COUNT), memory.field(team, _STEP)
    threads, looks, words = memory.field(team, _THREADS), memory.field(team, _LOOKS), memory.field(team, _WORDS)
    run_program(operations, count, step, words, thread, threads, looks)


@njit(nogil=True, error_model="numpy", cache=True)
def _dismiss(team: int) -> None:
    words = memory.field(team, _WORDS)
    atomic_store(words + _STOP, np.uint32(1))
    atomic_add(words + _GENERATION, np.uint32(1))
    futex_wake_all(words + _GENERATION)


def compile_all() -> None:
    """Compile what a team runs, or find it in the cache."""
    _member.compile((types.intp, types.intp))
    _lead.compile((types.intp,))
    _dismiss.compile((types.intp,))


class ThreadTeam:
    """`threads` threads, the caller of `run` among them.

    pins: their processors; that of the caller is its only one while it runs.
    """

    def __init__(self, threads: int, threads_on_host: int, pins: Pins | None = None) -> None:
        self.threads, self._pins = threads, pins or Pins()
        self._leader_cpu = current_cpu()
        self._words = memory.aligned_bytes(_WORD_BYTES)
        self._looks = handoff_looks(threads_on_host)
        self._record = memory.record([0, 0, 0, threads, self._looks, memory.address(self._words)])
        self._address = memory.address(self._record)
        self._members = [
            threading.Thread(target=self._serve, args=(i,), name=f"numoe-team-{i}", daemon=True)
            for i in range(1, threads)
        ]
        for member in self._members:
            member.start()

    def _serve(self, thread: int) -> None:
        self._pins.pin(thread)
        _member(self._address, thread)

    @property
    def ran_on(self) -> list[int]:
        """The processor that each thread ran on last, the first one when it was the last caller of `run`."""
        return [self._leader_cpu, *last_cpus(m.native_id for m in self._members if m.native_id is not None)]

    def run(self, operations: npt.NDArray[np.int64], step: npt.NDArray[np.int64]) -> None:
        """Run a program's table on all threads; returns when it is done. One caller at a time."""
        self._record[:3] = [memory.address(operations), len(operations), memory.address(step)]
        with self._pins.pinned():
            _lead(self._address)
            self._leader_cpu = current_cpu()

    def close(self) -> None:
        """End the threads. No program may be running."""
        _dismiss(self._address)
        for member in self._members:
            member.join()
        self._members = []
