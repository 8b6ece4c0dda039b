"""The attention worker's side of the mailbox: routing, asking the shards, adding up their answers."""

from __future__ import annotations

import math

import numpy as np

from numoe.engine.cpu import simd as v
from numoe.engine.cpu.memory import field, float_field, inline, set_field
from numoe.engine.cpu.program import (
    EXPERTS_PART,
    FAILED,
    N_ROWS,
    SEQUENCE,
    TIMES,
    WAIT_PART,
    kernel,
    share,
)
from numoe.engine.cpu.sync import atomic_load, atomic_store, await_counter, futex_wake_all, is_before, now_ns
from numoe.engine.experts.mailbox import (
    BUSY_NS,
    HEARTBEAT,
    REPLY_SLEEPERS,
    REQUEST_LAYER,
    REQUEST_ROWS,
    REQUEST_SEQUENCE,
    REQUEST_SLEEPERS,
    SHARD_STRIDE,
    SHARDS_AT,
)

_PARK_NS = 20_000_000


@inline
def _take_best(logits: int, experts: int, ids: int, choice: int) -> int:
    """The expert with the highest logit among those not yet in `ids`; the lowest id of equals."""
    best = np.intp(-1)
    for e in range(experts):
        taken = False
        for c in range(choice):
            taken = taken or np.intp(v.load_scalar_i32(ids + 4 * c)) == e
        if not taken and (best < 0 or v.load_scalar_f32(logits + 4 * e) > v.load_scalar_f32(logits + 4 * best)):
            best = e
    return best


@kernel
def route_softmax(args: int, step: int, thread: int, threads: int) -> None:
    """The top experts of each row and their weights: softmax over all experts, the k largest kept.

    Record: router logits float32, stride, experts, top_k, normalise, scale, ids out, weights out.
    With `normalise` the kept weights are divided by their sum (Mixtral, Qwen3).
    """
    first, last = share(field(step, N_ROWS), thread, threads)
    experts, top_k = field(args, 2), field(args, 3)
    for row in range(first, last):
        logits = field(args, 0) + row * field(args, 1)
        ids, weights = field(args, 6) + 4 * row * top_k, field(args, 7) + 4 * row * top_k
        for choice in range(top_k):
            v.store_scalar_i32(ids + 4 * choice, np.int32(_take_best(logits, experts, ids, choice)))
        largest = v.load_scalar_f32(logits + 4 * np.intp(v.load_scalar_i32(ids)))
        total = 0.0
        if not field(args, 4):
            for e in range(experts):
                total += math.exp(v.load_scalar_f32(logits + 4 * e) - largest)
        for choice in range(top_k):
            expert = np.intp(v.load_scalar_i32(ids + 4 * choice))
            weight = math.exp(v.load_scalar_f32(logits + 4 * expert) - largest)
            v.store_scalar_f32(weights + 4 * choice, np.float32(weight))
            if field(args, 4):
                total += weight
        for choice in range(top_k):
            weight = v.load_scalar_f32(weights + 4 * choice) / total * float_field(args, 5)
            v.store_scalar_f32(weights + 4 * choice, np.float32(weight))


@inline
def publish_request(mailbox: int, shards: int, sequence: int) -> None:
    """Make a request valid, and wake the shards' threads if any of them is parked."""
    atomic_store(mailbox + REQUEST_SEQUENCE, np.uint32(sequence))
    for shard in range(shards):
        if atomic_load(mailbox + SHARDS_AT + SHARD_STRIDE * shard + REQUEST_SLEEPERS) != 0:
            futex_wake_all(mailbox + REQUEST_SEQUENCE)
            break


@kernel
def exchange(args: int, step: int, thread: int, threads: int) -> None:  # noqa: ARG001
    """Publish the request and wait for every shard; the first thread does, the others go to the barrier.

    Record: mailbox, layer, shards, looks, bound in nanoseconds. A shard whose heartbeat stands still
    for longer than the bound is late: FAILED becomes its number + 1.
    """
    if thread != 0:
        return
    mailbox, looks, bound = field(args, 0), field(args, 3), field(args, 4)
    wanted = np.uint32(np.uint32(field(step, SEQUENCE)) + np.uint32(1))
    set_field(step, SEQUENCE, np.intp(wanted))
    set_field(mailbox + REQUEST_LAYER, 0, field(args, 1))
    set_field(mailbox + REQUEST_ROWS, 0, field(step, N_ROWS))
    publish_request(mailbox, field(args, 2), wanted)
    busy = np.intp(0)
    for shard in range(field(args, 2)):
        reply = mailbox + SHARDS_AT + SHARD_STRIDE * shard
        heartbeat, since = atomic_load(reply + HEARTBEAT), now_ns()
        while not await_counter(reply, reply + REPLY_SLEEPERS, wanted, looks, _PARK_NS):
            beat = atomic_load(reply + HEARTBEAT)
            if beat != heartbeat:
                heartbeat, since = beat, now_ns()
            elif now_ns() - since > bound and is_before(atomic_load(reply), wanted):
                set_field(step, FAILED, shard + 1)
                return
        busy = max(busy, field(reply + BUSY_NS, 0))
    # This kernel's time is booked as waiting: what the slowest shard worked is the experts'.
    set_field(step, TIMES + EXPERTS_PART, field(step, TIMES + EXPERTS_PART) + busy)
    set_field(step, TIMES + WAIT_PART, field(step, TIMES + WAIT_PART) - busy)


@kernel
def add_partials(args: int, step: int, thread: int, threads: int) -> None:
    """x += the shards' partial sums, in the order of the shards.

    Record: x, x stride, hidden, partials, bytes of one shard's partials, shards.
    """
    chunks = field(args, 2) // 16
    first, last = share(field(step, N_ROWS) * chunks, thread, threads)
    for i in range(first, last):
        row, chunk = i // chunks, i % chunks
        x = field(args, 0) + row * field(args, 1) + 64 * chunk
        partial, total = field(args, 3) + 4 * row * field(args, 2) + 64 * chunk, v.load_f32(x)
        for shard in range(field(args, 5)):
            total = v.add(total, v.load_f32(partial + shard * field(args, 4)))
        v.store_f32(x, total)
