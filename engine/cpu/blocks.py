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
from numoe.engine.formats.layouts import FORMATS, IQ4_VALUES

iq4_codes = v.table_lookup("iq4_codes", [value + 128 for value in IQ4_VALUES])
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
    code = v.or_i32(v.load_u4_as_i32(p), v.shift_left_i32(v.load_u2_as_i32(p + 8), 4))
    return v.mul(v.load_f16(shared), v.to_f32(v.add_i32(code, v.splat_i32(-32))))


@inline
def _q6_scales(p: int, shared: int) -> Any:
    d = v.load_f16(shared)
    low = v.mul(d, v.to_f32(v.load_s8_as_i32(p + 384)))
    return low, v.mul(d, v.to_f32(v.load_s8_as_i32(p + 400)))


@inline
def _negated(x: Any) -> Any:
    return v.sub(v.splat_f32(0.0), x)


# --- codes, scale and minimum of each format -------------------------------------------------------

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
}
_FLOATS = {QuantType.F32: v.load_f32, QuantType.F16: v.load_f16, QuantType.BF16: v.load_bf16}
# Where a block's float16 scale lies in its tile, and its minimum.
_SCALE_AT = {QuantType.Q8_0: 512, QuantType.Q4_0: 256, QuantType.IQ4_NL: 256, QuantType.Q5_0: 320}
_AFFINE_AT = {QuantType.Q4_1: 256, QuantType.Q5_1: 320}
_K_SCALE_AT = {QuantType.Q4_K: 256, QuantType.Q5_K: 320}


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
    if qtype in _SCALE_AT:
        at = _SCALE_AT[qtype]

        def symmetric(name: Any, acc: Any, p: int, shared: int, x: Any, cols: int, block: int) -> Any:
            return tile.tile_symmetric(acc, codes(p), v.load_f16(p + at), bias, x, cols, block)

        return symmetric
    if qtype in _AFFINE_AT:
        at = _AFFINE_AT[qtype]

        def affine(name: Any, acc: Any, p: int, shared: int, x: Any, cols: int, block: int) -> Any:
            return tile.tile_affine(acc, codes(p), v.load_f16(p + at), v.load_f16(p + at + 32), x, cols, block)

        return affine
    if qtype in _K_SCALE_AT:
        at = _K_SCALE_AT[qtype]

        def k_affine(name: Any, acc: Any, p: int, shared: int, x: Any, cols: int, block: int) -> Any:
            scale, minimum = _k_scale(p + at, shared)
            return tile.tile_affine(acc, codes(p), scale, _negated(minimum), x, cols, block)

        return k_affine
    if qtype is QuantType.Q6_K:

        def halves(name: Any, acc: Any, p: int, shared: int, x: Any, cols: int, block: int) -> Any:
            low, high = _q6_scales(p, shared)
            return tile.tile_halves(acc, codes(p), low, high, bias, x, cols, block)

        return halves

    def iq4_xs(name: Any, acc: Any, p: int, shared: int, x: Any, cols: int, block: int) -> Any:
        return tile.tile_symmetric(acc, codes(p), _iq4_xs_scale(p + 256, shared), bias, x, cols, block)

    return iq4_xs


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
    if qtype in _SCALE_AT:
        at = _SCALE_AT[qtype]

        def symmetric(name: Any, p: int, shared: int, out: int) -> None:
            d = v.load_f16(p + at)
            tile.unpack_symmetric(codes(p), d, d, bias, out)

        return symmetric
    if qtype in _AFFINE_AT:
        at = _AFFINE_AT[qtype]

        def affine(name: Any, p: int, shared: int, out: int) -> None:
            tile.unpack_affine(codes(p), v.load_f16(p + at), v.load_f16(p + at + 32), out)

        return affine
    if qtype in _K_SCALE_AT:
        at = _K_SCALE_AT[qtype]

        def k_affine(name: Any, p: int, shared: int, out: int) -> None:
            scale, minimum = _k_scale(p + at, shared)
            tile.unpack_affine(codes(p), scale, _negated(minimum), out)

        return k_affine
    if qtype is QuantType.Q6_K:

        def halves(name: Any, p: int, shared: int, out: int) -> None:
            low, high = _q6_scales(p, shared)
            tile.unpack_symmetric(codes(p), low, high, bias, out)

        return halves

    def iq4_xs(name: Any, p: int, shared: int, out: int) -> None:
        d = _iq4_xs_scale(p + 256, shared)
        tile.unpack_symmetric(codes(p), d, d, bias, out)

    return iq4_xs
