"""Packing GGUF rows into the layouts that the products read, as fast as memory goes.

`formats/pack.py` says the same in NumPy, slowly. Here a block of one row becomes eight words of
four codes each, which are dealt out to the row's places in the tile with 32-bit arithmetic.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as QuantType
from numba import cfunc, types
from numba.extending import overload

from numoe.engine.cpu import simd as v
from numoe.engine.cpu.memory import address, aligned_bytes, inline
from numoe.engine.formats.layouts import packed_format
from numoe.engine.formats.pack import shape_of

pack_signature = types.void(*[types.intp] * 9)
_LOW = np.uint32(0x0F0F0F0F)
_ONES = np.uint32(0x01010101)
_TWOS = np.uint32(0x03030303)
_SIGNS = np.uint32(0x80808080)


@inline
def _u32(p: int) -> int:
    return np.uint32(v.load_scalar_i32(p))


@inline
def _put(p: int, word: int) -> None:
    v.store_scalar_i32(p, np.int32(word))


@inline
def _u8(p: int) -> int:
    return np.intp(v.load_scalar_u8(p))


@inline
def _put_low_nibbles(tile: int, row: int, j: int, first: int, second: int) -> None:
    """Words 2 j and 2 j + 1 of a row: their low nibbles share 4 bytes."""
    _put(tile + 64 * j + 4 * row, (first & _LOW) | ((second & _LOW) << np.uint32(4)))


@inline
def _put_bit4(plane: int, row: int, word_number: int, word: int) -> None:
    """Bit 4 of four codes: a nibble of the plane; rows come in ascending order."""
    # The product gathers one bit of each byte in the top byte.
    bits = np.intp((((word >> np.uint32(4)) & _ONES) * np.uint32(0x01020408)) >> np.uint32(24)) & 15
    p = plane + 8 * word_number + row // 2
    v.store_scalar_u8(p, _u8(p) | bits << 4 if row % 2 else bits)


@inline
def _two_bit_field(high: int, shift: int, part: int) -> int:
    """Two bits, at 2 * part of each byte at `high`, moved to `shift`."""
    return ((_u32(high) >> np.uint32(2 * part)) & _TWOS) << np.uint32(shift)


@inline
def _put_half(p: int, row: int, value: int) -> None:
    """A 4-bit value: rows 0..7 the low halves of 8 bytes, rows 8..15 the high ones."""
    at = p + row % 8
    v.store_scalar_u8(at, _u8(at) | value << 4 if row >= 8 else value)


@inline
def _copy16(source: int, target: int) -> None:
    v.store_scalar_i16(target, v.load_scalar_i16(source))


@inline
def _fifth(bits: int, word_number: int) -> int:
    """Bits 4 j .. 4 j + 3 of `bits`, as bit 4 of each byte of a word."""
    four = (bits >> np.uint32(4 * word_number)) & np.uint32(15)
    return ((four * np.uint32(0x00204081)) & _ONES) << np.uint32(4)


@inline
def _pack_nibbles(qs: int, tile: int, row: int) -> None:
    """16 bytes: the low halves are columns 0..15, the high ones 16..31."""
    for j in range(2):
        a, b = _u32(qs + 8 * j), _u32(qs + 8 * j + 4)
        _put_low_nibbles(tile, row, j, a, b)
        _put_low_nibbles(tile, row, j + 2, a >> np.uint32(4), b >> np.uint32(4))


@inline
def _pack_k_scales(source: int, block: int, tile: int, row: int) -> None:
    """The 6-bit scale and minimum of block `block` of 8, from the 12 bytes at `source`."""
    if block < 4:
        scale, minimum = _u8(source + block) & 63, _u8(source + 4 + block) & 63
    else:
        high = _u8(source + 4 + block)
        scale = (high & 15) | (_u8(source + block - 4) >> 6 << 4)
        minimum = (high >> 4) | (_u8(source + block) >> 6 << 4)
    v.store_scalar_u8(tile + row, (scale & 15) | (minimum & 15) << 4)
    _put_half(tile + 16, row, scale >> 4 | minimum >> 4 << 2)


@inline
def _pack_two_bits(qs: int, part: int, tile: int, row: int) -> None:
    """Field `part` of each of 32 bytes, to the fields of two planes."""
    for plane in range(2):
        at = qs + 16 * plane
        first, second = _two_bit_field(at, 0, part), _two_bit_field(at + 4, 2, part)
        third, fourth = _two_bit_field(at + 8, 4, part), _two_bit_field(at + 12, 6, part)
        _put(tile + 64 * plane + 4 * row, first | second | third | fourth)


@inline
def _q3_scale(source: int, number: int) -> int:
    """One of the sixteen 6-bit scales that Q3_K keeps in 12 bytes."""
    low = _u8(source + number % 8) >> (number // 8 * 4) & 15
    return low | (_u8(source + 8 + number % 4) >> (number // 4 * 2) & 3) << 4


def pack_block(name: Any, source: int, block: int, tile: int, shared: int, row: int) -> None:
    """Deal out one row's 32 columns to a tile.

    source: the file's block; block: which 32 columns of it. shared: the tile's super, written by
    whichever of its blocks come. Rows of a tile come in ascending order.
    """
    raise AssertionError("only for compiled code")


@overload(pack_block, prefer_literal=True, strict=False, jit_options={"forceinline": True, "nogil": True})
def _pack_block(name: Any, source: Any, block: Any, tile: Any, shared: Any, row: Any) -> Any:
    if not isinstance(name, types.StringLiteral):
        return None
    return _IMPLEMENTATIONS[QuantType[name.literal_value]]


def _float(size: int) -> Any:
    def pack(name: Any, source: int, block: int, tile: int, shared: int, row: int) -> None:
        for column in range(32):
            at = tile + size * (16 * column + row)
            if size == 4:
                v.store_scalar_i32(at, v.load_scalar_i32(source + 4 * column))
            else:
                v.store_scalar_i16(at, v.load_scalar_i16(source + 2 * column))

    return pack


def _q8_0(name: Any, source: int, block: int, tile: int, shared: int, row: int) -> None:
    for j in range(8):
        _put(tile + 64 * j + 4 * row, _u32(source + 2 + 4 * j) ^ _SIGNS)
    _copy16(source, tile + 512 + 2 * row)


def _four_bits(head: int) -> Any:
    """Formats of `head` bytes of scale (and minimum), then 16 bytes of codes."""

    def pack(name: Any, source: int, block: int, tile: int, shared: int, row: int) -> None:
        _pack_nibbles(source + head, tile, row)
        for i in range(head // 2):
            _copy16(source + 2 * i, tile + 256 + 32 * i + 2 * row)

    return pack


def _five_bits(head: int) -> Any:
    def pack(name: Any, source: int, block: int, tile: int, shared: int, row: int) -> None:
        bits = _u32(source + head)
        _pack_nibbles(source + head + 4, tile, row)
        for j in range(8):
            _put_bit4(tile + 256, row, j, _fifth(bits, j))
        for i in range(head // 2):
            _copy16(source + 2 * i, tile + 320 + 32 * i + 2 * row)

    return pack


def _q2_k(name: Any, source: int, block: int, tile: int, shared: int, row: int) -> None:
    qs = source + 16 + 32 * (block // 4)
    _pack_two_bits(qs, block % 4, tile, row)
    v.store_scalar_u8(tile + 128 + row, _u8(source + 2 * block))
    v.store_scalar_u8(tile + 144 + row, _u8(source + 2 * block + 1))
    _copy16(source + 80, shared + 2 * row)
    _copy16(source + 82, shared + 32 + 2 * row)


def _q3_k(name: Any, source: int, block: int, tile: int, shared: int, row: int) -> None:
    _pack_two_bits(source + 32 + 32 * (block // 4), block % 4, tile, row)
    for j in range(8):
        high = (_u32(source + 4 * j) >> np.uint32(block)) & _ONES
        _put_bit4(tile + 128, row, j, high << np.uint32(4))
    first, second = _q3_scale(source + 96, 2 * block), _q3_scale(source + 96, 2 * block + 1)
    v.store_scalar_u8(tile + 192 + row, (first & 15) | (second & 15) << 4)
    _put_half(tile + 208, row, first >> 4 | second >> 4 << 2)
    _copy16(source + 108, shared + 2 * row)


def _mxfp4(name: Any, source: int, block: int, tile: int, shared: int, row: int) -> None:
    _pack_nibbles(source + 1, tile, row)
    v.store_scalar_u8(tile + 256 + row, _u8(source))


def _q4_k(name: Any, source: int, block: int, tile: int, shared: int, row: int) -> None:
    qs, shift = source + 16 + 32 * (block // 2), np.uint32(4 * (block % 2))
    for j in range(4):
        _put_low_nibbles(tile, row, j, _u32(qs + 8 * j) >> shift, _u32(qs + 8 * j + 4) >> shift)
    _pack_k_scales(source + 4, block, tile + 256, row)
    _copy16(source, shared + 2 * row)
    _copy16(source + 2, shared + 32 + 2 * row)


def _q5_k(name: Any, source: int, block: int, tile: int, shared: int, row: int) -> None:
    qs, shift = source + 48 + 32 * (block // 2), np.uint32(4 * (block % 2))
    for j in range(4):
        _put_low_nibbles(tile, row, j, _u32(qs + 8 * j) >> shift, _u32(qs + 8 * j + 4) >> shift)
    for j in range(8):
        fifth = (_u32(source + 16 + 4 * j) >> np.uint32(block)) & _ONES
        _put_bit4(tile + 256, row, j, fifth << np.uint32(4))
    _pack_k_scales(source + 4, block, tile + 320, row)
    _copy16(source, shared + 2 * row)
    _copy16(source + 2, shared + 32 + 2 * row)


def _q6_k(name: Any, source: int, block: int, tile: int, shared: int, row: int) -> None:
    # Per 128 columns: 64 bytes of low nibbles (columns 0..63 low, 64..127 high), 32 of high bits.
    part = block % 4
    low, shift = source + 64 * (block // 4) + 32 * (part % 2), np.uint32(4 * (part // 2))
    high = source + 128 + 32 * (block // 4)
    for j in range(4):
        _put_low_nibbles(tile, row, j, _u32(low + 8 * j) >> shift, _u32(low + 8 * j + 4) >> shift)
    _pack_two_bits(high, part, tile + 256, row)
    v.store_scalar_u8(tile + 384 + row, _u8(source + 192 + 2 * block))
    v.store_scalar_u8(tile + 400 + row, _u8(source + 193 + 2 * block))
    _copy16(source + 208, shared + 2 * row)


def _iq4_xs(name: Any, source: int, block: int, tile: int, shared: int, row: int) -> None:
    _pack_nibbles(source + 8 + 16 * block, tile, row)
    _put_half(tile + 256, row, _u8(source + 4 + block // 2) >> (4 * (block % 2)) & 15)
    high = _u8(source + 2 + block // 4) >> (2 * (block % 4)) & 3
    at = tile + 264 + row % 4
    v.store_scalar_u8(at, _u8(at) | high << (2 * (row // 4)) if row >= 4 else high)
    _copy16(source, shared + 2 * row)


_IMPLEMENTATIONS = {
    QuantType.F32: _float(4),
    QuantType.F16: _float(2),
    QuantType.BF16: _float(2),
    QuantType.Q8_0: _q8_0,
    QuantType.Q4_0: _four_bits(2),
    QuantType.Q4_1: _four_bits(4),
    QuantType.Q5_0: _five_bits(2),
    QuantType.Q5_1: _five_bits(4),
    QuantType.Q2_K: _q2_k,
    QuantType.Q3_K: _q3_k,
    QuantType.MXFP4: _mxfp4,
    QuantType.Q4_K: _q4_k,
    QuantType.Q5_K: _q5_k,
    QuantType.Q6_K: _q6_k,
    QuantType.IQ4_NL: _four_bits(2),
    QuantType.IQ4_XS: _iq4_xs,
}


@cache
def pack_kernel(qtype: QuantType) -> Any:
    """The kernel (raw, row_bytes, rows, groups, first, blocks, phase, out, zeros) of a format.

    raw: the first row of the first group, `row_bytes` apart; rows: how many there are, the rest of
    the last group being read from `zeros`, a row of zeros. first: the first 32-column block to take.
    """
    form, (file_block, file_bytes) = packed_format(qtype), GGML_QUANT_SIZES[qtype]
    name, tile_bytes, super_bytes, super_blocks = form.name, form.tile_bytes, form.super_bytes, form.super_blocks
    per_file_block = max(1, file_block // 32)
    step = file_bytes * 32 if file_block == 1 else file_bytes

    @cfunc(pack_signature, nopython=True, cache=True, error_model="numpy")
    def pack(
        raw: int, row_bytes: int, rows: int, groups: int, first: int, blocks: int, phase: int, out: int, zeros: int
    ) -> None:
        for group in range(groups):
            for b in range(blocks):
                tile, shared = out + b * tile_bytes, out + blocks * tile_bytes
                if super_bytes:
                    shared += (phase + b) // super_blocks * super_bytes
                offset, inner = (first + b) // per_file_block * step, (first + b) % per_file_block
                for row in range(16):
                    number = 16 * group + row
                    source = raw + number * row_bytes if number < rows else zeros
                    pack_block(name, source + offset, inner, tile, shared, row)
            out += blocks * tile_bytes
            if super_bytes:
                out += (phase + blocks + super_blocks - 1) // super_blocks * super_bytes

    return pack


def pack(
    raw: npt.NDArray[np.uint8],
    qtype: QuantType,
    out: npt.NDArray[np.uint8],
    block_range: tuple[int, int] | None = None,
) -> None:
    """Pack GGUF rows, as `formats.pack` does; the GIL is released meanwhile.

    raw: uint8 [rows, row_bytes], contiguous. out: uint8 [shape_of(...).nbytes]. block_range: the
    32-column blocks to take, default all.
    """
    rows, row_bytes = raw.shape
    file_block, file_bytes = GGML_QUANT_SIZES[qtype]
    shape = shape_of(qtype, rows, row_bytes // file_bytes * file_block, block_range)
    if not raw.flags.c_contiguous or out.nbytes != shape.nbytes:
        raise ValueError(f"cannot pack rows of {row_bytes} bytes into {out.nbytes}: {shape.nbytes} are needed")
    zeros = aligned_bytes(row_bytes)
    first = block_range[0] if block_range else 0
    pack_kernel(qtype).ctypes(
        address(raw), row_bytes, rows, shape.groups, first, shape.blocks, shape.phase, address(out), address(zeros)
    )
