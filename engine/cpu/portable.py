"""KV pages to canonical bytes (`store/portable.py`) and back, as fast as memory goes, without the GIL.

`transfer` is for the CPU's pages (`attention.py`, `kv_cells.py`), `transfer_interleaved` for the bytes
of a GPU's (`gpu/cuda/kv.cuh`), whose canonical bytes differ in the order of a token's codes and in
the bias of 8-bit ones.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit, types

from numoe.engine.cpu import simd as v
from numoe.engine.cpu.memory import field, inline, record
from numoe.engine.kv.pages import PAGE_TOKENS

KINDS = ("f16", "q8_0", "q4_0")
_Q8, _Q4 = 1, 2
_HEADS, _DIM, _KEYS, _VALUES, _KEY_BYTES, _HEAD_BYTES = range(6)
_TILE = 544  # bytes of 16 x 32 packed Q8_0 weights: 8 rows of 16 words, 16 float16 scales
_SCALES = 512  # where a tile's scales lie
_COLUMNS = PAGE_TOKENS // 32
_ONE = np.int16(0x3C00)  # float16
_SIGNS = np.int32(-0x7F7F7F80)  # 0x80808080
_BIAS = 128

_signature = (types.intp,) * 6


def page_record(
    heads: int, dim: int, kinds: tuple[str, str], key_bytes: int, head_bytes: int
) -> npt.NDArray[np.int64]:
    """What the kernels are told of pages. kinds: of keys and values; key_bytes, head_bytes: as of the pool."""
    keys, values = (KINDS.index(kind) for kind in kinds)
    return record([heads, dim, keys, values, key_bytes, head_bytes])


@inline
def _row_bytes(kind: int, dim: int) -> int:
    """Canonical bytes of a token's keys, or values, of one head."""
    if kind == _Q8:
        return dim + dim // 16
    return dim // 2 + dim // 16 if kind == _Q4 else 2 * dim


# --- the CPU's pages --------------------------------------------------------------------------------


@inline
def _f16_keys(cell: int, rows: int, dim: int, tokens: int, to_page: int) -> None:
    """Blocks [dim, 16 tokens] and rows [tokens, dim]."""
    for token in range(0, tokens - 7, 8):
        block, row = cell + 32 * dim * (token // 16) + 2 * (token % 16), rows + 2 * dim * token
        for i in range(0, dim, 8):
            if to_page:
                v.transpose_8x8_i16(row + 2 * i, 2 * dim, block + 32 * i, 32)
            else:
                v.transpose_8x8_i16(block + 32 * i, 32, row + 2 * i, 2 * dim)
    for token in range(tokens // 8 * 8, tokens):
        block, row = cell + 32 * dim * (token // 16) + 2 * (token % 16), rows + 2 * dim * token
        for i in range(dim):
            _move16(block + 32 * i, row + 2 * i, to_page)


@inline
def _f16_values(cell: int, rows: int, dim: int, tokens: int, to_page: int) -> None:
    """Groups [256 tokens, 16 dimensions] and rows [tokens, dim]."""
    for token in range(tokens):
        for group in range(dim // 16):
            at, row = cell + 32 * (PAGE_TOKENS * group + token), rows + 2 * (dim * token + 16 * group)
            if to_page:
                v.copy(at, row, 32)
            else:
                v.copy(row, at, 32)


@inline
def _move16(cell: int, row: int, to_page: int) -> None:
    if to_page:
        v.store_scalar_i16(cell, v.load_scalar_i16(row))
    else:
        v.store_scalar_i16(row, v.load_scalar_i16(cell))


@inline
def _move_word(cell: int, row: int, to_page: int) -> None:
    """Four codes, which are biased in a page."""
    if to_page:
        v.store_scalar_i32(cell, v.load_scalar_i32(row) ^ _SIGNS)
    else:
        v.store_scalar_i32(row, v.load_scalar_i32(cell) ^ _SIGNS)


@inline
def _q8_keys(cell: int, rows: int, dim: int, tokens: int, to_page: int) -> None:
    """Tiles of 16 tokens by 32 dimensions, words [8, 16 tokens], and rows [tokens, dim]; scales of both."""
    blocks = dim // 32
    scales = rows + tokens * dim
    for token in range(0, tokens - 3, 4):
        for block in range(blocks):
            tile = cell + (token // 16 * blocks + block) * _TILE + 4 * (token % 16)
            row = rows + token * dim + 32 * block
            if to_page:
                v.transpose_4x4_words(row, dim, tile, 64)
                v.transpose_4x4_words(row + 16, dim, tile + 256, 64)
            else:
                v.transpose_4x4_words(tile, 64, row, dim)
                v.transpose_4x4_words(tile + 256, 64, row + 16, dim)
    for token in range(tokens // 4 * 4, tokens):
        for block in range(blocks):
            tile = cell + (token // 16 * blocks + block) * _TILE + 4 * (token % 16)
            row = rows + token * dim + 32 * block
            for i in range(8):
                _move_word(tile + 64 * i, row + 4 * i, to_page)
    for token in range(tokens):
        tile = cell + token // 16 * blocks * _TILE + _SCALES + 2 * (token % 16)
        for block in range(blocks):
            _move16(tile + block * _TILE, scales + 2 * (token * blocks + block), to_page)


@inline
def _q8_values(cell: int, rows: int, dim: int, tokens: int, to_page: int) -> None:
    """Tiles of 16 dimensions by 32 tokens, words [8, 16] of four tokens, and rows [tokens, dim]."""
    for token in range(0, tokens - 3, 4):
        tile, row = cell + token // 32 * _TILE + 64 * (token % 32 // 4), rows + token * dim
        for group in range(dim // 16):
            if to_page:
                v.rows_to_quads(row + 16 * group, dim, tile + group * _COLUMNS * _TILE, 16)
            else:
                v.quads_to_rows(tile + group * _COLUMNS * _TILE, 16, row + 16 * group, dim)
    for token in range(tokens // 4 * 4, tokens):
        for i in range(dim):
            at, row = _value_code(cell, token, i), rows + token * dim + i
            if to_page:
                v.store_scalar_u8(at, np.intp(v.load_scalar_u8(row)) ^ _BIAS)
            else:
                v.store_scalar_u8(row, np.intp(v.load_scalar_u8(at)) ^ _BIAS)
    token_scales, scales = cell + dim // 16 * _COLUMNS * _TILE, rows + tokens * dim
    if to_page:
        _take_value_scales(cell, token_scales, rows, scales, dim, tokens)
        return
    for token in range(tokens):
        scale = v.load_scalar_i16(token_scales + 2 * token)
        for block in range(dim // 32):
            v.store_scalar_i16(scales + 2 * (token * (dim // 32) + block), scale)


@inline
def _value_code(cell: int, token: int, i: int) -> int:
    """Where dimension `i` of a value lies."""
    return cell + (i // 16 * _COLUMNS + token // 32) * _TILE + 64 * (token % 32 // 4) + 4 * (i % 16) + token % 4


@inline
def _take_value_scales(cell: int, token_scales: int, rows: int, scales: int, dim: int, tokens: int) -> None:
    """A token's scale: the one that all its blocks have, or else the largest, for which its codes are rounded anew."""
    blocks = dim // 32
    for column in range((tokens + 31) // 32):
        for group in range(dim // 16):
            at = cell + (group * _COLUMNS + column) * _TILE + _SCALES
            for i in range(16):
                v.store_scalar_i16(at + 2 * i, _ONE)
    for token in range(tokens):
        at = scales + 2 * blocks * token
        first, largest, same = v.load_scalar_i16(at), v.load_scalar_f16(at), True
        largest_at = at
        for block in range(1, blocks):
            same = same and v.load_scalar_i16(at + 2 * block) == first
            if v.load_scalar_f16(at + 2 * block) > largest:
                largest, largest_at = v.load_scalar_f16(at + 2 * block), at + 2 * block
        v.store_scalar_i16(token_scales + 2 * token, v.load_scalar_i16(largest_at))
        if same:
            continue
        for i in range(dim):
            code = np.float32(np.int8(v.load_scalar_u8(rows + token * dim + i)))
            number = code * v.load_scalar_f16(at + 2 * (i // 32))
            v.store_scalar_u8(_value_code(cell, token, i), np.intp(round(number / largest)) ^ _BIAS)


@inline
def _cell(kind: int, values: int, cell: int, rows: int, dim: int, tokens: int, to_page: int) -> None:
    """One head's keys, or values."""
    if kind == _Q8:
        if values:
            _q8_values(cell, rows, dim, tokens, to_page)
        else:
            _q8_keys(cell, rows, dim, tokens, to_page)
    elif values:
        _f16_values(cell, rows, dim, tokens, to_page)
    else:
        _f16_keys(cell, rows, dim, tokens, to_page)


@njit(nogil=True, error_model="numpy", cache=True)
def transfer(args: int, page: int, rows_of: int, layers: int, tokens: int, to_page: int) -> None:
    """Copy the first `tokens` tokens between layers of one of the CPU's pages and canonical bytes.

    args: of `page_record`. page: the first layer. rows_of: int64 [layers], where each layer's canonical bytes
    are. to_page: which way. All but the last three are addresses.
    """
    dim, keys, values, key_bytes = field(args, _DIM), field(args, _KEYS), field(args, _VALUES), field(args, _KEY_BYTES)
    for layer in range(layers):
        rows = field(rows_of, layer)
        for _ in range(field(args, _HEADS)):
            _cell(keys, 0, page, rows, dim, tokens, to_page)
            rows += tokens * _row_bytes(keys, dim)
            _cell(values, 1, page + key_bytes, rows, dim, tokens, to_page)
            rows += tokens * _row_bytes(values, dim)
            page += field(args, _HEAD_BYTES)


# --- a GPU's pages ----------------------------------------------------------------------------------


@inline
def _copy(cell: int, rows: int, nbytes: int, to_page: int) -> None:
    if to_page:
        v.copy(cell, rows, nbytes)
    else:
        v.copy(rows, cell, nbytes)


@inline
def _interleaved(kind: int, cell: int, rows: int, dim: int, tokens: int, to_page: int) -> None:
    """One head's keys, or values: fours of codes [tokens, 8, blocks] and [tokens, blocks, 8], scales behind."""
    blocks = dim // 32
    if kind == _Q8:
        for token in range(tokens):
            at, row = cell + token * dim, rows + token * dim
            for block in range(blocks):
                for i in range(8):
                    _move_word(at + 4 * (i * blocks + block), row + 32 * block + 4 * i, to_page)
        _copy(cell + PAGE_TOKENS * dim, rows + tokens * dim, 2 * tokens * blocks, to_page)
    elif kind == _Q4:
        for token in range(tokens):
            at, row = cell + token * (dim // 2), rows + token * (dim // 2)
            for block in range(blocks):
                for i in range(8):
                    _move16(at + 2 * (i * blocks + block), row + 16 * block + 2 * i, to_page)
        _copy(cell + PAGE_TOKENS * dim // 2, rows + tokens * dim // 2, 2 * tokens * blocks, to_page)
    else:
        _copy(cell, rows, 2 * tokens * dim, to_page)


@njit(nogil=True, error_model="numpy", cache=True)
def transfer_interleaved(args: int, page: int, rows_of: int, layers: int, tokens: int, to_page: int) -> None:
    """As `transfer`, for the bytes of a GPU's page in host memory."""
    dim, keys, values, key_bytes = field(args, _DIM), field(args, _KEYS), field(args, _VALUES), field(args, _KEY_BYTES)
    for layer in range(layers):
        rows = field(rows_of, layer)
        for _ in range(field(args, _HEADS)):
            _interleaved(keys, page, rows, dim, tokens, to_page)
            rows += tokens * _row_bytes(keys, dim)
            _interleaved(values, page + key_bytes, rows, dim, tokens, to_page)
            rows += tokens * _row_bytes(values, dim)
            page += field(args, _HEAD_BYTES)


def prepare(kernel: Any) -> None:
    """Compile one of these, or find it in the cache, before its first use."""
    kernel.compile(_signature)
