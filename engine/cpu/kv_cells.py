"""How keys and values of one head lie in a page: writing a token, and 8-bit scores and sums.

8-bit keys are sixteen groups of 16 tokens, each packed as a group of Q8_0 weights is: 16 rows
(tokens) by head_dim columns, a float16 scale for each token and 32 dimensions. Scores are then the
product of that matrix with the query, itself rounded to 8 bits.

8-bit values are packed the other way round: 16 rows (dimensions) by 256 columns (tokens). A value
has one scale for all of its dimensions, which cannot be that of a row of this matrix; it is
multiplied into the softmax weight of its token instead, before those are rounded to 8 bits, and the
matrix' own scales are one. The float16 scales of the 256 values follow the codes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from numoe.engine.cpu import simd as v
from numoe.engine.cpu.memory import inline
from numoe.engine.cpu.sync import call_product
from numoe.engine.cpu.tile import META_BYTES
from numoe.engine.kv.pages import PAGE_TOKENS

SCORES_STRIDE = 4 * PAGE_TOKENS
_TILE = 544  # bytes of 16 x 32 packed Q8_0 weights
_COLUMNS = PAGE_TOKENS // 32  # value tiles side by side
_SCALES = 512  # where a tile's float16 scales lie
_ROW = PAGE_TOKENS + PAGE_TOKENS // 32 * META_BYTES  # bytes of a page's softmax weights as an 8-bit row


def cell_bytes(kind: str, dim: int, *, values: bool) -> int:
    """Bytes of one head's keys, or values, in a page; kind is "f16" or "q8_0"."""
    if kind == "f16":
        return 2 * PAGE_TOKENS * dim
    return PAGE_TOKENS * dim // 512 * _TILE + (2 * PAGE_TOKENS if values else 0)


@inline
def append_f16(place: int, is_value: int, token: int, dim: int, x: int) -> None:
    """Write one token's key or value, float32 [dim] at `x`, as float16."""
    if is_value:
        for i in range(0, dim, 16):
            v.store_f16(place + 2 * (PAGE_TOKENS * i + 16 * token), v.load_f32(x + 4 * i))
    else:
        keys = place + token // 16 * 32 * dim + 2 * (token % 16)
        for i in range(dim):
            v.store_scalar_f16(keys + 32 * i, v.load_scalar_f32(x + 4 * i))


@inline
def _scale_of(x: int, count: int) -> float:
    """The scale that brings `count` float32 to within 127; at least float16's smallest normal number."""
    largest = v.splat_f32(np.float32(0.0))
    for i in range(0, 4 * count, 64):
        largest = v.maximum(largest, v.absolute(v.load_f32(x + i)))
    return max(v.max_f32(largest) / np.float32(127.0), np.float32(6.2e-5))


@inline
def _code(x: float, inverse: float) -> int:
    """x * inverse, rounded and biased to an unsigned byte."""
    return np.intp(min(max(round(x * inverse), -127), 127)) ^ 128


@inline
def append_q8(place: int, is_value: int, token: int, dim: int, x: int) -> None:
    """Write one token's key or value, float32 [dim] at `x`, as 8-bit codes."""
    if is_value:
        _append_q8_value(place, token, dim, x)
        return
    for block in range(dim // 32):
        source, tile = x + 128 * block, place + (token // 16 * (dim // 32) + block) * _TILE
        scale_at = tile + _SCALES + 2 * (token % 16)
        v.store_scalar_f16(scale_at, _scale_of(source, 32))
        inverse = np.float32(1.0) / v.load_scalar_f16(scale_at)
        for i in range(32):
            code = _code(v.load_scalar_f32(source + 4 * i), inverse)
            v.store_scalar_u8(tile + 64 * (i // 4) + 4 * (token % 16) + i % 4, code)


@inline
def _append_q8_value(place: int, token: int, dim: int, x: int) -> None:
    scale_at = place + dim // 16 * _COLUMNS * _TILE + 2 * token
    v.store_scalar_f16(scale_at, _scale_of(x, dim))
    inverse = np.float32(1.0) / v.load_scalar_f16(scale_at)
    for i in range(dim):
        tile = place + (i // 16 * _COLUMNS + token // 32) * _TILE
        code = _code(v.load_scalar_f32(x + 4 * i), inverse)
        v.store_scalar_u8(tile + 64 * (token % 32 // 4) + 4 * (i % 16) + token % 4, code)
    if token % 32 == 0:
        _unit_scales(place, token // 32, dim)


@inline
def _unit_scales(place: int, column: int, dim: int) -> None:
    """Set the scales of a column of value tiles to one."""
    for group in range(dim // 16):
        scales = place + (group * _COLUMNS + column) * _TILE + _SCALES
        v.store_f16(scales, v.splat_f32(np.float32(1.0)))


@inline
def q8_scores(product: int, queries: int, heads: int, dim: int, keys: int, blocks: int, scores: int) -> None:
    """Scores of `heads` queries, 8-bit rows whose addresses lie at `queries`, against blocks of 16 tokens."""
    group_bytes = dim // 32 * _TILE
    ahead = keys + blocks * group_bytes
    call_product(product, keys, group_bytes, blocks, dim // 32, 0, queries, heads, scores, SCORES_STRIDE, ahead)


@inline
def _quantize_weights(a: Any, b: Any, codes: int, meta: int) -> None:
    """As `quantize_block`, for 32 numbers that are not negative, and with the sum of all codes only."""
    largest = v.max_f32(v.maximum(a, b))
    inverse = np.float32(127.0) / largest if largest > np.float32(0.0) else np.float32(0.0)
    qa = v.round_to_i32(v.mul(a, v.splat_f32(inverse)))
    qb = v.round_to_i32(v.mul(b, v.splat_f32(inverse)))
    v.store_i32_as_s8(codes, qa)
    v.store_i32_as_s8(codes + 16, qb)
    v.store_scalar_f32(meta, largest * np.float32(1.0 / 127.0))
    v.store_scalar_i32(meta + 4, v.sum_i32(v.add_i32(qa, qb)))


@njit(nogil=True, error_model="numpy")
def q8_values(
    product: int, weights: int, heads: int, dim: int, values: int, tokens: int,
    pointers: int, rows: int, out: int, stride: int,
) -> None:  # fmt: skip
    """Sums of values weighted by float32 [heads, 256] at `weights`, to float32 [heads, dim] at `out`.

    pointers, rows: room for int64 [heads] and for `heads` 8-bit rows of 256.
    """
    blocks, scales = (tokens + 31) // 32, values + dim // 16 * _COLUMNS * _TILE
    for head in range(heads):
        row, source = rows + head * _ROW, weights + head * SCORES_STRIDE
        v.store_scalar_i64(pointers + 8 * head, row)
        for block in range(blocks):
            at, left = scales + 64 * block, np.int32(tokens - 32 * block)
            first = v.mul(v.load_f32(source + 128 * block), v.load_f16(at))
            second = v.mul(v.load_f32(source + 128 * block + 64), v.load_f16(at + 32))
            # What lies beyond the last token was never written.
            first = v.fill_from_lane(first, left, np.float32(0.0))
            second = v.fill_from_lane(second, np.int32(left - 16), np.float32(0.0))
            _quantize_weights(first, second, row + 32 * block, row + 32 * blocks + META_BYTES * block)
    group_bytes, groups = _COLUMNS * _TILE, dim // 16
    ahead = values + groups * group_bytes
    call_product(product, values, group_bytes, groups, blocks, 0, pointers, heads, out, stride, ahead)
