"""Barriers, counters and parking."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from numba import njit

from numoe.engine.cpu.memory import address, aligned_bytes
from numoe.engine.cpu.sync import BARRIER_BYTES, await_counter, barrier, is_before, now_ns, publish

ROUNDS = 3000


@njit(nogil=True)
def _rounds(place: int, seen: np.ndarray, thread: int, threads: int, looks: int) -> None:
    """Every thread counts a round, and after the barrier sees that all have."""
    for i in range(ROUNDS):
        seen[thread] = i + 1
        barrier(place, threads, looks)
        for other in range(threads):
            if seen[other] != i + 1:
                seen[threads] += 1
        barrier(place, threads, looks)


@pytest.mark.parametrize("looks", [0, 100, -100])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_nobody_passes_a_barrier_before_all_have_come(threads: int, looks: int) -> None:
    place, seen = aligned_bytes(BARRIER_BYTES), np.zeros(threads + 1, np.int64)
    crew = [threading.Thread(target=_rounds, args=(address(place), seen, i, threads, looks)) for i in range(threads)]
    for member in crew:
        member.start()
    for member in crew:
        member.join(60)
    assert seen[:threads].tolist() == [ROUNDS] * threads
    assert seen[threads] == 0


@pytest.mark.parametrize(("seen", "wanted"), [(0, 1), (2**32 - 1, 0), (2**32 - 5, 5)])
def test_counters_wrap_around(seen: int, wanted: int) -> None:
    assert is_before(seen, wanted)
    assert not is_before(wanted, seen)
    assert not is_before(wanted, wanted)


def test_a_wait_is_bounded() -> None:
    words = aligned_bytes(128)
    start = now_ns()
    assert not await_counter(address(words), address(words) + 64, np.uint32(1), 10, 20_000_000)
    assert 15_000_000 < now_ns() - start < 5_000_000_000
    assert not words.any()  # nobody is counted as parked any more


def test_a_parked_waiter_is_woken() -> None:
    words, woken = aligned_bytes(128), threading.Event()

    def wait() -> None:
        assert await_counter(address(words), address(words) + 64, np.uint32(7), 0, 30_000_000_000)
        woken.set()

    threading.Thread(target=wait, daemon=True).start()
    while not words[64:68].view(np.uint32)[0]:
        time.sleep(0.001)
    publish(address(words), address(words) + 64, np.uint32(7))
    assert woken.wait(10)


def test_a_counter_is_awaited_across_its_wrap_around() -> None:
    words = aligned_bytes(128)
    word = words[:4].view(np.uint32)
    for seen, wanted, reached in ((2**32 - 1, 0, False), (0, 0, True), (3, 2**32 - 2, True), (2**32 - 2, 3, False)):
        word[0] = seen
        assert await_counter(address(words), address(words) + 64, np.uint32(wanted), 1, 1_000_000) == reached
