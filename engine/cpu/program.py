"""A forward step as a program: a table of kernels that a team of persistent threads runs in order.

A *kernel* is a C function (args, step, thread, threads): `args` is its own constant record, `step`
the record of what changes from step to step (fields below). Every thread runs every kernel and
takes its share of the work; a barrier follows where the next kernel reads what this one wrote.
Nothing in a step runs Python, starts a thread or allocates.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import cfunc, njit, types

from numoe.engine.cpu import memory
from numoe.engine.cpu.memory import inline
from numoe.engine.cpu.sync import TEAM_LOOKS, barrier, call_kernel, now_ns

kernel_signature = types.void(*[types.intp] * 4)

# Fields of the step record. Addresses unless they are counts.
(
    N_ROWS, N_LOGITS, TOKENS, POSITIONS, SLOTS, PAGE_TABLES, PAGE_TABLE_STRIDE, LOGIT_ROWS,
    FAILED, SEQUENCE, TIMES,
) = range(11)  # fmt: skip
PARTS = ("attention", "experts", "wait")
"""What a step's time is booked under; nanoseconds, in the step record from TIMES on."""
EXPERTS_PART, WAIT_PART = 1, 2
STEP_FIELDS = TIMES + len(PARTS)

# Fields of an operation.
_KERNEL, _ARGS, _PART, _BARRIER = range(4)
_OPERATION_FIELDS = 4
_MAY_FAIL = 2  # in _BARRIER: stop there if FAILED is set


class Kernel:
    """A kernel, compiled on first use and cached on disk."""

    def __init__(self, function: Callable[[int, int, int, int], None]) -> None:
        self.function, self.__doc__ = function, function.__doc__

    @functools.cached_property
    def compiled(self) -> Any:
        """Numba's C function."""
        return cfunc(kernel_signature, nopython=True, cache=True, error_model="numpy")(self.function)

    @property
    def address(self) -> int:
        """The address of the C function (args, step, thread, threads)."""
        return int(self.compiled.address)


def kernel(function: Callable[[int, int, int, int], None]) -> Kernel:
    """Make a function (args, step, thread, threads) a kernel."""
    return Kernel(function)


@inline
def share(count: int, thread: int, threads: int) -> tuple[int, int]:
    """The range of `count` items that falls to a thread."""
    return count * thread // threads, count * (thread + 1) // threads


@njit(nogil=True, error_model="numpy", cache=True)
def run_program(operations: int, count: int, step: int, place: int, thread: int, threads: int, looks: int) -> None:
    """Run a program on one of `threads` threads; stops where a kernel that may fail sets FAILED.

    looks: of the barrier after such a kernel, which waits for somebody else; others are TEAM_LOOKS.
    """
    start = now_ns()
    for i in range(count):
        op = operations + 8 * _OPERATION_FIELDS * i
        call_kernel(memory.field(op, _KERNEL), memory.field(op, _ARGS), step, thread, threads)
        if memory.field(op, _BARRIER) == _MAY_FAIL:
            barrier(place, threads, looks)
            if memory.field(step, FAILED):
                # Until everybody has seen it: the next run clears the field.
                barrier(place, threads, TEAM_LOOKS)
                return
        elif memory.field(op, _BARRIER):
            barrier(place, threads, TEAM_LOOKS)
        if thread == 0:
            end = now_ns()
            part = TIMES + memory.field(op, _PART)
            memory.set_field(step, part, memory.field(step, part) + end - start)
            start = end


@dataclass
class Program:
    """A table of operations being built, with the records that they point to."""

    operations: list[npt.NDArray[np.int64]] = field(default_factory=list)
    records: list[npt.NDArray[np.int64]] = field(default_factory=list)

    def add(
        self, function: Kernel, *args: float, part: str = "attention", wait: bool = True, may_fail: bool = False
    ) -> None:
        """Append a kernel with its record.

        `wait` puts a barrier after it. `may_fail`: it waits for somebody else and may set FAILED, which
        ends the program there; the next kernel must not be another one.
        """
        fields = memory.record(args)
        self.records.append(fields)
        barrier_kind = _MAY_FAIL if may_fail else int(wait)
        operation = [function.address, memory.address(fields), PARTS.index(part), barrier_kind]
        self.operations.append(np.array(operation, np.int64))

    def table(self) -> npt.NDArray[np.int64]:
        """The operations, int64 [count, 4]; the program itself must outlive it."""
        self.operations[-1][_BARRIER] = self.operations[-1][_BARRIER] or 1
        return memory.aligned_copy(np.stack(self.operations))
