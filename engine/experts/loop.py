"""A shard's side of the mailbox: the loop its threads run, without Python and without allocation.

Every thread waits for a request, then

1. groups the request's (row, choice) pairs by expert, each thread for itself;
2. takes units of 32 intermediate columns of one expert, for all rows routed to it: gate, up, SwiGLU,
   rounding to what the down product reads;
   -- barrier --
3. takes units of a few output columns, and adds up over the experts, lowest id first:
   weight * down(h);
   -- the last thread to finish answers --

A row's sums do not depend on which rows share the request, nor on the number of threads.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from numoe.engine.cpu import simd as v
from numoe.engine.cpu.memory import field, inline, set_field
from numoe.engine.cpu.rows import quantize_block, silu_mul
from numoe.engine.cpu.sync import (
    TEAM_LOOKS,
    atomic_add,
    atomic_load,
    atomic_store,
    barrier,
    call_product,
    futex_wait,
    is_before,
    now_ns,
    publish,
    relax,
)
from numoe.engine.cpu.tile import META_BYTES
from numoe.engine.experts.mailbox import (
    BUSY_NS,
    FEW_ROWS,
    HEARTBEAT,
    READ_BYTES,
    READ_NS,
    REPLY_SLEEPERS,
    REQUEST_LAYER,
    REQUEST_ROWS,
    REQUEST_SEQUENCE,
    REQUEST_SLEEPERS,
    STEP_START,
    STEPPING,
    STOP,
)

# Fields of the shard record.
(
    MAILBOX, REPLY, IDS, WEIGHTS, Q8_ROWS, Q8_STRIDE, F32_ROWS, F32_STRIDE, PARTIALS,
    HIDDEN, TOP_K, EXPERTS, BLOCKS, THREADS, LOOKS, BARRIER, COUNTERS, LAYERS,
    H_Q8, H_Q8_STRIDE, H_F32, H_F32_STRIDE, H_Q8_POINTERS, H_F32_POINTERS, SCRATCH, SCRATCH_BYTES,
    PAIRS_OFFSET, POINTERS_OFFSET, TILE_OFFSET,
) = range(29)  # fmt: skip
SHARD_FIELDS = 29

# Fields of a layer's record. A matrix is a product kernel, the address of expert 0, the bytes from
# expert to expert and from group to group, the blocks of a row and the first one's phase.
MATRIX_FIELDS = 7
GATE, UP, DOWN = 0, MATRIX_FIELDS, 2 * MATRIX_FIELDS
KERNEL, ADDRESS, EXPERT_STRIDE, GROUP_STRIDE, MATRIX_BLOCKS, PHASE, IS_Q8 = range(MATRIX_FIELDS)
LAYER_FIELDS = 3 * MATRIX_FIELDS

_CLAIM_GROUPS = 4  # groups of 16 output columns that a thread takes at a time
_STEPPING_NS = 2_000_000_000  # after which a worker that began a step has died, or is in no hurry; nobody beats so long
_POLL_NS = 100_000_000  # an idle shard looks after its heartbeat ten times a second
# Words of COUNTERS, a cache line each.
_STAGE1, _STAGE2, _ARRIVED = 0, 64, 128


@inline
def _group_pairs(shard: int, rows: int, scratch: int) -> int:
    """Sort the request's pairs by expert, rows ascending; the number of experts that have any.

    In `scratch`: int32 [EXPERTS + 1] offsets, int32 [EXPERTS] the active experts, then at
    PAIRS_OFFSET int32 [rows * top_k] pair numbers (row * top_k + choice) in sorted order.
    """
    experts, top_k, ids = field(shard, EXPERTS), field(shard, TOP_K), field(shard, IDS)
    pairs = scratch + field(shard, PAIRS_OFFSET)
    active = scratch + 4 * (experts + 1)
    for e in range(experts + 1):
        v.store_scalar_i32(scratch + 4 * e, np.int32(0))
    for i in range(rows * top_k):
        slot = scratch + 4 * (np.intp(v.load_scalar_i32(ids + 4 * i)) + 1)
        v.store_scalar_i32(slot, np.int32(v.load_scalar_i32(slot) + 1))
    count = 0
    for e in range(experts):
        here = v.load_scalar_i32(scratch + 4 * (e + 1))
        if here > 0:
            v.store_scalar_i32(active + 4 * count, np.int32(e))
            count += 1
        v.store_scalar_i32(scratch + 4 * (e + 1), np.int32(here + v.load_scalar_i32(scratch + 4 * e)))
    for i in range(rows * top_k):
        slot = scratch + 4 * np.intp(v.load_scalar_i32(ids + 4 * i))
        at = v.load_scalar_i32(slot)
        v.store_scalar_i32(pairs + 4 * np.intp(at), np.int32(i))
        v.store_scalar_i32(slot, np.int32(at + 1))
    # Each offset has moved to its expert's end: move them back.
    for e in range(experts, 0, -1):
        v.store_scalar_i32(scratch + 4 * e, v.load_scalar_i32(scratch + 4 * (e - 1)))
    v.store_scalar_i32(scratch, np.int32(0))
    return count


@inline
def _place(matrix: int, expert: int, group: int) -> int:
    """Where a group of an expert's matrix begins."""
    return field(matrix, ADDRESS) + expert * field(matrix, EXPERT_STRIDE) + group * field(matrix, GROUP_STRIDE)


@inline
def _product(matrix: int, w: int, groups: int, rows: int, n: int, out: int, stride: int, ahead: int) -> None:
    """`groups` groups of a matrix from `w` on times `n` rows whose addresses lie at `rows`; see `products.py`."""
    group_bytes, blocks, phase = field(matrix, GROUP_STRIDE), field(matrix, MATRIX_BLOCKS), field(matrix, PHASE)
    call_product(field(matrix, KERNEL), w, group_bytes, groups, blocks, phase, rows, n, out, stride, ahead)


@inline
def _row_pointers(shard: int, matrix: int, pairs: int, n: int, pointers: int) -> None:
    """The addresses of the activation rows of `n` pairs, in the form that `matrix` reads."""
    base, stride = field(shard, F32_ROWS), field(shard, F32_STRIDE)
    if field(matrix, IS_Q8):
        base, stride = field(shard, Q8_ROWS), field(shard, Q8_STRIDE)
    top_k = field(shard, TOP_K)
    for i in range(n):
        row = np.intp(v.load_scalar_i32(pairs + 4 * i)) // top_k
        v.store_scalar_i64(pointers + 8 * i, base + row * stride)


@inline
def _gate_up(shard: int, layer: int, expert: int, block: int, first: int, n: int, scratch: int, ahead: int) -> None:
    """SwiGLU of 32 intermediate columns for `n` pairs, the first being number `first` in sorted order.

    ahead: where the unit that is likely to follow begins.
    """
    pairs = scratch + field(shard, PAIRS_OFFSET) + 4 * first
    pointers, gate = scratch + field(shard, POINTERS_OFFSET), scratch + field(shard, TILE_OFFSET)
    up = gate + 128 * n
    _row_pointers(shard, layer + 8 * GATE, pairs, n, pointers)
    gate_w, up_w = _place(layer + 8 * GATE, expert, 2 * block), _place(layer + 8 * UP, expert, 2 * block)
    _product(layer + 8 * GATE, gate_w, 2, pointers, n, gate, 128, up_w)
    if field(layer + 8 * UP, IS_Q8) != field(layer + 8 * GATE, IS_Q8):
        _row_pointers(shard, layer + 8 * UP, pairs, n, pointers)
    _product(layer + 8 * UP, up_w, 2, pointers, n, up, 128, ahead)
    cols = 32 * field(shard, BLOCKS)
    for i in range(n):
        a = silu_mul(v.load_f32(gate + 128 * i), v.load_f32(up + 128 * i))
        b = silu_mul(v.load_f32(gate + 128 * i + 64), v.load_f32(up + 128 * i + 64))
        if field(layer + 8 * DOWN, IS_Q8):
            out = field(shard, H_Q8) + (first + i) * field(shard, H_Q8_STRIDE)
            quantize_block(a, b, out + 32 * block, out + cols + META_BYTES * block)
        else:
            out = field(shard, H_F32) + (first + i) * field(shard, H_F32_STRIDE) + 128 * block
            v.store_f32(out, a)
            v.store_f32(out + 64, b)


@inline
def _down(shard: int, layer: int, group: int, later: int, active: int, scratch: int, rows: int) -> None:
    """The partial sums of _CLAIM_GROUPS groups of output columns from `group` on, before those from `later` on."""
    hidden, top_k = field(shard, HIDDEN), field(shard, TOP_K)
    out, last = field(shard, PARTIALS), min(group + _CLAIM_GROUPS, hidden // 16)
    pairs, experts = scratch + field(shard, PAIRS_OFFSET), scratch + 4 * (field(shard, EXPERTS) + 1)
    tile, weights = scratch + field(shard, TILE_OFFSET), field(shard, WEIGHTS)
    pointers = field(shard, H_Q8_POINTERS) if field(layer + 8 * DOWN, IS_Q8) else field(shard, H_F32_POINTERS)
    for row in range(rows):
        for g in range(group, last):
            v.store_f32(out + 4 * (row * hidden + 16 * g), v.splat_f32(0.0))
    for a in range(active):
        expert = np.intp(v.load_scalar_i32(experts + 4 * a))
        first = np.intp(v.load_scalar_i32(scratch + 4 * expert))
        n = np.intp(v.load_scalar_i32(scratch + 4 * (expert + 1))) - first
        groups, stride = last - group, 64 * _CLAIM_GROUPS
        w = _place(layer + 8 * DOWN, expert, group)
        following = np.intp(v.load_scalar_i32(experts + 4 * ((a + 1) % active)))
        ahead = _ahead(shard, layer, following, group if a + 1 < active else later)
        _product(layer + 8 * DOWN, w, groups, pointers + 8 * first, n, tile, stride, ahead)
        for i in range(n):
            pair = np.intp(v.load_scalar_i32(pairs + 4 * (first + i)))
            weight = v.splat_f32(v.load_scalar_f32(weights + 4 * pair))
            source, at = tile + i * stride, out + 4 * (pair // top_k * hidden + 16 * group)
            for g in range(groups):
                total = v.fma(v.load_f32(source + 64 * g), weight, v.load_f32(at + 64 * g))
                v.store_f32(at + 64 * g, total)


@inline
def _ahead(shard: int, layer: int, expert: int, group: int) -> int:
    """Where output columns of an expert's `down` begin; 0 behind the last."""
    return _place(layer + 8 * DOWN, expert, group) if group < field(shard, HIDDEN) // 16 else 0


@inline
def _serve(shard: int, layer: int, rows: int, scratch: int) -> int:
    """One request, on one of the shard's threads; the number of experts it needs, when the thread's share is done.

    A thread claims its next unit before it works on one, so that it knows which weights to fetch meanwhile.
    """
    counters, blocks, heartbeat = field(shard, COUNTERS), field(shard, BLOCKS), field(shard, REPLY) + HEARTBEAT
    active = _group_pairs(shard, rows, scratch)
    experts, units, groups = scratch + 4 * (field(shard, EXPERTS) + 1), active * blocks, field(shard, HIDDEN) // 16
    unit, group = np.intp(atomic_add(counters + _STAGE1, np.uint32(1))), np.intp(-1)
    while unit < units:
        atomic_add(heartbeat, np.uint32(1))
        following = np.intp(atomic_add(counters + _STAGE1, np.uint32(1)))
        if following < units:
            later = np.intp(v.load_scalar_i32(experts + 4 * (following // blocks)))
            ahead = _place(layer + 8 * GATE, later, 2 * (following % blocks))
        else:
            group = np.intp(atomic_add(counters + _STAGE2, np.uint32(1))) * _CLAIM_GROUPS
            ahead = _ahead(shard, layer, np.intp(v.load_scalar_i32(experts)), group)
        expert = np.intp(v.load_scalar_i32(experts + 4 * (unit // blocks)))
        first = np.intp(v.load_scalar_i32(scratch + 4 * expert))
        n = np.intp(v.load_scalar_i32(scratch + 4 * (expert + 1))) - first
        _gate_up(shard, layer, expert, unit % blocks, first, n, scratch, ahead)
        unit = following
    barrier(field(shard, BARRIER), field(shard, THREADS), TEAM_LOOKS)
    if group < 0:
        group = np.intp(atomic_add(counters + _STAGE2, np.uint32(1))) * _CLAIM_GROUPS
    while group < groups:
        atomic_add(heartbeat, np.uint32(1))
        following = np.intp(atomic_add(counters + _STAGE2, np.uint32(1))) * _CLAIM_GROUPS
        _down(shard, layer, group, following, active, scratch, rows)
        group = following
    return active


@inline
def _count_reading(reply: int, layer: int, active: int, nanoseconds: int) -> None:
    """Add to what the shard has read: all of gate, up and down of `active` experts."""
    of_expert = (
        field(layer, GATE + EXPERT_STRIDE) + field(layer, UP + EXPERT_STRIDE) + field(layer, DOWN + EXPERT_STRIDE)
    )
    set_field(reply + READ_BYTES, 0, field(reply + READ_BYTES, 0) + active * of_expert)
    set_field(reply + READ_NS, 0, field(reply + READ_NS, 0) + nanoseconds)


@inline
def _is_stepping(mailbox: int) -> bool:
    """Whether a step is under way whose worker cannot wake sleepers, and has not been for too long."""
    return atomic_load(mailbox + STEPPING) != 0 and now_ns() - field(mailbox + STEP_START, 0) < _STEPPING_NS


@inline
def _await_request(mailbox: int, reply: int, wanted: int, looks: int) -> bool:
    """Wait until request `wanted` is there; False if it is not after _POLL_NS asleep.

    As `await_counter`, but nobody sleeps while a step is under way whose worker cannot wake them.
    """
    request, sleepers, left = mailbox + REQUEST_SEQUENCE, reply + REQUEST_SLEEPERS, abs(looks)
    while left > 0 or _is_stepping(mailbox):
        if not is_before(atomic_load(request), wanted):
            return True
        if atomic_load(mailbox + STOP) != 0:
            return False
        relax(looks)
        left -= 1
    atomic_add(sleepers, np.uint32(1))
    seen = atomic_load(request)
    if is_before(seen, wanted) and not _is_stepping(mailbox):
        futex_wait(request, np.intp(seen), _POLL_NS)
    atomic_add(sleepers, np.uint32(0xFFFFFFFF))
    return not is_before(atomic_load(request), wanted)


@njit(nogil=True, error_model="numpy", cache=True)
def shard_loop(shard: int, thread: int, seen: int) -> None:
    """Serve requests until the mailbox says stop; run by each of the shard's threads.

    seen: the sequence number of the last request that was answered.
    """
    mailbox, counters, reply = field(shard, MAILBOX), field(shard, COUNTERS), field(shard, REPLY)
    scratch = field(shard, SCRATCH) + thread * field(shard, SCRATCH_BYTES)
    wanted = np.uint32(seen) + np.uint32(1)
    looks = field(shard, LOOKS)
    while atomic_load(mailbox + STOP) == 0:
        if not _await_request(mailbox, reply, wanted, looks):
            if thread == 0:
                atomic_add(reply + HEARTBEAT, np.uint32(1))
            looks = 1 if looks > 0 else -1  # nothing is under way: who beats need not look for long each time
            continue
        looks = field(shard, LOOKS)
        start = now_ns()
        layer = field(shard, LAYERS) + 8 * LAYER_FIELDS * field(mailbox + REQUEST_LAYER, 0)
        rows = field(mailbox + REQUEST_ROWS, 0)
        active = _serve(shard, layer, rows, scratch)
        if atomic_add(counters + _ARRIVED, np.uint32(1)) == np.uint32(field(shard, THREADS) - 1):
            atomic_store(counters + _STAGE1, np.uint32(0))
            atomic_store(counters + _STAGE2, np.uint32(0))
            atomic_store(counters + _ARRIVED, np.uint32(0))
            taken = now_ns() - start
            set_field(reply + BUSY_NS, 0, taken)
            if rows <= FEW_ROWS:
                _count_reading(reply, layer, active, taken)
            publish(reply, reply + REPLY_SLEEPERS, wanted)
        wanted = np.uint32(wanted + np.uint32(1))
