"""Attention over pages of KV: rotary embedding, appending to the cache, scores and values.

A page holds 256 tokens of every layer and KV head. For one head, keys then values, each of them
either float16:

    keys    [16 blocks, head_dim, 16 tokens]: a vector holds one dimension of sixteen tokens
    values  [head_dim / 16, 256 tokens, 16 dimensions]: both are read from front to end

or 8-bit (`kv_cells.py`), in the layout of packed Q8_0 weights, so that scores and weighted sums are
products like any other.

A query row attends page by page, with the online softmax of Milakov & Gimelshein 2018 between
pages, in order: its result is the same however the work is split. The query heads that share a KV
head are computed together, so each key and value is loaded once for all of them.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit

from numoe.engine.cpu import simd as v
from numoe.engine.cpu import tile
from numoe.engine.cpu.kv_cells import SCORES_STRIDE, append_f16, append_q8, q8_scores, q8_values
from numoe.engine.cpu.memory import field, float_field, inline
from numoe.engine.cpu.program import N_ROWS, PAGE_TABLE_STRIDE, PAGE_TABLES, POSITIONS, SLOTS, kernel, share
from numoe.engine.cpu.rows import activation_bytes, exp, quantize_row, rms_norm_row
from numoe.engine.kv.pages import PAGE_TOKENS

STATE_FLOATS = 16
"""Floats after a head's accumulator: its maximum, its sum, and padding."""
LEAST_EXPONENT = -60.0
"""Of a softmax weight: see `_softmax_weights`."""
PREFETCH_BYTES = 4096
"""How far ahead of its use a key or value is fetched: memory's latency at a core's share of the bandwidth."""


# Record of attend and attend_merge.
(
    Q, Q_STRIDE, OUT, OUT_STRIDE, KV_HEADS, GROUP, DIM, SCALE, POOL, PAGE_BYTES, HEAD_BYTES,
    SCRATCH, SCRATCH_BYTES, PARTS, PART_BYTES, MAX_PAGES, SPLIT_BELOW,
    KEY_BYTES, K_IS_Q8, V_IS_Q8, Q8_PRODUCT, Q8, Q8_HEAD_BYTES,
) = range(23)  # fmt: skip


@kernel
def rope_table(args: int, step: int, thread: int, threads: int) -> None:
    """The cosines and sines of each row's position.

    Record: frequencies float64 [half], half, magnitude, out float32 [rows, 2, half], its stride.
    """
    first, last = share(field(step, N_ROWS), thread, threads)
    half, magnitude = field(args, 1), float_field(args, 2)
    for row in range(first, last):
        position = v.load_scalar_i32(field(step, POSITIONS) + 4 * row)
        out = field(args, 3) + row * field(args, 4)
        for i in range(half):
            angle = position * v.load_scalar_f64(field(args, 0) + 8 * i)
            v.store_scalar_f32(out + 4 * i, np.float32(math.cos(angle) * magnitude))
            v.store_scalar_f32(out + 4 * (half + i), np.float32(math.sin(angle) * magnitude))


@inline
def _rotate(x: int, table: int, half: int, neox: int) -> None:
    """Rotate pairs of `x` float32: (i, i + half) in the NeoX style, else (2 i, 2 i + 1)."""
    step, offset = (4, 4 * half) if neox else (8, 4)
    for i in range(half):
        p = x + step * i
        a, b = v.load_scalar_f32(p), v.load_scalar_f32(p + offset)
        cos, sin = v.load_scalar_f32(table + 4 * i), v.load_scalar_f32(table + 4 * (half + i))
        v.store_scalar_f32(p, a * cos - b * sin)
        v.store_scalar_f32(p + offset, a * sin + b * cos)


@inline
def _page(step: int, row: int, number: int, pool: int, page_bytes: int) -> int:
    """The address of page `number` of the sequence that `row` belongs to."""
    slot = np.intp(v.load_scalar_i32(field(step, SLOTS) + 4 * row))
    entry = field(step, PAGE_TABLES) + slot * field(step, PAGE_TABLE_STRIDE) + 4 * number
    return pool + np.intp(v.load_scalar_i32(entry)) * page_bytes


@kernel
def rope_and_append(args: int, step: int, thread: int, threads: int) -> None:
    """Normalise (if the model does) and rotate queries and keys; write keys and values to their page.

    Record: q, q stride, k, k stride, v, v stride, heads, KV heads, head_dim, rope table, its stride,
    rotated half, neox, q norm or 0, k norm or 0, eps, pool + layer offset, page bytes, head bytes,
    bytes of a head's keys, whether keys and values are 8-bit, 8-bit queries or 0, bytes of a head's.
    """
    heads, kv_heads, dim = field(args, 6), field(args, 7), field(args, 8)
    units = heads + kv_heads
    first, last = share(field(step, N_ROWS) * units, thread, threads)
    for unit in range(first, last):
        row, head = unit // units, unit % units
        table = field(args, 9) + row * field(args, 10)
        is_key = head >= heads
        x, norm = field(args, 0) + row * field(args, 1) + 4 * dim * head, field(args, 13)
        if is_key:
            x, norm = field(args, 2) + row * field(args, 3) + 4 * dim * (head - heads), field(args, 14)
        if norm:
            rms_norm_row(x, norm, dim, float_field(args, 15), x)
        _rotate(x, table, field(args, 11), field(args, 12))
        if not is_key and field(args, 22):
            quantize_row(x, dim, field(args, 22) + (row * heads + head) * field(args, 23))
        if is_key:
            position = np.intp(v.load_scalar_i32(field(step, POSITIONS) + 4 * row))
            page = _page(step, row, position // PAGE_TOKENS, field(args, 16), field(args, 17))
            place = page + (head - heads) * field(args, 18)
            values = field(args, 4) + row * field(args, 5) + 4 * dim * (head - heads)
            token = position % PAGE_TOKENS
            if field(args, 20):
                append_q8(place, 0, token, dim, x)
            else:
                append_f16(place, 0, token, dim, x)
            if field(args, 21):
                append_q8(place + field(args, 19), 1, token, dim, values)
            else:
                append_f16(place + field(args, 19), 1, token, dim, values)


@inline
def _scores_of(acc: Any, queries: int, dim: int, keys: int, blocks: int, out: int) -> None:
    """Scores of as many query heads as `acc` has accumulators against `blocks` blocks of 16 tokens."""
    x = tile.tile_pointers(acc, queries)
    for block in range(blocks):
        total = acc
        for i in range(0, dim, 2):
            at = keys + 32 * (block * dim + i)
            v.prefetch(at + PREFETCH_BYTES)
            total = tile.tile_float(total, v.load_f16(at), x, i)
            total = tile.tile_float(total, v.load_f16(at + 32), x, i + 1)
        tile.tile_store(total, out + 64 * block, SCORES_STRIDE)


@inline
def _values_of(acc: Any, weights: int, dim: int, values: int, tokens: int, out: int, stride: int) -> None:
    """Sums of values weighted by as many heads' softmax weights as `acc` has accumulators."""
    x = tile.tile_pointers(acc, weights)
    for part in range(dim // 16):
        total, at = acc, values + 32 * PAGE_TOKENS * part
        for token in range(tokens):
            if token % 2 == 0:
                v.prefetch(at + 32 * token + PREFETCH_BYTES)
            total = tile.tile_float(total, v.load_f16(at + 32 * token), x, token)
        tile.tile_store(total, out + 64 * part, stride)


@inline
def _softmax_weights(scores: int, tokens: int, scale: float, state: int) -> None:
    """Scores to exp(scale * score - maximum) in place; maximum and sum to `state`.

    No exponent is below LEAST_EXPONENT: such a weight changes nothing, and its products with small
    values would be denormal numbers, which take processors a hundred times as long.
    """
    blocks = (tokens + 15) // 16
    largest = v.splat_f32(np.float32(-np.inf))
    for block in range(blocks):
        at = scores + 64 * block
        s = v.fill_from_lane(
            v.mul(v.load_f32(at), v.splat_f32(scale)), np.int32(tokens - 16 * block), np.float32(-np.inf)
        )
        v.store_f32(at, s)
        largest = v.maximum(largest, s)
    maximum = v.max_f32(largest)
    total = v.splat_f32(np.float32(0.0))
    for block in range(blocks):
        at = scores + 64 * block
        weight = exp(v.maximum(v.sub(v.load_f32(at), v.splat_f32(maximum)), v.splat_f32(LEAST_EXPONENT)))
        weight = v.fill_from_lane(weight, np.int32(tokens - 16 * block), np.float32(0.0))
        v.store_f32(at, weight)
        total = v.add(total, weight)
    v.store_scalar_f32(state, maximum)
    v.store_scalar_f32(state + 4, v.sum_f32(total))


@inline
def _f16_scores(queries: int, heads: int, dim: int, keys: int, blocks: int, scores: int) -> None:
    """Scores of all heads, whose queries' addresses lie at `queries`, eight or three or one at a time."""
    head = 0
    while heads - head >= 8:
        _scores_of(tile.tile_zero(8), queries + 8 * head, dim, keys, blocks, scores + head * SCORES_STRIDE)
        head += 8
    while heads - head >= 3:
        _scores_of(tile.tile_zero(3), queries + 8 * head, dim, keys, blocks, scores + head * SCORES_STRIDE)
        head += 3
    while heads - head >= 1:
        _scores_of(tile.tile_zero(1), queries + 8 * head, dim, keys, blocks, scores + head * SCORES_STRIDE)
        head += 1


@inline
def _f16_values(weights: int, heads: int, dim: int, values: int, tokens: int, out: int, stride: int) -> None:
    """Weighted sums of all heads, whose weights' addresses lie at `weights`."""
    head = 0
    while heads - head >= 8:
        _values_of(tile.tile_zero(8), weights + 8 * head, dim, values, tokens, out + head * stride, stride)
        head += 8
    while heads - head >= 3:
        _values_of(tile.tile_zero(3), weights + 8 * head, dim, values, tokens, out + head * stride, stride)
        head += 3
    while heads - head >= 1:
        _values_of(tile.tile_zero(1), weights + 8 * head, dim, values, tokens, out + head * stride, stride)
        head += 1


@njit(nogil=True, error_model="numpy")
def attend_page(args: int, q: int, q8: int, place: int, tokens: int, scratch: int, out: int) -> None:
    """Attention of a KV head's query heads to the first `tokens` tokens of a page.

    args: the record of `attend`. q: float32 [heads, dim]; q8: the same as 8-bit rows, if keys are
    8-bit. place: the head's keys and values. out: float32 [heads, dim + STATE_FLOATS]: unnormalised
    values, then maximum and sum. scratch: see `scratch_bytes`.
    """
    heads, dim, product = field(args, GROUP), field(args, DIM), field(args, Q8_PRODUCT)
    pointers, rows = scratch + heads * SCORES_STRIDE, scratch + heads * (SCORES_STRIDE + 8)
    blocks, stride = (tokens + 15) // 16, 4 * (dim + STATE_FLOATS)
    if field(args, K_IS_Q8):
        for head in range(heads):
            v.store_scalar_i64(pointers + 8 * head, q8 + head * field(args, Q8_HEAD_BYTES))
        q8_scores(product, pointers, heads, dim, place, blocks, scratch)
    else:
        for head in range(heads):
            v.store_scalar_i64(pointers + 8 * head, q + 4 * dim * head)
        _f16_scores(pointers, heads, dim, place, blocks, scratch)
    for head in range(heads):
        state = out + head * stride + 4 * dim
        _softmax_weights(scratch + head * SCORES_STRIDE, tokens, float_field(args, SCALE), state)
    values = place + field(args, KEY_BYTES)
    if field(args, V_IS_Q8):
        q8_values(product, scratch, heads, dim, values, tokens, pointers, rows, out, stride)
    else:
        for head in range(heads):
            v.store_scalar_i64(pointers + 8 * head, scratch + head * SCORES_STRIDE)
        _f16_values(pointers, heads, dim, values, tokens, out, stride)


def scratch_bytes(heads: int) -> int:
    """Bytes of scratch that `attend_page` takes: scores, row addresses, 8-bit softmax weights."""
    return heads * (SCORES_STRIDE + 8 + activation_bytes(PAGE_TOKENS, "q8"))


@inline
def _merge(total: int, part: int, dim: int) -> None:
    """Fold one page's result for one head into the running result."""
    old, new = v.load_scalar_f32(total + 4 * dim), v.load_scalar_f32(part + 4 * dim)
    maximum = max(old, new)
    least = np.float32(LEAST_EXPONENT)
    a, b = exp(v.splat_f32(max(old - maximum, least))), exp(v.splat_f32(max(new - maximum, least)))
    for i in range(0, 4 * dim, 64):
        v.store_f32(total + i, v.fma(v.load_f32(total + i), a, v.mul(v.load_f32(part + i), b)))
    sums = v.load_scalar_f32(total + 4 * dim + 4), v.load_scalar_f32(part + 4 * dim + 4)
    v.store_scalar_f32(total + 4 * dim, maximum)
    v.store_scalar_f32(total + 4 * dim + 4, v.first_f32(a) * sums[0] + v.first_f32(b) * sums[1])


@inline
def _start(total: int, heads: int, dim: int) -> None:
    """An empty running result."""
    for head in range(heads):
        at = total + 4 * head * (dim + STATE_FLOATS)
        for i in range(0, 4 * dim, 64):
            v.store_f32(at + i, v.splat_f32(np.float32(0.0)))
        v.store_scalar_f32(at + 4 * dim, np.float32(-np.inf))
        v.store_scalar_f32(at + 4 * dim + 4, np.float32(0.0))


@inline
def _finish(total: int, heads: int, dim: int, out: int) -> None:
    """Normalised values, float32 [heads, dim], at `out`."""
    for head in range(heads):
        at = total + 4 * head * (dim + STATE_FLOATS)
        inverse = v.splat_f32(np.float32(1.0) / v.load_scalar_f32(at + 4 * dim + 4))
        for i in range(0, 4 * dim, 64):
            v.store_f32(out + 4 * dim * head + i, v.mul(v.load_f32(at + i), inverse))


@inline
def _is_split(args: int, step: int) -> bool:
    """Whether there are so few (row, KV head) pairs that pages are shared out as well."""
    return field(step, N_ROWS) * field(args, KV_HEADS) < field(args, SPLIT_BELOW)


@inline
def _pages_of(step: int, row: int) -> int:
    position = np.intp(v.load_scalar_i32(field(step, POSITIONS) + 4 * row))
    return position // PAGE_TOKENS + 1


@inline
def _attend_one(args: int, step: int, row: int, kv_head: int, number: int, scratch: int, out: int) -> None:
    """Page `number` for one row and KV head."""
    dim, group = field(args, DIM), field(args, GROUP)
    position = np.intp(v.load_scalar_i32(field(step, POSITIONS) + 4 * row))
    tokens = min(PAGE_TOKENS, position + 1 - number * PAGE_TOKENS)
    page = _page(step, row, number, field(args, POOL), field(args, PAGE_BYTES))
    q = field(args, Q) + row * field(args, Q_STRIDE) + 4 * dim * group * kv_head
    q8 = field(args, Q8) + (row * field(args, KV_HEADS) + kv_head) * group * field(args, Q8_HEAD_BYTES)
    attend_page(args, q, q8, page + kv_head * field(args, HEAD_BYTES), tokens, scratch, out)


@inline
def _merge_heads(total: int, part: int, heads: int, dim: int) -> None:
    for head in range(heads):
        offset = 4 * head * (dim + STATE_FLOATS)
        _merge(total + offset, part + offset, dim)


@kernel
def attend(args: int, step: int, thread: int, threads: int) -> None:
    """Attention of every row; with few rows, only each page's part of it (see attend_merge)."""
    rows, kv_heads, group, dim = field(step, N_ROWS), field(args, KV_HEADS), field(args, GROUP), field(args, DIM)
    total = field(args, SCRATCH) + thread * field(args, SCRATCH_BYTES)
    part = total + 4 * group * (dim + STATE_FLOATS)
    scratch = part + 4 * group * (dim + STATE_FLOATS)
    if _is_split(args, step):
        # Round robin over all (row, KV head, page): neighbours take about equally long.
        unit = 0
        for row in range(rows):
            for kv_head in range(kv_heads):
                for number in range(_pages_of(step, row)):
                    if unit % threads == thread:
                        at = (row * kv_heads + kv_head) * field(args, MAX_PAGES) + number
                        out = field(args, PARTS) + at * field(args, PART_BYTES)
                        _attend_one(args, step, row, kv_head, number, scratch, out)
                    unit += 1
        return
    for unit in range(thread, rows * kv_heads, threads):
        row, kv_head = unit // kv_heads, unit % kv_heads
        _start(total, group, dim)
        for number in range(_pages_of(step, row)):
            _attend_one(args, step, row, kv_head, number, scratch, part)
            _merge_heads(total, part, group, dim)
        _finish(total, group, dim, field(args, OUT) + row * field(args, OUT_STRIDE) + 4 * dim * group * kv_head)


@kernel
def attend_merge(args: int, step: int, thread: int, threads: int) -> None:
    """Put together the pages' parts where `attend` was split."""
    if not _is_split(args, step):
        return
    kv_heads, group, dim = field(args, KV_HEADS), field(args, GROUP), field(args, DIM)
    total = field(args, SCRATCH) + thread * field(args, SCRATCH_BYTES)
    for unit in range(thread, field(step, N_ROWS) * kv_heads, threads):
        row, kv_head = unit // kv_heads, unit % kv_heads
        _start(total, group, dim)
        for number in range(_pages_of(step, row)):
            part = field(args, PARTS) + (unit * field(args, MAX_PAGES) + number) * field(args, PART_BYTES)
            _merge_heads(total, part, group, dim)
        _finish(total, group, dim, field(args, OUT) + row * field(args, OUT_STRIDE) + 4 * dim * group * kv_head)
