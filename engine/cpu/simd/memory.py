"""Loads, stores and prefetches: addresses are integers, in bytes; no alignment is assumed."""

from __future__ import annotations

import platform
from typing import Any

from llvmlite import ir
from numba import types

from numoe.engine.cpu import ISA
from numoe.engine.cpu.simd.types import (
    ELEMENTS,
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
    store,
)

_SCALARS = {
    types.intp: I64,
    types.int32: I32,
    types.int16: ir.IntType(16),
    types.uint8: ir.IntType(8),
    types.float32: ir.FloatType(),
    types.float64: ir.DoubleType(),
}
_SOFT_F16 = ISA == "portable" and platform.machine() == "x86_64"  # no F16C before Ivy Bridge


def _from_f16(b: Builder, half: Value) -> Value:
    """float16 lanes to float32."""
    if not _SOFT_F16:
        return b.fpext(half, f32x16.llvm)
    bits = b.zext(b.bitcast(half, ir.VectorType(ELEMENTS["i16"], 16)), i32x16.llvm)
    magnitude = b.shl(b.and_(bits, const(i32x16, 0x7FFF)), const(i32x16, 13))
    # Exponents differ by 112; the product also makes subnormals normal.
    scaled = b.fmul(b.bitcast(magnitude, f32x16.llvm), const(f32x16, 2.0**112))
    special = b.icmp_unsigned(">=", magnitude, const(i32x16, 0x7C00 << 13))
    wide = b.select(special, b.or_(magnitude, const(i32x16, 0x7F800000)), b.bitcast(scaled, i32x16.llvm))
    sign = b.shl(b.and_(bits, const(i32x16, 0x8000)), const(i32x16, 16))
    return b.bitcast(b.or_(wide, sign), f32x16.llvm)


def _to_f16(b: Builder, x: Value) -> Value:
    """float32 lanes to float16, ties to even, what is too large to infinity."""
    if not _SOFT_F16:
        return b.fptrunc(x, ir.VectorType(ir.HalfType(), 16))
    bits = b.bitcast(x, i32x16.llvm)
    magnitude = b.and_(bits, const(i32x16, 0x7FFFFFFF))
    # Normal results: rebias the exponent by -112 and round at bit 13.
    odd = b.and_(b.lshr(magnitude, const(i32x16, 13)), const(i32x16, 1))
    rebiased = b.add(b.sub(magnitude, const(i32x16, 112 << 23)), b.add(odd, const(i32x16, 0xFFF)))
    normal = b.lshr(rebiased, const(i32x16, 13))
    # Subnormal results: adding 1/2 leaves the wanted bits at the end of the mantissa, rounded.
    half = const(f32x16, 0.5)
    tiny = b.sub(b.bitcast(b.fadd(b.bitcast(magnitude, f32x16.llvm), half), i32x16.llvm), b.bitcast(half, i32x16.llvm))
    value = b.select(b.icmp_unsigned("<", magnitude, const(i32x16, 113 << 23)), tiny, normal)
    value = b.select(b.icmp_unsigned(">", value, const(i32x16, 0x7C00)), const(i32x16, 0x7C00), value)
    infinite = b.icmp_unsigned(">=", magnitude, const(i32x16, 0x47800000))
    value = b.select(infinite, const(i32x16, 0x7C00), value)
    nan = b.icmp_unsigned(">", magnitude, const(i32x16, 0x7F800000))
    sign = b.and_(b.lshr(bits, const(i32x16, 16)), const(i32x16, 0x8000))
    value = b.or_(b.select(nan, const(i32x16, 0x7E00), value), sign)
    return b.bitcast(b.trunc(value, ir.VectorType(ELEMENTS["i16"], 16)), ir.VectorType(ir.HalfType(), 16))


@operation(i8x64, addr)
def load_i8(b: Builder, p: Value) -> Value:
    """64 bytes."""
    return load(b, p, i8x64.llvm)


@operation(f32x16, addr)
def load_f32(b: Builder, p: Value) -> Value:
    """16 float32."""
    return load(b, p, f32x16.llvm)


@operation(f32x16, addr)
def load_f16(b: Builder, p: Value) -> Value:
    """16 float16, widened to float32."""
    return _from_f16(b, load(b, p, ir.VectorType(ir.HalfType(), 16)))


@operation(f32x16, addr)
def load_bf16(b: Builder, p: Value) -> Value:
    """16 bfloat16, widened to float32: they are the upper halves."""
    wide = b.zext(load(b, p, ir.VectorType(ELEMENTS["i16"], 16)), i32x16.llvm)
    return b.bitcast(b.shl(wide, const(i32x16, 16)), f32x16.llvm)


@operation(i32x16, addr)
def load_u8_as_i32(b: Builder, p: Value) -> Value:
    """16 unsigned bytes, widened."""
    return b.zext(load(b, p, ir.VectorType(ELEMENTS["i8"], 16)), i32x16.llvm)


@operation(i32x16, addr)
def load_s8_as_i32(b: Builder, p: Value) -> Value:
    """16 signed bytes, widened."""
    return b.sext(load(b, p, ir.VectorType(ELEMENTS["i8"], 16)), i32x16.llvm)


@operation(i32x16, addr)
def load_u4_as_i32(b: Builder, p: Value) -> Value:
    """16 nibbles from 8 bytes: lane i is the low half of byte i, lane i + 8 the high half."""
    packed = load(b, p, ir.VectorType(ELEMENTS["i8"], 8))
    low = b.and_(packed, const(packed.type, 15))
    high = b.lshr(packed, const(packed.type, 4))
    lanes = ir.Constant(ir.VectorType(I32, 16), list(range(16)))
    return b.zext(b.shuffle_vector(low, high, lanes), i32x16.llvm)


@operation(i32x16, addr)
def load_u2_as_i32(b: Builder, p: Value) -> Value:
    """16 two-bit fields from 4 bytes: lane i is field i // 4 of byte i % 4."""
    wide = b.zext(load(b, p, ir.VectorType(ELEMENTS["i8"], 4)), ir.VectorType(I32, 4))
    spread = shuffle(b, wide, [i % 4 for i in range(16)])
    shifts = ir.Constant(i32x16.llvm, [2 * (i // 4) for i in range(16)])
    return b.and_(b.lshr(spread, shifts), const(i32x16, 3))


@operation(types.void, addr, f32x16)
def store_f32(b: Builder, p: Value, v: Value) -> None:
    """16 float32."""
    store(b, p, v)


@operation(types.void, addr, f32x16)
def store_f16(b: Builder, p: Value, v: Value) -> None:
    """16 float32, rounded to float16."""
    store(b, p, _to_f16(b, v))


@operation(types.void, addr, i32x16)
def store_i32_as_s8(b: Builder, p: Value, v: Value) -> None:
    """16 int32 that fit a signed byte each."""
    store(b, p, b.trunc(v, ir.VectorType(ELEMENTS["i8"], 16)))


def _scalar_load(result: types.Type, doc: str) -> Any:
    def load_scalar(b: Builder, p: Value) -> Value:
        return load(b, p, _SCALARS[result])

    load_scalar.__name__, load_scalar.__doc__ = f"load_scalar_{result}", doc
    return operation(result, addr)(load_scalar)


load_scalar_i32 = _scalar_load(types.int32, "One int32.")
load_scalar_i64 = _scalar_load(types.intp, "One int64.")
load_scalar_f32 = _scalar_load(types.float32, "One float32.")
load_scalar_u8 = _scalar_load(types.uint8, "One unsigned byte.")
load_scalar_i16 = _scalar_load(types.int16, "Two bytes.")
load_scalar_f64 = _scalar_load(types.float64, "One float64.")


@operation(types.void, addr, types.float32)
def store_scalar_f32(b: Builder, p: Value, v: Value) -> None:
    """One float32."""
    store(b, p, v)


@operation(types.void, addr, types.int32)
def store_scalar_i32(b: Builder, p: Value, v: Value) -> None:
    """One int32."""
    store(b, p, v)


@operation(types.void, addr, types.intp)
def store_scalar_u8(b: Builder, p: Value, v: Value) -> None:
    """The lowest byte of an integer."""
    store(b, p, b.trunc(v, ir.IntType(8)))


@operation(types.void, addr, types.int16)
def store_scalar_i16(b: Builder, p: Value, v: Value) -> None:
    """Two bytes."""
    store(b, p, v)


@operation(types.void, addr, types.intp)
def store_scalar_i64(b: Builder, p: Value, v: Value) -> None:
    """One int64."""
    store(b, p, v)


@operation(types.float32, addr)
def load_scalar_f16(b: Builder, p: Value) -> Value:
    """One float16, widened to float32."""
    if not _SOFT_F16:
        return b.fpext(load(b, p, ir.HalfType()), ir.FloatType())
    half = load(b, p, ir.HalfType())
    undefined = ir.Constant(ir.VectorType(ir.HalfType(), 16), ir.Undefined)
    wide = _from_f16(b, b.insert_element(undefined, half, ir.Constant(I32, 0)))
    return b.extract_element(wide, ir.Constant(I32, 0))


@operation(types.void, addr, types.float32)
def store_scalar_f16(b: Builder, p: Value, v: Value) -> None:
    """One float32, rounded to float16."""
    store(b, p, b.extract_element(_to_f16(b, splat(b, f32x16, v)), ir.Constant(I32, 0)))


def _prefetch(b: Builder, p: Value, locality: int) -> None:
    hints = [ir.Constant(I32, n) for n in (0, locality, 1)]  # read, how near, data
    call(b, "llvm.prefetch.p0", ir.VoidType(), b.inttoptr(p, ir.IntType(8).as_pointer()), *hints)


@operation(types.void, addr)
def prefetch(b: Builder, p: Value) -> None:
    """Ask for the cache line at `p`; any address is allowed."""
    _prefetch(b, p, 3)


@operation(types.void, addr)
def prefetch_l2(b: Builder, p: Value) -> None:
    """Ask for the cache line at `p`, but only to the second-level cache, which can wait for more lines at once."""
    _prefetch(b, p, 2)
