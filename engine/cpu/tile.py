"""Register tiles: one group of sixteen weight rows against several activation rows at once.

A tile's accumulators are a tuple of float32 vectors, one for each activation row, lane i belonging
to weight row i. The operations below are unrolled over that tuple while they are compiled, so that
a block of weights is unpacked once and everything stays in registers. What they compute for one
activation row does not depend on how many there are: a row's result is the same bit for bit alone
and in any batch.

An 8-bit activation row of `cols` columns is `cols` int8, then for each 32 columns 16 bytes:
float32 scale, int32 sum of all 32, of the first 16 and of the last 16 (see `rows.py`).
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from numoe.engine.cpu.simd.integers import dot_u8s8
from numoe.engine.cpu.simd.types import I32, Value, addr, call, const, f32x16, i8x64, i32x16, load, splat

META_BYTES = 16
"""Bytes of scale and sums after an activation row's codes, for each 32 columns."""


@intrinsic(prefer_literal=True)
def tile_zero(typingctx: Any, rows: Any) -> Any:
    """Accumulators for `rows` (a literal) activation rows, all zero."""
    if not isinstance(rows, types.IntegerLiteral):
        return None
    result = types.UniTuple(f32x16, rows.literal_value)

    def codegen(context: Any, b: Any, sig: Any, _args: Any) -> Value:
        return ir.Constant(context.get_value_type(sig.return_type), None)

    return result(rows), codegen


@intrinsic
def tile_pointers(typingctx: Any, acc: Any, table: Any) -> Any:
    """The addresses of a tile's activation rows, from int64 at `table`, one for each accumulator."""
    result = types.UniTuple(addr, acc.count)

    def codegen(context: Any, b: Any, sig: Any, args: Any) -> Value:
        pointers = [
            load(b, b.add(args[1], ir.Constant(args[1].type, 8 * t)), ir.IntType(64)) for t in range(acc.count)
        ]
        return context.make_tuple(b, sig.return_type, pointers)

    return result(acc, table), codegen


@intrinsic
def tile_store(typingctx: Any, acc: Any, out: Any, stride: Any) -> Any:
    """Write accumulator t (16 float32) at `out + t * stride` bytes."""

    def codegen(context: Any, b: Any, _sig: Any, args: Any) -> Value:
        at = args[1]
        for value in cgutils.unpack_tuple(b, args[0]):
            b.store(value, b.inttoptr(at, value.type.as_pointer()), align=4)
            at = b.add(at, args[2])
        return context.get_dummy_value()

    return types.void(acc, out, stride), codegen


def _block_dot(b: Any, weights: list[Value], x: Value, start: Value, first: int) -> Value:
    """Integer dot products of weight vectors with the activation codes at `x`, columns from 4 * first."""
    acc = start
    for j, weight in enumerate(weights):
        four = load(b, b.add(x, ir.Constant(x.type, 4 * (first + j))), I32)
        acc = dot_u8s8(b, acc, weight, b.bitcast(splat(b, i32x16, four), i8x64.llvm))
    return acc


def _meta(b: Any, x: Value, cols: Value, block: Value, field: int, kind: ir.Type) -> Value:
    """A field of the scales and sums of block number `block` of the row at `x`."""
    offset = b.add(cols, b.mul(block, ir.Constant(cols.type, META_BYTES)))
    return load(b, b.add(b.add(x, offset), ir.Constant(x.type, 4 * field)), kind)


def _biased_start(b: Any, bias: int, total: Value) -> Value:
    """-bias * total in every lane: what the bias of the codes adds to the dot product."""
    return splat(b, i32x16, b.mul(total, ir.Constant(I32, -bias)))


def _fma(b: Any, x: Value, y: Value, z: Value) -> Value:
    return call(b, "llvm.fma.v16f32", f32x16.llvm, x, y, z)


@intrinsic(prefer_literal=True)
def tile_symmetric(typingctx: Any, acc: Any, codes: Any, scale: Any, bias: Any, x: Any, cols: Any, block: Any) -> Any:
    """acc[t] += scale * x_scale[t] * sum((codes - bias) * x[t]) over one block of 32 columns.

    codes: eight i8x64; scale: f32x16, one for each weight row; bias: a literal; x: row addresses.
    """
    if not isinstance(bias, types.IntegerLiteral):
        return None

    def codegen(context: Any, b: Any, _sig: Any, args: Any) -> Value:
        weights, pointers = cgutils.unpack_tuple(b, args[1]), cgutils.unpack_tuple(b, args[4])
        results = []
        for total, row in zip(cgutils.unpack_tuple(b, args[0]), pointers, strict=True):
            at = b.add(row, b.mul(args[6], ir.Constant(row.type, 32)))
            start = const(i32x16, 0)
            if bias.literal_value:
                start = _biased_start(b, bias.literal_value, _meta(b, row, args[5], args[6], 1, I32))
            # Two chains of four: a dot product takes five cycles.
            even = _block_dot(b, weights[:4], at, start, 0)
            odd = _block_dot(b, weights[4:], at, const(i32x16, 0), 4)
            dots = b.sitofp(b.add(even, odd), f32x16.llvm)
            factor = b.fmul(args[2], splat(b, f32x16, _meta(b, row, args[5], args[6], 0, ir.FloatType())))
            results.append(_fma(b, dots, factor, total))
        return context.make_tuple(b, acc, results)

    return acc(acc, codes, scale, bias, x, cols, block), codegen


@intrinsic
def tile_affine(typingctx: Any, acc: Any, codes: Any, scale: Any, minimum: Any, x: Any, cols: Any, block: Any) -> Any:
    """acc[t] += x_scale[t] * (scale * sum(codes * x[t]) + minimum * sum(x[t])) over one block."""

    def codegen(context: Any, b: Any, _sig: Any, args: Any) -> Value:
        weights, pointers = cgutils.unpack_tuple(b, args[1]), cgutils.unpack_tuple(b, args[4])
        results = []
        for total, row in zip(cgutils.unpack_tuple(b, args[0]), pointers, strict=True):
            at = b.add(row, b.mul(args[6], ir.Constant(row.type, 32)))
            even = _block_dot(b, weights[:4], at, const(i32x16, 0), 0)
            odd = _block_dot(b, weights[4:], at, const(i32x16, 0), 4)
            dots = b.sitofp(b.add(even, odd), f32x16.llvm)
            x_scale = _meta(b, row, args[5], args[6], 0, ir.FloatType())
            x_sum = b.sitofp(_meta(b, row, args[5], args[6], 1, I32), ir.FloatType())
            scaled = _fma(b, args[2], dots, b.fmul(args[3], splat(b, f32x16, x_sum)))
            results.append(_fma(b, scaled, splat(b, f32x16, x_scale), total))
        return context.make_tuple(b, acc, results)

    return acc(acc, codes, scale, minimum, x, cols, block), codegen


@intrinsic(prefer_literal=True)
def tile_halves(
    typingctx: Any, acc: Any, codes: Any, low: Any, high: Any, bias: Any, x: Any, cols: Any, block: Any
) -> Any:
    """As tile_symmetric, with a scale for the first 16 columns of the block and one for the last."""
    if not isinstance(bias, types.IntegerLiteral):
        return None

    def codegen(context: Any, b: Any, _sig: Any, args: Any) -> Value:
        weights, pointers = cgutils.unpack_tuple(b, args[1]), cgutils.unpack_tuple(b, args[5])
        results = []
        for total, row in zip(cgutils.unpack_tuple(b, args[0]), pointers, strict=True):
            at = b.add(row, b.mul(args[7], ir.Constant(row.type, 32)))
            x_scale = splat(b, f32x16, _meta(b, row, args[6], args[7], 0, ir.FloatType()))
            for half in range(2):
                start = _biased_start(b, bias.literal_value, _meta(b, row, args[6], args[7], 2 + half, I32))
                dots = _block_dot(b, weights[4 * half : 4 * half + 4], at, start, 4 * half)
                total = _fma(b, b.sitofp(dots, f32x16.llvm), b.fmul(args[2 + half], x_scale), total)
            results.append(total)
        return context.make_tuple(b, acc, results)

    return acc(acc, codes, low, high, bias, x, cols, block), codegen


@intrinsic
def tile_affine_halves(
    typingctx: Any, acc: Any, codes: Any, scales: Any, minima: Any, x: Any, cols: Any, block: Any
) -> Any:
    """As tile_affine, with scales and minima (pairs of f32x16) of the first 16 columns and of the last."""

    def codegen(context: Any, b: Any, _sig: Any, args: Any) -> Value:
        weights, pointers = cgutils.unpack_tuple(b, args[1]), cgutils.unpack_tuple(b, args[4])
        scale, minimum = cgutils.unpack_tuple(b, args[2]), cgutils.unpack_tuple(b, args[3])
        results = []
        for total, row in zip(cgutils.unpack_tuple(b, args[0]), pointers, strict=True):
            at = b.add(row, b.mul(args[6], ir.Constant(row.type, 32)))
            x_scale = splat(b, f32x16, _meta(b, row, args[5], args[6], 0, ir.FloatType()))
            for half in range(2):
                dots = _block_dot(b, weights[4 * half : 4 * half + 4], at, const(i32x16, 0), 4 * half)
                x_sum = b.sitofp(_meta(b, row, args[5], args[6], 2 + half, I32), ir.FloatType())
                shifted = b.fmul(minimum[half], splat(b, f32x16, x_sum))
                scaled = _fma(b, scale[half], b.sitofp(dots, f32x16.llvm), shifted)
                total = _fma(b, scaled, x_scale, total)
            results.append(total)
        return context.make_tuple(b, acc, results)

    return acc(acc, codes, scales, minima, x, cols, block), codegen


@intrinsic
def tile_float(typingctx: Any, acc: Any, weights: Any, x: Any, column: Any) -> Any:
    """acc[t] += weights * x[t][column], x rows being float32; weights: f32x16 of one column."""

    def codegen(context: Any, b: Any, _sig: Any, args: Any) -> Value:
        results = []
        offset = b.mul(args[3], ir.Constant(args[3].type, 4))
        for total, row in zip(cgutils.unpack_tuple(b, args[0]), cgutils.unpack_tuple(b, args[2]), strict=True):
            value = splat(b, f32x16, load(b, b.add(row, offset), ir.FloatType()))
            results.append(_fma(b, args[1], value, total))
        return context.make_tuple(b, acc, results)

    return acc(acc, weights, x, column), codegen


def _columns(b: Any, codes: Value) -> list[tuple[int, Value]]:
    """The codes of eight vectors as int32: (column, sixteen rows) pairs."""
    byte = const(i32x16, 255)
    return [
        (4 * j + i, b.and_(b.lshr(b.bitcast(code, i32x16.llvm), const(i32x16, 8 * i)), byte))
        for j, code in enumerate(cgutils.unpack_tuple(b, codes))
        for i in range(4)
    ]


def _store_column(b: Any, out: Value, column: int, value: Value) -> None:
    at = b.add(out, ir.Constant(out.type, 64 * column))
    b.store(value, b.inttoptr(at, value.type.as_pointer()), align=4)


@intrinsic(prefer_literal=True)
def unpack_symmetric(typingctx: Any, codes: Any, low: Any, high: Any, bias: Any, out: Any) -> Any:
    """Write (codes - bias) * scale, float32 [32, 16], at `out`; columns from 16 on have scale `high`."""
    if not isinstance(bias, types.IntegerLiteral):
        return None

    def codegen(context: Any, b: Any, _sig: Any, args: Any) -> Value:
        for column, code in _columns(b, args[0]):
            value = b.sitofp(b.sub(code, const(i32x16, bias.literal_value)), f32x16.llvm)
            _store_column(b, args[4], column, b.fmul(args[1 + column // 16], value))
        return context.get_dummy_value()

    return types.void(codes, low, high, bias, out), codegen


@intrinsic
def unpack_affine(typingctx: Any, codes: Any, scales: Any, minima: Any, out: Any) -> Any:
    """Write codes * scale + minimum, both operations rounded, float32 [32, 16], at `out`.

    scales, minima: pairs of f32x16, of the first 16 columns and of the last.
    """

    def codegen(context: Any, b: Any, _sig: Any, args: Any) -> Value:
        scale, minimum = cgutils.unpack_tuple(b, args[1]), cgutils.unpack_tuple(b, args[2])
        for column, code in _columns(b, args[0]):
            scaled = b.fmul(scale[column // 16], b.sitofp(code, f32x16.llvm))
            _store_column(b, args[3], column, b.fadd(scaled, minimum[column // 16]))
        return context.get_dummy_value()

    return types.void(codes, scales, minima, out), codegen


@intrinsic
def stack_tile(typingctx: Any) -> Any:
    """The address of 2 KiB on the stack, the same for each execution: float32 [32, 16]."""

    def codegen(context: Any, b: Any, _sig: Any, _args: Any) -> Value:
        with b.goto_entry_block():
            slot = b.alloca(ir.ArrayType(ir.FloatType(), 512))
            slot.align = 64
        return b.ptrtoint(slot, ir.IntType(64))

    return addr(), codegen
