"""Teams of threads: every kernel runs on all of them, in order, and idle ones cost nothing."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from numba import njit

from numoe.engine.cpu.memory import address, field, float_field, record, set_field
from numoe.engine.cpu.program import FAILED, N_ROWS, STEP_FIELDS, Program, kernel, share
from numoe.engine.cpu.sync import handoff_looks
from numoe.engine.cpu.team import ThreadTeam


@kernel
def increment(args: int, step: int, thread: int, threads: int) -> None:
    """Add one to each of the step's rows. Record: int64 [rows]."""
    first, last = share(field(step, N_ROWS), thread, threads)
    for i in range(first, last):
        set_field(field(args, 0), i, field(field(args, 0), i) + 1)


@kernel
def reverse(args: int, step: int, thread: int, threads: int) -> None:
    """out = x reversed. Record: x, out, int64 [rows] each."""
    rows = field(step, N_ROWS)
    first, last = share(rows, thread, threads)
    for i in range(first, last):
        set_field(field(args, 1), i, field(field(args, 0), rows - 1 - i))


@kernel
def fail(args: int, step: int, thread: int, threads: int) -> None:
    """The first thread gives the step up."""
    if thread == 0:
        set_field(step, FAILED, 7)


@contextmanager
def team_of(threads: int) -> Iterator[ThreadTeam]:
    team = ThreadTeam(threads, threads_on_host=99)
    try:
        yield team
    finally:
        team.close()


def within(seconds: float, work: threading.Thread) -> bool:
    """Whether a thread, started now, ends in time."""
    work.daemon = True
    work.start()
    work.join(seconds)
    return not work.is_alive()


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_a_kernel_sees_all_that_the_one_before_it_wrote(threads: int) -> None:
    x, y, step = np.zeros(37, np.int64), np.zeros(37, np.int64), np.zeros(STEP_FIELDS, np.int64)
    step[N_ROWS], program = 37, Program()
    for _ in range(3):
        program.add(increment, address(x))
        program.add(reverse, address(x), address(y))
        program.add(reverse, address(y), address(x))
    table, start = program.table(), np.arange(37) * 1000
    x[:] = start
    with team_of(threads) as team:
        for _ in range(500):
            team.run(table, step)
    assert np.array_equal(x, start + 1500)


def test_a_failed_step_runs_no_further_and_may_be_run_again_at_once() -> None:
    before, after, step = np.zeros(8, np.int64), np.zeros(8, np.int64), np.zeros(STEP_FIELDS, np.int64)
    program = Program()
    program.add(increment, address(before))
    program.add(fail, may_fail=True)
    program.add(increment, address(after))
    table = program.table()
    step[N_ROWS] = 8
    team = ThreadTeam(4, threads_on_host=99)

    def work() -> None:
        for _ in range(2000):
            step[FAILED] = 0
            team.run(table, step)
        team.close()

    assert within(60, threading.Thread(target=work))
    assert step[FAILED] == 7
    assert before.tolist() == [2000] * 8
    assert after.tolist() == [0] * 8


def test_an_idle_team_uses_no_processor() -> None:
    x, step = np.zeros(8, np.int64), np.zeros(STEP_FIELDS, np.int64)
    program = Program()
    program.add(increment, address(x))
    with team_of(4) as team:
        team.run(program.table(), step)
        start = time.process_time()
        time.sleep(0.5)
        assert time.process_time() - start < 0.05


def test_closing_ends_the_threads() -> None:
    with team_of(3):
        assert sum(thread.name.startswith("numoe-team") for thread in threading.enumerate()) == 2
    assert not any(thread.name.startswith("numoe-team") for thread in threading.enumerate())


@njit
def _bounds(count: int, threads: int, out: np.ndarray) -> None:
    for thread in range(threads):
        out[thread] = share(count, thread, threads)


@pytest.mark.parametrize(("count", "threads"), [(0, 3), (1, 4), (7, 3), (100, 7)])
def test_shares_cover_everything_once_and_differ_by_at_most_one(count: int, threads: int) -> None:
    bounds = np.empty((threads, 2), np.int64)
    _bounds(count, threads, bounds)
    assert [i for first, last in bounds for i in range(first, last)] == list(range(count))
    sizes = np.diff(bounds)
    assert sizes.max() - sizes.min() <= 1


@njit
def _read(place: int) -> tuple[int, float, int]:
    return field(place, 0), float_field(place, 1), field(place, 2)


def test_records_hold_integers_addresses_and_floats() -> None:
    fields = record([-5, 0.1, 2**62])
    assert _read(address(fields)) == (-5, np.float32(0.1), 2**62)


def test_waits_give_way_unless_each_thread_has_a_core_of_its_own() -> None:
    assert handoff_looks(threads_on_host=1) > 0 > handoff_looks(threads_on_host=10**6)
