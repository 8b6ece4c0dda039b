"""Unpacking a block of packed weights into registers, for each format (layouts: `formats/layouts.py`).

`block_product` adds one block's products to a tile; `block_unpack` writes its weights as float32,
exactly as GGML dequantizes them. Both take the format's name as a literal, so that each
kernel is compiled for one format.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gguf import GGMLQuantizationType as QuantType
from numba import njit, types
from numba.extending import overload

from numoe.engine.cpu import simd as v
from numoe.engine.cpu import tile
from numoe.engine.formats.layouts import FORMATS, IQ4_VALUES, MXFP4_VALUES

iq4_codes = v.table_lookup("iq4_codes", [value + 128 for value in IQ4_VALUES])
mxfp4_codes = v.table_lookup("mxfp4_codes", [value + 12 for value in MXFP4_VALUES])
inline = njit(nogil=True, error_model="numpy", forceinline=True)


@inline
def _nibbles(p: int) -> Any:
    """256 bytes of codes at `p`: eight vectors, number j the columns 4 j .. 4 j + 3."""
    a, b, c, d = v.load_i8(p), v.load_i8(p + 64), v.load_i8(p + 128), v.load_i8(p + 192)
    return (
        v.low_nibbles(a), v.high_nibbles(a), v.low_nibbles(b), v.high_nibbles(b),
        v.low_nibbles(c), v.high_nibbles(c), v.low_nibbles(d), v.high_nibbles(d),
    )  # fmt: skip


@inline
def _bytes(p: int) -> Any:
    return (
        v.load_i8(p), v.load_i8(p + 64), v.load_i8(p + 128), v.load_i8(p + 192),
        v.load_i8(p + 256), v.load_i8(p + 320), v.load_i8(p + 384), v.load_i8(p + 448),
    )  # fmt: skip


@inline
def _five_bits(p: int) -> Any:
    w, h = _nibbles(p), p + 256
    return (
        v.or_bit4(w[0], h), v.or_bit4(w[1], h + 8), v.or_bit4(w[2], h + 16), v.or_bit4(w[3], h + 24),
        v.or_bit4(w[4], h + 32), v.or_bit4(w[5], h + 40), v.or_bit4(w[6], h + 48), v.or_bit4(w[7], h + 56),
    )  # fmt: skip


@inline
def _six_bits(p: int) -> Any:
    w, first, second = _nibbles(p), v.load_i8(p + 256), v.load_i8(p + 320)
    return (
        v.or_bits45(w[0], first, 0), v.or_bits45(w[1], first, 2),
        v.or_bits45(w[2], first, 4), v.or_bits45(w[3], first, 6),
        v.or_bits45(w[4], second, 0), v.or_bits45(w[5], second, 2),
        v.or_bits45(w[6], second, 4), v.or_bits45(w[7], second, 6),
    )  # fmt: skip


@inline
def _iq4(p: int) -> Any:
    w = _nibbles(p)
    return (
        iq4_codes(w[0]), iq4_codes(w[1]), iq4_codes(w[2]), iq4_codes(w[3]),
        iq4_codes(w[4]), iq4_codes(w[5]), iq4_codes(w[6]), iq4_codes(w[7]),
    )  # fmt: skip


@inline
def _mxfp4(p: int) -> Any:
    w = _nibbles(p)
    return (
        mxfp4_codes(w[0]), mxfp4_codes(w[1]), mxfp4_codes(w[2]), mxfp4_codes(w[3]),
        mxfp4_codes(w[4]), mxfp4_codes(w[5]), mxfp4_codes(w[6]), mxfp4_codes(w[7]),
    )  # fmt: skip


@inline
def _two_bits(p: int) -> Any:
    a, b = v.load_i8(p), v.load_i8(p + 64)
    return (
        v.two_bits(a, 0), v.two_bits(a, 2), v.two_bits(a, 4), v.two_bits(a, 6),
        v.two_bits(b, 0), v.two_bits(b, 2), v.two_bits(b, 4), v.two_bits(b, 6),
    )  # fmt: skip


@inline
def _three_bits(p: int) -> Any:
    w, h = _two_bits(p), p + 128
    return (
        v.or_bit2(w[0], h), v.or_bit2(w[1], h + 8), v.or_bit2(w[2], h + 16), v.or_bit2(w[3], h + 24),
        v.or_bit2(w[4], h + 32), v.or_bit2(w[5], h + 40), v.or_bit2(w[6], h + 48), v.or_bit2(w[7], h + 56),
    )  # fmt: skip


@inline
def _mxfp4_scale(p: int, shared: int) -> Any:
    return v.scale_of_e8m0(v.load_u8_as_i32(p + 256))


@inline
def _q2_scales(p: int, shared: int) -> Any:
    """Scales and minima of the two halves of a Q2_K block."""
    d, dmin = v.load_f16(shared), v.load_f16(shared + 32)
    low, high, fifteen = v.load_u8_as_i32(p + 128), v.load_u8_as_i32(p + 144), v.splat_i32(15)
    scales = v.mul(d, v.to_f32(v.and_i32(low, fifteen))), v.mul(d, v.to_f32(v.and_i32(high, fifteen)))
    first, second = v.to_f32(v.shift_right_i32(low, 4)), v.to_f32(v.shift_right_i32(high, 4))
    return scales, (_negated(v.mul(dmin, first)), _negated(v.mul(dmin, second)))


@inline
def _q3_scales(p: int, shared: int) -> Any:
    """Scales of the two halves of a Q3_K block, from 6-bit factors less 32."""
    d, low, high = v.load_f16(shared), v.load_u8_as_i32(p + 192), v.load_u4_as_i32(p + 208)
    three, fifteen, bias = v.splat_i32(3), v.splat_i32(15), v.splat_i32(-32)
    first = v.or_i32(v.and_i32(low, fifteen), v.shift_left_i32(v.and_i32(high, three), 4))
    second = v.or_i32(v.shift_right_i32(low, 4), v.shift_left_i32(v.shift_right_i32(high, 2), 4))
    return v.mul(d, v.to_f32(v.add_i32(first, bias))), v.mul(d, v.to_f32(v.add_i32(second, bias)))


@inline
def _k_scale(p: int, shared: int) -> Any:
    """Scale and minimum of a Q4_K or Q5_K block, their 6-bit factors at `p`, d and dmin at `shared`."""
    low, high = v.load_u8_as_i32(p), v.load_u4_as_i32(p + 16)
    three, fifteen = v.splat_i32(3), v.splat_i32(15)
    scale = v.or_i32(v.and_i32(low, fifteen), v.shift_left_i32(v.and_i32(high, three), 4))
    minimum = v.or_i32(v.shift_right_i32(low, 4), v.shift_left_i32(v.shift_right_i32(high, 2), 4))
    d = v.mul(v.load_f16(shared), v.to_f32(scale))
    return d, v.mul(v.load_f16(shared + 32), v.to_f32(minimum))


@inline
def _iq4_xs_scale(p: int, shared: int) -> Any:
    code = v.or_i32(v.load_u4_as_i32(p + 256), v.shift_left_i32(v.load_u2_as_i32(p + 264), 4))
    return v.mul(v.load_f16(shared), v.to_f32(v.add_i32(code, v.splat_i32(-32))))


@inline
def _q6_scales(p: int, shared: int) -> Any:
    d = v.load_f16(shared)
    low = v.mul(d, v.to_f32(v.load_s8_as_i32(p + 384)))
    return low, v.mul(d, v.to_f32(v.load_s8_as_i32(p + 400)))


@inline
def _negated(x: Any) -> Any:
    return v.sub(v.splat_f32(0.0), x)


# --- what each format is made of ---------------------------------------------------------------------


def _f16_scale(at: int) -> Any:
    """The scale is a float16 at byte `at` of the tile."""

    @inline
    def scale(p: int, shared: int) -> Any:
        return v.load_f16(p + at)

    return scale


def _f16_scale_and_minimum(at: int) -> Any:
    """Scale and minimum are float16, the scale at byte `at` of the tile."""

    @inline
    def both(p: int, shared: int) -> Any:
        return v.load_f16(p + at), v.load_f16(p + at + 32)

    return both


def _k_scale_and_minimum(at: int) -> Any:
    """Of Q4_K and Q5_K, whose 6-bit factors lie at byte `at` of the tile."""

    @inline
    def both(p: int, shared: int) -> Any:
        scale, minimum = _k_scale(p + at, shared)
        return scale, _negated(minimum)

    return both


_CODES: dict[QuantType, Callable[..., Any]] = {
    QuantType.Q8_0: _bytes,
    QuantType.Q4_0: _nibbles,
    QuantType.Q4_1: _nibbles,
    QuantType.Q5_0: _five_bits,
    QuantType.Q5_1: _five_bits,
    QuantType.Q4_K: _nibbles,
    QuantType.Q5_K: _five_bits,
    QuantType.Q6_K: _six_bits,
    QuantType.IQ4_NL: _iq4,
    QuantType.IQ4_XS: _iq4,
    QuantType.Q2_K: _two_bits,
    QuantType.Q3_K: _three_bits,
    QuantType.MXFP4: _mxfp4,
}
_FLOATS = {QuantType.F32: v.load_f32, QuantType.F16: v.load_f16, QuantType.BF16: v.load_bf16}
# What gives a block's scale; its scale and minimum; the scales of its halves; those and their minima.
_SYMMETRIC = {
    QuantType.Q8_0: _f16_scale(512),
    QuantType.Q4_0: _f16_scale(256),
    QuantType.Q5_0: _f16_scale(320),
    QuantType.IQ4_NL: _f16_scale(256),
    QuantType.IQ4_XS: _iq4_xs_scale,
    QuantType.MXFP4: _mxfp4_scale,
}
_AFFINE = {
    QuantType.Q4_1: _f16_scale_and_minimum(256),
    QuantType.Q5_1: _f16_scale_and_minimum(320),
    QuantType.Q4_K: _k_scale_and_minimum(256),
    QuantType.Q5_K: _k_scale_and_minimum(320),
}
_HALVES = {QuantType.Q6_K: _q6_scales, QuantType.Q3_K: _q3_scales}
_AFFINE_HALVES = {QuantType.Q2_K: _q2_scales}


def _qtype(name: Any) -> QuantType | None:
    return QuantType[name.literal_value] if isinstance(name, types.StringLiteral) else None


def block_product(name: Any, acc: Any, p: int, shared: int, x: Any, cols: int, block: int) -> Any:
    """`acc` plus the products of the tile at `p` with block `block` of the activation rows `x`.

    shared: the address of the tile's super, if the format has them.
    """
    raise AssertionError("only for compiled code")


@overload(block_product, prefer_literal=True, strict=False, jit_options={"forceinline": True, "nogil": True})
def _block_product(name: Any, acc: Any, p: Any, shared: Any, x: Any, cols: Any, block: Any) -> Any:
    qtype = _qtype(name)
    if qtype is None:
        return None
    if qtype in _FLOATS:
        return _float_product(qtype)
    return _code_product(qtype)


def _float_product(qtype: QuantType) -> Callable[..., Any]:
    load, size = _FLOATS[qtype], FORMATS[qtype].tile_bytes // 32

    def product(name: Any, acc: Any, p: int, shared: int, x: Any, cols: int, block: int) -> Any:
        for column in range(32):
            acc = tile.tile_float(acc, load(p + column * size), x, 32 * block + column)
        return acc

    return product


def _code_product(qtype: QuantType) -> Callable[..., Any]:
    codes, bias = _CODES[qtype], FORMATS[qtype].bias
    if qtype in _SYMMETRIC:
        scale = _SYMMETRIC[qtype]

        def symmetric(name: Any, acc: Any, p: int, shared: int, x: Any, cols: int, block: int) -> Any:
            return tile.tile_symmetric(acc, codes(p), scale(p, shared), bias, x, cols, block)

        return symmetric
    if qtype in _AFFINE:
        both = _AFFINE[qtype]

        def affine(name: Any, acc: Any, p: int, shared: int, x: Any, cols: int, block: int) -> Any:
            found = both(p, shared)
            return tile.tile_affine(acc, codes(p), found[0], found[1], x, cols, block)

        return affine
    if qtype in _HALVES:
        scales = _HALVES[qtype]

        def halves(name: Any, acc: Any, p: int, shared: int, x: Any, cols: int, block: int) -> Any:
            found = scales(p, shared)
            return tile.tile_halves(acc, codes(p), found[0], found[1], bias, x, cols, block)

        return halves
    all_four = _AFFINE_HALVES[qtype]

    def affine_halves(name: Any, acc: Any, p: int, shared: int, x: Any, cols: int, block: int) -> Any:
        found = all_four(p, shared)
        return tile.tile_affine_halves(acc, codes(p), found[0], found[1], x, cols, block)

    return affine_halves


def block_unpack(name: Any, p: int, shared: int, out: int) -> None:
    """Write the weights of the tile at `p` as float32 [32 columns, 16 rows] at `out`."""
    raise AssertionError("only for compiled code")


@overload(block_unpack, prefer_literal=True, strict=False, jit_options={"forceinline": True, "nogil": True})
def _block_unpack(name: Any, p: Any, shared: Any, out: Any) -> Any:
    qtype = _qtype(name)
    if qtype is None:
        return None
    if qtype in _FLOATS:
        load, size = _FLOATS[qtype], FORMATS[qtype].tile_bytes // 32

        def floats(name: Any, p: int, shared: int, out: int) -> None:
            for column in range(32):
                v.store_f32(out + 64 * column, load(p + column * size))

        return floats
    return _unpack_codes(qtype)


def _unpack_codes(qtype: QuantType) -> Callable[..., Any]:
    codes, bias = _CODES[qtype], FORMATS[qtype].bias
    if qtype in _SYMMETRIC:
        scale = _SYMMETRIC[qtype]

        def symmetric(name: Any, p: int, shared: int, out: int) -> None:
            d = scale(p, shared)
            tile.unpack_symmetric(codes(p), d, d, bias, out)

        return symmetric
    if qtype in _AFFINE:
        both = _AFFINE[qtype]

        def affine(name: Any, p: int, shared: int, out: int) -> None:
            d, m = both(p, shared)
            tile.unpack_affine(codes(p), (d, d), (m, m), out)

        return affine
    if qtype in _HALVES:
        scales = _HALVES[qtype]

        def halves(name: Any, p: int, shared: int, out: int) -> None:
            low, high = scales(p, shared)
            tile.unpack_symmetric(codes(p), low, high, bias, out)

        return halves
    all_four = _AFFINE_HALVES[qtype]

    def affine_halves(name: Any, p: int, shared: int, out: int) -> None:
        found = all_four(p, shared)
        tile.unpack_affine(codes(p), found[0], found[1], out)

    return affine_halves
