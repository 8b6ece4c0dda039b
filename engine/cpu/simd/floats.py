"""Operations on float32."""

from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir
from numba import types

from numoe.engine.cpu.simd.types import (
    I32,
    Builder,
    Value,
    call,
    f32x16,
    i32x16,
    operation,
    shuffle,
    splat,
)


@operation(f32x16, types.float32)
def splat_f32(b: Builder, x: Value) -> Value:
    """Every lane `x`."""
    return splat(b, f32x16, x)


@operation(f32x16, i32x16)
def to_f32(b: Builder, x: Value) -> Value:
    """int32 to float32."""
    return b.sitofp(x, f32x16.llvm)


@operation(i32x16, f32x16)
def round_to_i32(b: Builder, x: Value) -> Value:
    """float32 to the nearest int32, ties to even."""
    return b.fptosi(call(b, "llvm.rint.v16f32", f32x16.llvm, x), i32x16.llvm)


@operation(f32x16, i32x16)
def f32_of_bits(b: Builder, x: Value) -> Value:
    """The floats with these bit patterns."""
    return b.bitcast(x, f32x16.llvm)


@operation(f32x16, f32x16, f32x16)
def add(b: Builder, x: Value, y: Value) -> Value:
    """x + y."""
    return b.fadd(x, y)


@operation(f32x16, f32x16, f32x16)
def sub(b: Builder, x: Value, y: Value) -> Value:
    """x - y."""
    return b.fsub(x, y)


@operation(f32x16, f32x16, f32x16)
def mul(b: Builder, x: Value, y: Value) -> Value:
    """x * y."""
    return b.fmul(x, y)


@operation(f32x16, f32x16, f32x16)
def div(b: Builder, x: Value, y: Value) -> Value:
    """x / y."""
    return b.fdiv(x, y)


@operation(f32x16, f32x16, f32x16, f32x16)
def fma(b: Builder, x: Value, y: Value, z: Value) -> Value:
    """x * y + z, rounded once."""
    return call(b, "llvm.fma.v16f32", f32x16.llvm, x, y, z)


@operation(f32x16, f32x16, f32x16)
def maximum(b: Builder, x: Value, y: Value) -> Value:
    """The larger of each pair."""
    return call(b, "llvm.maxnum.v16f32", f32x16.llvm, x, y)


@operation(f32x16, f32x16, f32x16)
def minimum(b: Builder, x: Value, y: Value) -> Value:
    """The smaller of each pair."""
    return call(b, "llvm.minnum.v16f32", f32x16.llvm, x, y)


@operation(f32x16, f32x16)
def absolute(b: Builder, x: Value) -> Value:
    """|x|."""
    return call(b, "llvm.fabs.v16f32", f32x16.llvm, x)


@operation(f32x16, f32x16)
def round_even(b: Builder, x: Value) -> Value:
    """The nearest integer as float32, ties to even."""
    return call(b, "llvm.rint.v16f32", f32x16.llvm, x)


@operation(types.float32, f32x16)
def sum_f32(b: Builder, x: Value) -> Value:
    """The sum of all lanes, by halves: lanes i and i + 8, then i + 4, ..."""
    lanes = 16
    while lanes > 1:
        lanes //= 2
        x = b.fadd(shuffle(b, x, range(lanes)), shuffle(b, x, range(lanes, 2 * lanes)))
    return b.extract_element(x, ir.Constant(I32, 0))


@operation(types.float32, f32x16)
def first_f32(b: Builder, x: Value) -> Value:
    """Lane 0."""
    return b.extract_element(x, ir.Constant(I32, 0))


@operation(types.float32, f32x16)
def max_f32(b: Builder, x: Value) -> Value:
    """The largest lane."""
    return call(b, "llvm.vector.reduce.fmax.v16f32", ir.FloatType(), x)


@operation(f32x16, f32x16, f32x16, f32x16, f32x16)
def sum4_f32(b: Builder, w: Value, x: Value, y: Value, z: Value) -> Value:
    """The sums of four vectors in lanes 0, 4, 8 and 12, each as by `sum_f32`, in a third of the instructions."""
    four = _fold(b, b.fadd, _fold(b, b.fadd, w, x, 16), _fold(b, b.fadd, y, z, 16), 8)
    for apart in (2, 1):
        four = b.fadd(four, shuffle(b, four, [lane ^ apart for lane in range(16)]))
    return four


@operation(f32x16, f32x16, f32x16)
def max2_f32(b: Builder, x: Value, y: Value) -> Value:
    """The largest lanes of two vectors without NaN, in lanes 0 and 8."""

    def larger(p: Value, q: Value) -> Value:
        return b.select(b.fcmp_ordered(">", p, q), p, q)

    both = _fold(b, larger, x, y, 16)
    for apart in (4, 2, 1):
        both = larger(both, shuffle(b, both, [lane ^ apart for lane in range(16)]))
    return both


@operation(types.float32, f32x16, types.int32)
def lane_f32(b: Builder, x: Value, lane: Value) -> Value:
    """A lane."""
    return b.extract_element(x, lane)


def _fold(b: Builder, operation: Callable[[Value, Value], Value], x: Value, y: Value, width: int) -> Value:
    """The halves of each `width` lanes of x, then of y, combined."""
    lanes = [lane for lane in range(32) if lane % width < width // 2]
    low, high = (
        b.shuffle_vector(x, y, ir.Constant(ir.VectorType(I32, 16), [lane + up for lane in lanes]))
        for up in (0, width // 2)
    )
    return operation(low, high)


@operation(f32x16, f32x16, types.int32, types.float32)
def fill_from_lane(b: Builder, x: Value, first: Value, fill: Value) -> Value:
    """x with lanes `first` and above replaced by `fill`."""
    lanes = ir.Constant(i32x16.llvm, list(range(16)))
    keep = b.icmp_signed("<", lanes, splat(b, i32x16, first))
    return b.select(keep, x, splat(b, f32x16, fill))
