"""Atomics, futexes and barriers for Numba code, across threads and processes.

Words are addressed by integers and may lie in shared memory: every futex is a shared one. Waiting
looks first, for hand-offs of a microsecond, then parks in the kernel, so that an idle thread costs
nothing; a waiter that parks says so in a counter, and the waker makes no system call without one.
"""

from __future__ import annotations

import ctypes
import os
import platform

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils

from numoe.engine.cpu.simd import Builder, Value, addr, operation

_I32, _I64 = ir.IntType(32), ir.IntType(64)
_SYS_FUTEX = {"x86_64": 202, "aarch64": 98}[platform.machine()]
_FUTEX_WAIT, _FUTEX_WAKE = 0, 1
_CLOCK_MONOTONIC = 1

CACHE_LINE = 64
"""Bytes. Words that different threads write lie this far apart."""

syscall6 = types.ExternalFunction(
    "syscall", types.intp(types.intp, types.intp, types.intp, types.intp, types.intp, types.intp, types.intp)
)
sched_yield = types.ExternalFunction("sched_yield", types.int32())
clock_gettime = types.ExternalFunction("clock_gettime", types.int32(types.int32, types.intp))


@operation(types.uint32, addr)
def atomic_load(b: Builder, p: Value) -> Value:
    """The uint32 at `p`; later reads see what was written before it was stored."""
    return b.load_atomic(b.inttoptr(p, _I32.as_pointer()), "acquire", 4)


@operation(types.void, addr, types.uint32)
def atomic_store(b: Builder, p: Value, v: Value) -> None:
    """Store a uint32 so that every thread agrees on its order among other atomic operations."""
    b.store_atomic(v, b.inttoptr(p, _I32.as_pointer()), "seq_cst", 4)


@operation(types.uint32, addr, types.uint32)
def atomic_add(b: Builder, p: Value, v: Value) -> Value:
    """Add to the uint32 at `p`; its value before."""
    return b.atomic_rmw("add", b.inttoptr(p, _I32.as_pointer()), v, "seq_cst")


@operation(types.void)
def pause(b: Builder) -> None:
    """Tell the core that this is a spinning loop."""
    if platform.machine() == "x86_64":
        kind = ir.FunctionType(ir.VoidType(), [])
        b.call(cgutils.get_or_insert_function(b.module, kind, "llvm.x86.sse2.pause"), [])
    else:
        b.asm(ir.FunctionType(ir.VoidType(), []), "yield", "", [], side_effect=True)


@operation(addr)
def stack_slot16(b: Builder) -> Value:
    """The address of 16 bytes on the stack, the same for each execution."""
    with b.goto_entry_block():
        slot = b.alloca(ir.ArrayType(_I64, 2))
    return b.ptrtoint(slot, _I64)


@operation(types.void, addr, addr, addr, addr, addr)
def call_kernel(b: Builder, f: Value, args: Value, step: Value, thread: Value, threads: Value) -> None:
    """Call the C function at address `f` with four integers."""
    kind = ir.FunctionType(ir.VoidType(), [_I64] * 4)
    b.call(b.inttoptr(f, kind.as_pointer()), [args, step, thread, threads])


@operation(types.void, *[addr] * 11)
def call_product(
    b: Builder, f: Value, w: Value, group_bytes: Value, groups: Value, blocks: Value, phase: Value,
    rows: Value, n: Value, out: Value, stride: Value, ahead: Value,
) -> None:  # fmt: skip
    """Call the product kernel at address `f`: see `products.py`."""
    kind = ir.FunctionType(ir.VoidType(), [_I64] * 10)
    b.call(b.inttoptr(f, kind.as_pointer()), [w, group_bytes, groups, blocks, phase, rows, n, out, stride, ahead])


@operation(types.void, addr, addr, addr, addr, addr, addr)
def call_unpack(b: Builder, f: Value, w: Value, blocks: Value, phase: Value, row: Value, out: Value) -> None:
    """Call the unpack kernel at address `f`: see `products.py`."""
    kind = ir.FunctionType(ir.VoidType(), [_I64] * 5)
    b.call(b.inttoptr(f, kind.as_pointer()), [w, blocks, phase, row, out])


@operation(types.intp, addr)
def read_pair_as_ns(b: Builder, p: Value) -> Value:
    """The timespec at `p` in nanoseconds."""
    words = b.inttoptr(p, _I64.as_pointer())
    seconds = b.load(words)
    nanoseconds = b.load(b.gep(words, [ir.Constant(_I32, 1)]))
    return b.add(b.mul(seconds, ir.Constant(_I64, 1_000_000_000)), nanoseconds)


@operation(types.void, addr, types.intp)
def write_ns_as_pair(b: Builder, p: Value, ns: Value) -> None:
    """Write nanoseconds as the timespec at `p`."""
    billion = ir.Constant(_I64, 1_000_000_000)
    words = b.inttoptr(p, _I64.as_pointer())
    b.store(b.sdiv(ns, billion), words)
    b.store(b.srem(ns, billion), b.gep(words, [ir.Constant(_I32, 1)]))


@njit(nogil=True, error_model="numpy")
def now_ns() -> int:
    """CLOCK_MONOTONIC in nanoseconds."""
    slot = stack_slot16()
    clock_gettime(np.int32(_CLOCK_MONOTONIC), slot)
    return read_pair_as_ns(slot)


@njit(nogil=True, error_model="numpy")
def futex_wait(word: int, seen: int, timeout_ns: int) -> None:
    """Sleep until woken, unless the uint32 at `word` no longer is `seen`; at most `timeout_ns`."""
    slot = stack_slot16()
    write_ns_as_pair(slot, timeout_ns)
    syscall6(_SYS_FUTEX, word, _FUTEX_WAIT, seen, slot, 0, 0)


@njit(nogil=True, error_model="numpy")
def futex_wake_all(word: int) -> None:
    """Wake every thread that sleeps on `word`."""
    syscall6(_SYS_FUTEX, word, _FUTEX_WAKE, 2**31 - 1, 0, 0, 0)


@njit(nogil=True, error_model="numpy")
def is_before(seen: int, wanted: int) -> bool:
    """Whether counter value `seen` comes before `wanted`; both uint32 that wrap around."""
    return np.int32(np.uint32(seen) - np.uint32(wanted)) < 0


@njit(nogil=True, error_model="numpy")
def publish(word: int, sleepers: int, value: int) -> None:
    """Set the counter at `word` and wake those who parked on it."""
    atomic_store(word, np.uint32(value))
    if atomic_load(sleepers) != 0:
        futex_wake_all(word)


@njit(nogil=True, error_model="numpy")
def relax(looks: int) -> None:
    """Between two looks at a word: pause, or let another thread of the processor run if `looks` is negative."""
    if looks < 0:
        sched_yield()
    else:
        pause()


@njit(nogil=True, error_model="numpy")
def await_counter(word: int, sleepers: int, wanted: int, looks: int, timeout_ns: int) -> bool:
    """Wait until the counter at `word` reaches `wanted`; False after `timeout_ns` asleep.

    Looks |looks| times (see `relax`), then parks; `sleepers` is the uint32 that counts who is parked.
    """
    for _ in range(abs(looks)):
        if not is_before(atomic_load(word), wanted):
            return True
        relax(looks)
    atomic_add(sleepers, np.uint32(1))
    seen = atomic_load(word)
    if is_before(seen, wanted):
        futex_wait(word, np.intp(seen), timeout_ns)
        seen = atomic_load(word)
    atomic_add(sleepers, np.uint32(0xFFFFFFFF))
    return not is_before(seen, wanted)


_LONG_NS = 1_000_000_000

BARRIER_BYTES = 3 * CACHE_LINE
"""Bytes of a barrier: arrivals, generation, sleepers, a cache line each, all zero at first."""


@njit(nogil=True, error_model="numpy")
def barrier(place: int, threads: int, looks: int) -> None:
    """Wait until all `threads` threads have come to the barrier at `place`."""
    if threads == 1:
        return
    generation, sleepers = place + CACHE_LINE, place + 2 * CACHE_LINE
    current = atomic_load(generation)
    if atomic_add(place, np.uint32(1)) == np.uint32(threads - 1):
        atomic_store(place, np.uint32(0))
        publish(generation, sleepers, np.uint32(current + np.uint32(1)))
        return
    while not await_counter(generation, sleepers, np.uint32(current + np.uint32(1)), looks, _LONG_NS):
        pass


def wake_word(address: int) -> None:
    """Wake all sleepers of a futex word, from Python."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall(
        ctypes.c_long(_SYS_FUTEX),
        ctypes.c_void_p(address),
        ctypes.c_long(_FUTEX_WAKE),
        ctypes.c_long(2**31 - 1),
        None,
        None,
        ctypes.c_long(0),
    )


TEAM_LOOKS = 5000
"""How often a wait among threads that all are at work looks before it parks: about 200 µs, longer than they differ.

To be woken takes 50 µs, as long as some of a step's kernels.
"""


def handoff_looks(threads_on_host: int) -> int:
    """How often a wait for the other side of the mailbox looks before it parks, for about a millisecond.

    Negative where both sides need the same processors. They take turns there, and whoever waits lets the other
    run at once: parked, each would have to be woken, up to 50 us later, twice a layer.
    """
    return -2_000 if threads_on_host > len(os.sched_getaffinity(0)) else 20_000
