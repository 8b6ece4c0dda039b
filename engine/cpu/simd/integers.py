"""Operations on bytes and int32: codes of weights, and integer dot products."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba import types

from numoe.engine.cpu import ISA
from numoe.engine.cpu.simd.types import (
    ELEMENTS,
    I1,
    I32,
    I64,
    Builder,
    Value,
    addr,
    call,
    const,
    f32x16,
    i8x64,
    i32x16,
    load,
    operation,
    shuffle,
    splat,
)


@operation(i8x64, i8x64)
def low_nibbles(b: Builder, v: Value) -> Value:
    """The low half of each byte."""
    return b.and_(v, const(i8x64, 15))


@operation(i8x64, i8x64)
def high_nibbles(b: Builder, v: Value) -> Value:
    """The high half of each byte."""
    shifted = b.bitcast(b.lshr(b.bitcast(v, i32x16.llvm), const(i32x16, 4)), i8x64.llvm)
    return b.and_(shifted, const(i8x64, 15))


@operation(i8x64, i8x64, addr)
def or_bit4(b: Builder, v: Value, p: Value) -> Value:
    """Sets bit 4 of byte i where bit i of the eight bytes at `p` is set."""
    mask = b.bitcast(load(b, p, I64), ir.VectorType(I1, 64))
    return b.or_(v, b.select(mask, const(i8x64, 16), const(i8x64, 0)))


@operation(i8x64, i8x64, addr)
def or_bit2(b: Builder, v: Value, p: Value) -> Value:
    """Sets bit 2 of byte i where bit i of the eight bytes at `p` is set."""
    mask = b.bitcast(load(b, p, I64), ir.VectorType(I1, 64))
    return b.or_(v, b.select(mask, const(i8x64, 4), const(i8x64, 0)))


@operation(i8x64, i8x64, types.int32)
def two_bits(b: Builder, plane: Value, shift: Value) -> Value:
    """The two bits at `shift` (0, 2, 4 or 6) of each byte."""
    wide = b.lshr(b.bitcast(plane, i32x16.llvm), splat(b, i32x16, shift))
    return b.and_(b.bitcast(wide, i8x64.llvm), const(i8x64, 3))


@operation(f32x16, i32x16)
def scale_of_e8m0(b: Builder, e: Value) -> Value:
    """2^(e - 128): half of the E8M0 scale that a byte stands for, as GGML has it."""
    tiny = b.shl(const(i32x16, 0x00200000), e)
    normal = b.shl(b.sub(e, const(i32x16, 1)), const(i32x16, 23))
    return b.bitcast(b.select(b.icmp_unsigned("<", e, const(i32x16, 2)), tiny, normal), f32x16.llvm)


@operation(i8x64, i8x64, i8x64, types.int32)
def or_bits45(b: Builder, v: Value, plane: Value, shift: Value) -> Value:
    """Ors the two bits at `shift` (0, 2, 4 or 6) of each byte of `plane` into bits 4 and 5."""
    wide = b.lshr(b.bitcast(plane, i32x16.llvm), splat(b, i32x16, shift))
    two = b.and_(b.bitcast(wide, i8x64.llvm), const(i8x64, 3))
    high = b.bitcast(b.shl(b.bitcast(two, i32x16.llvm), const(i32x16, 4)), i8x64.llvm)
    return b.or_(v, high)


def table_lookup(name: str, values: Sequence[int]) -> Any:
    """An operation that replaces each byte 0..15 by `values` of it (bytes)."""
    table = [v & 255 for v in values]

    def look_up(b: Builder, v: Value) -> Value:
        if ISA == "avx512":
            return call(b, "llvm.x86.avx512.pshuf.b.512", i8x64.llvm, ir.Constant(i8x64.llvm, table * 4), v)
        if ISA in ("avxvnni", "avx2"):
            half = ir.VectorType(ELEMENTS["i8"], 32)
            parts = [
                call(b, "llvm.x86.avx2.pshuf.b", half, ir.Constant(half, table * 2), shuffle(b, v, lanes))
                for lanes in (range(32), range(32, 64))
            ]
            return b.shuffle_vector(*parts, ir.Constant(ir.VectorType(I32, 64), list(range(64))))
        result = const(i8x64, table[0])
        for code in range(1, 16):
            hit = b.icmp_unsigned("==", v, const(i8x64, code))
            result = b.select(hit, const(i8x64, table[code]), result)
        return result

    look_up.__name__, look_up.__doc__ = name, f"Bytes 0..15 to {list(values)}."
    return operation(i8x64, i8x64)(look_up)


def dot_u8s8(b: Builder, acc: Value, u: Value, s: Value) -> Value:
    """acc[i] + sum over j < 4 of u[4 i + j] * s[4 i + j], u unsigned, s signed, exact.

    Emits LLVM IR: a part of the operations in `tile.py`.
    """
    if ISA == "avx512":
        return call(b, "llvm.x86.avx512.vpdpbusd.512", i32x16.llvm, acc, u, s)
    if ISA == "avxvnni":
        half, parts = ir.VectorType(I32, 8), []
        for k in range(2):
            lanes, bytes_ = range(8 * k, 8 * k + 8), range(32 * k, 32 * k + 32)
            operands = [shuffle(b, acc, lanes), shuffle(b, u, bytes_), shuffle(b, s, bytes_)]
            parts.append(call(b, "llvm.x86.avx512.vpdpbusd.256", half, *operands))
        return b.shuffle_vector(*parts, ir.Constant(ir.VectorType(I32, 16), list(range(16))))
    return b.add(acc, _dot_through_i16(b, u, s))


def _dot_through_i16(b: Builder, u: Value, s: Value) -> Value:
    """The four-byte dot products by widening: vpmaddubsw would saturate at 16 bits."""
    if ISA == "avx2":
        half, parts = ir.VectorType(I32, 8), []
        for start in range(0, 64, 16):
            lanes = range(start, start + 16)
            wide = ir.VectorType(ELEMENTS["i16"], 16)
            pair = b.zext(shuffle(b, u, lanes), wide), b.sext(shuffle(b, s, lanes), wide)
            parts.append(call(b, "llvm.x86.avx2.pmadd.wd", half, *pair))
        join = ir.Constant(ir.VectorType(I32, 16), list(range(16)))
        low, high = b.shuffle_vector(*parts[:2], join), b.shuffle_vector(*parts[2:], join)
        even = ir.Constant(ir.VectorType(I32, 16), list(range(0, 32, 2)))
        odd = ir.Constant(ir.VectorType(I32, 16), list(range(1, 32, 2)))
        return b.add(b.shuffle_vector(low, high, even), b.shuffle_vector(low, high, odd))
    wide = ir.VectorType(I32, 64)
    products = b.mul(b.zext(u, wide), b.sext(s, wide))
    total = shuffle(b, products, range(0, 64, 4))
    for j in range(1, 4):
        total = b.add(total, shuffle(b, products, range(j, 64, 4)))
    return total


@operation(i32x16, types.int32)
def splat_i32(b: Builder, x: Value) -> Value:
    """Every lane `x`."""
    return splat(b, i32x16, x)


@operation(i32x16, i32x16, i32x16)
def add_i32(b: Builder, x: Value, y: Value) -> Value:
    """x + y."""
    return b.add(x, y)


@operation(i32x16, i32x16, i32x16)
def or_i32(b: Builder, x: Value, y: Value) -> Value:
    """x | y."""
    return b.or_(x, y)


@operation(i32x16, i32x16, i32x16)
def and_i32(b: Builder, x: Value, y: Value) -> Value:
    """x & y."""
    return b.and_(x, y)


@operation(i32x16, i32x16, types.int32)
def shift_left_i32(b: Builder, x: Value, n: Value) -> Value:
    """x << n."""
    return b.shl(x, splat(b, i32x16, n))


@operation(i32x16, i32x16, types.int32)
def shift_right_i32(b: Builder, x: Value, n: Value) -> Value:
    """x >> n, zeros shifted in."""
    return b.lshr(x, splat(b, i32x16, n))


@operation(types.int32, i32x16)
def sum_i32(b: Builder, x: Value) -> Value:
    """The sum of all lanes."""
    return call(b, "llvm.vector.reduce.add.v16i32", I32, x)
