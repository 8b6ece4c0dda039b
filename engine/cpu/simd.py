"""A SIMD vocabulary for Numba: typed vectors and the operations on them, each one LLVM instruction or few.

Memory is addressed by integers (bytes), as in `load_f32(address)`: kernels work on shared memory
whose lifetime others own, and nothing here allocates. Vectors are 64 bytes wide whatever the host:
LLVM splits them where registers are narrower. An operation whose best instruction differs between
instruction sets looks at `ISA` while it is compiled; everything else is plain LLVM IR.

    type        lanes           written
    i8x64       64 x 8 bits     bytes, signed or not as the operation says
    i32x16      16 x int32
    f32x16      16 x float32
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

from numoe.engine.cpu import ISA

Builder = Any  # llvmlite.ir.IRBuilder
Value = Any  # llvmlite.ir.Value
Vector = Any  # in kernels: a value of one of the vector types

_ELEMENTS = {
    "i8": ir.IntType(8),
    "i16": ir.IntType(16),
    "i32": ir.IntType(32),
    "f16": ir.HalfType(),
    "f32": ir.FloatType(),
}
_I1, _I32, _I64 = ir.IntType(1), ir.IntType(32), ir.IntType(64)


class Vec(types.Type):
    """The Numba type of an LLVM vector."""

    def __init__(self, element: str, lanes: int) -> None:
        self.element, self.lanes = element, lanes
        super().__init__(name=f"{element}x{lanes}")

    @property
    def llvm(self) -> ir.VectorType:
        """The LLVM type."""
        return ir.VectorType(_ELEMENTS[self.element], self.lanes)


@register_model(Vec)
class _VecModel(models.PrimitiveModel):
    def __init__(self, manager: Any, vec: Vec) -> None:
        super().__init__(manager, vec, vec.llvm)


i8x64, i32x16, f32x16 = Vec("i8", 64), Vec("i32", 16), Vec("f32", 16)
addr = types.intp
_SCALARS = {
    types.intp: _I64,
    types.int16: ir.IntType(16),
    types.uint8: ir.IntType(8),
    types.float64: ir.DoubleType(),
    types.int32: _I32, types.uint32: _I32, types.float32: ir.FloatType()}



def operation(result: types.Type, *arguments: types.Type) -> Callable[[Callable[..., Value]], Any]:
    """Make a Numba intrinsic of a function (builder, *values) -> value that emits LLVM IR."""

    def wrap(emit: Callable[..., Value]) -> Any:
        signature = result(*arguments)

        def codegen(context: Any, builder: Builder, _sig: Any, values: Sequence[Value]) -> Value:
            value = emit(builder, *values)
            return context.get_dummy_value() if value is None else value

        names = ", ".join(f"a{i}" for i in range(len(arguments)))
        scope: dict[str, Any] = {"signature": signature, "codegen": codegen}
        # Numba takes an intrinsic's arity from its Python signature.
        exec(f"def {emit.__name__}(typingctx, {names}): return signature, codegen", scope)  # noqa: S102
        definition = scope[emit.__name__]
        definition.__doc__, definition.__module__ = emit.__doc__, emit.__module__
        return intrinsic(definition)

    return wrap


def _call(builder: Builder, name: str, result: ir.Type, *values: Value) -> Value:
    """Call an LLVM intrinsic or an external C function."""
    kind = ir.FunctionType(result, [v.type for v in values])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), values)


def _const(vec: Vec | ir.VectorType, value: float) -> Value:
    kind = vec.llvm if isinstance(vec, Vec) else vec
    return ir.Constant(kind, [value] * kind.count)


def _pointer(builder: Builder, address: Value, kind: ir.Type) -> Value:
    return builder.inttoptr(address, kind.as_pointer())


def _load(builder: Builder, address: Value, kind: ir.Type) -> Value:
    return builder.load(_pointer(builder, address, kind), align=1)


def _store(builder: Builder, address: Value, value: Value) -> None:
    builder.store(value, _pointer(builder, address, value.type), align=1)


def _splat(builder: Builder, vec: Vec, scalar: Value) -> Value:
    undefined = ir.Constant(vec.llvm, ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(_I32, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(_I32, vec.lanes), [0] * vec.lanes))


def _shuffle(builder: Builder, value: Value, lanes: Sequence[int]) -> Value:
    mask = ir.Constant(ir.VectorType(_I32, len(lanes)), list(lanes))
    return builder.shuffle_vector(value, ir.Constant(value.type, ir.Undefined), mask)


_SOFT_F16 = ISA == "portable" and platform.machine() == "x86_64"  # no F16C before Ivy Bridge


def _from_f16(b: Builder, half: Value) -> Value:
    """float16 lanes to float32."""
    if not _SOFT_F16:
        return b.fpext(half, f32x16.llvm)
    bits = b.zext(b.bitcast(half, ir.VectorType(_ELEMENTS["i16"], 16)), i32x16.llvm)
    magnitude = b.shl(b.and_(bits, _const(i32x16, 0x7FFF)), _const(i32x16, 13))
    # Exponents differ by 112; the product also makes subnormals normal.
    scaled = b.fmul(b.bitcast(magnitude, f32x16.llvm), _const(f32x16, 2.0**112))
    special = b.icmp_unsigned(">=", magnitude, _const(i32x16, 0x7C00 << 13))
    wide = b.select(special, b.or_(magnitude, _const(i32x16, 0x7F800000)), b.bitcast(scaled, i32x16.llvm))
    sign = b.shl(b.and_(bits, _const(i32x16, 0x8000)), _const(i32x16, 16))
    return b.bitcast(b.or_(wide, sign), f32x16.llvm)


def _to_f16(b: Builder, x: Value) -> Value:
    """float32 lanes to float16, ties to even, what is too large to infinity."""
    if not _SOFT_F16:
        return b.fptrunc(x, ir.VectorType(ir.HalfType(), 16))
    bits = b.bitcast(x, i32x16.llvm)
    magnitude = b.and_(bits, _const(i32x16, 0x7FFFFFFF))
    # Normal results: rebias the exponent by -112 and round at bit 13.
    odd = b.and_(b.lshr(magnitude, _const(i32x16, 13)), _const(i32x16, 1))
    rebiased = b.add(b.sub(magnitude, _const(i32x16, 112 << 23)), b.add(odd, _const(i32x16, 0xFFF)))
    normal = b.lshr(rebiased, _const(i32x16, 13))
    # Subnormal results: adding 1/2 leaves the wanted bits at the end of the mantissa, rounded.
    half = _const(f32x16, 0.5)
    tiny = b.sub(b.bitcast(b.fadd(b.bitcast(magnitude, f32x16.llvm), half), i32x16.llvm), b.bitcast(half, i32x16.llvm))
    value = b.select(b.icmp_unsigned("<", magnitude, _const(i32x16, 113 << 23)), tiny, normal)
    value = b.select(b.icmp_unsigned(">", value, _const(i32x16, 0x7C00)), _const(i32x16, 0x7C00), value)
    infinite = b.icmp_unsigned(">=", magnitude, _const(i32x16, 0x47800000))
    value = b.select(infinite, _const(i32x16, 0x7C00), value)
    nan = b.icmp_unsigned(">", magnitude, _const(i32x16, 0x7F800000))
    sign = b.and_(b.lshr(bits, _const(i32x16, 16)), _const(i32x16, 0x8000))
    value = b.or_(b.select(nan, _const(i32x16, 0x7E00), value), sign)
    return b.bitcast(b.trunc(value, ir.VectorType(_ELEMENTS["i16"], 16)), ir.VectorType(ir.HalfType(), 16))


# --- memory ---------------------------------------------------------------------------------------


@operation(i8x64, addr)
def load_i8(b: Builder, p: Value) -> Value:
    """64 bytes."""
    return _load(b, p, i8x64.llvm)


@operation(f32x16, addr)
def load_f32(b: Builder, p: Value) -> Value:
    """16 float32."""
    return _load(b, p, f32x16.llvm)


@operation(f32x16, addr)
def load_f16(b: Builder, p: Value) -> Value:
    """16 float16, widened to float32."""
    return _from_f16(b, _load(b, p, ir.VectorType(ir.HalfType(), 16)))


@operation(f32x16, addr)
def load_bf16(b: Builder, p: Value) -> Value:
    """16 bfloat16, widened to float32: they are the upper halves."""
    wide = b.zext(_load(b, p, ir.VectorType(_ELEMENTS["i16"], 16)), i32x16.llvm)
    return b.bitcast(b.shl(wide, _const(i32x16, 16)), f32x16.llvm)


@operation(i32x16, addr)
def load_u8_as_i32(b: Builder, p: Value) -> Value:
    """16 unsigned bytes, widened."""
    return b.zext(_load(b, p, ir.VectorType(_ELEMENTS["i8"], 16)), i32x16.llvm)


@operation(i32x16, addr)
def load_s8_as_i32(b: Builder, p: Value) -> Value:
    """16 signed bytes, widened."""
    return b.sext(_load(b, p, ir.VectorType(_ELEMENTS["i8"], 16)), i32x16.llvm)


@operation(i32x16, addr)
def load_u4_as_i32(b: Builder, p: Value) -> Value:
    """16 nibbles from 8 bytes: lane i is the low half of byte i, lane i + 8 the high half."""
    packed = _load(b, p, ir.VectorType(_ELEMENTS["i8"], 8))
    low = b.and_(packed, _const(packed.type, 15))
    high = b.lshr(packed, _const(packed.type, 4))
    lanes = ir.Constant(ir.VectorType(_I32, 16), list(range(16)))
    return b.zext(b.shuffle_vector(low, high, lanes), i32x16.llvm)


@operation(i32x16, addr)
def load_u2_as_i32(b: Builder, p: Value) -> Value:
    """16 two-bit fields from 4 bytes: lane i is field i // 4 of byte i % 4."""
    wide = b.zext(_load(b, p, ir.VectorType(_ELEMENTS["i8"], 4)), ir.VectorType(_I32, 4))
    spread = _shuffle(b, wide, [i % 4 for i in range(16)])
    shifts = ir.Constant(i32x16.llvm, [2 * (i // 4) for i in range(16)])
    return b.and_(b.lshr(spread, shifts), _const(i32x16, 3))


@operation(types.void, addr, f32x16)
def store_f32(b: Builder, p: Value, v: Value) -> None:
    """16 float32."""
    _store(b, p, v)


@operation(types.void, addr, f32x16)
def store_f16(b: Builder, p: Value, v: Value) -> None:
    """16 float32, rounded to float16."""
    _store(b, p, _to_f16(b, v))


@operation(types.void, addr, i8x64)
def store_i8(b: Builder, p: Value, v: Value) -> None:
    """64 bytes."""
    _store(b, p, v)


@operation(types.void, addr, i32x16)
def store_i32_as_s8(b: Builder, p: Value, v: Value) -> None:
    """16 int32 that fit a signed byte each."""
    _store(b, p, b.trunc(v, ir.VectorType(_ELEMENTS["i8"], 16)))


def _scalar_load(result: types.Type, doc: str) -> Any:
    def load(b: Builder, p: Value) -> Value:
        return _load(b, p, _SCALARS[result])

    load.__name__, load.__doc__ = f"load_scalar_{result}", doc
    return operation(result, addr)(load)


load_scalar_i32 = _scalar_load(types.int32, "One int32.")
load_scalar_i64 = _scalar_load(types.intp, "One int64.")
load_scalar_f32 = _scalar_load(types.float32, "One float32.")
load_scalar_u8 = _scalar_load(types.uint8, "One unsigned byte.")
load_scalar_i16 = _scalar_load(types.int16, "Two bytes.")
load_scalar_f64 = _scalar_load(types.float64, "One float64.")


@operation(types.void, addr, types.float32)
def store_scalar_f32(b: Builder, p: Value, v: Value) -> None:
    """One float32."""
    _store(b, p, v)


@operation(types.void, addr, types.int32)
def store_scalar_i32(b: Builder, p: Value, v: Value) -> None:
    """One int32."""
    _store(b, p, v)


@operation(types.void, addr, types.intp)
def store_scalar_u8(b: Builder, p: Value, v: Value) -> None:
    """The lowest byte of an integer."""
    _store(b, p, b.trunc(v, ir.IntType(8)))


@operation(types.void, addr, types.int16)
def store_scalar_i16(b: Builder, p: Value, v: Value) -> None:
    """Two bytes."""
    _store(b, p, v)


@operation(types.void, addr, types.intp)
def store_scalar_i64(b: Builder, p: Value, v: Value) -> None:
    """One int64."""
    _store(b, p, v)


@operation(types.void, addr, types.float32)
def store_scalar_f16(b: Builder, p: Value, v: Value) -> None:
    """One float32, rounded to float16."""
    _store(b, p, b.extract_element(_to_f16(b, _splat(b, f32x16, v)), ir.Constant(_I32, 0)))


@operation(types.void, addr)
def prefetch(b: Builder, p: Value) -> None:
    """Ask for the cache line at `p`; any address is allowed."""
    byte = ir.IntType(8).as_pointer()
    hints = [ir.Constant(_I32, n) for n in (0, 3, 1)]  # read, keep in all levels, data
    _call(b, "llvm.prefetch.p0", ir.VoidType(), b.inttoptr(p, byte), *hints)


# --- making vectors -------------------------------------------------------------------------------


@operation(f32x16, types.float32)
def splat_f32(b: Builder, x: Value) -> Value:
    """Every lane `x`."""
    return _splat(b, f32x16, x)


@operation(i32x16, types.int32)
def splat_i32(b: Builder, x: Value) -> Value:
    """Every lane `x`."""
    return _splat(b, i32x16, x)


@operation(i8x64, addr)
def splat_i8x4(b: Builder, p: Value) -> Value:
    """The four bytes at `p`, sixteen times."""
    return b.bitcast(_splat(b, i32x16, _load(b, p, _I32)), i8x64.llvm)


# --- bytes ----------------------------------------------------------------------------------------


@operation(i8x64, i8x64)
def low_nibbles(b: Builder, v: Value) -> Value:
    """The low half of each byte."""
    return b.and_(v, _const(i8x64, 15))


@operation(i8x64, i8x64)
def high_nibbles(b: Builder, v: Value) -> Value:
    """The high half of each byte."""
    shifted = b.bitcast(b.lshr(b.bitcast(v, i32x16.llvm), _const(i32x16, 4)), i8x64.llvm)
    return b.and_(shifted, _const(i8x64, 15))


@operation(i8x64, i8x64, addr)
def or_bit4(b: Builder, v: Value, p: Value) -> Value:
    """Sets bit 4 of byte i where bit i of the eight bytes at `p` is set."""
    mask = b.bitcast(_load(b, p, _I64), ir.VectorType(_I1, 64))
    return b.or_(v, b.select(mask, _const(i8x64, 16), _const(i8x64, 0)))


@operation(i8x64, i8x64, i8x64, types.int32)
def or_bits45(b: Builder, v: Value, plane: Value, shift: Value) -> Value:
    """Ors the two bits at `shift` (0, 2, 4 or 6) of each byte of `plane` into bits 4 and 5."""
    wide = b.lshr(b.bitcast(plane, i32x16.llvm), _splat(b, i32x16, shift))
    two = b.and_(b.bitcast(wide, i8x64.llvm), _const(i8x64, 3))
    high = b.bitcast(b.shl(b.bitcast(two, i32x16.llvm), _const(i32x16, 4)), i8x64.llvm)
    return b.or_(v, high)


def table_lookup(name: str, values: Sequence[int]) -> Any:
    """An operation that replaces each byte 0..15 by `values` of it (bytes)."""
    table = [v & 255 for v in values]

    def look_up(b: Builder, v: Value) -> Value:
        if ISA == "avx512":
            return _call(b, "llvm.x86.avx512.pshuf.b.512", i8x64.llvm, ir.Constant(i8x64.llvm, table * 4), v)
        if ISA in ("avxvnni", "avx2"):
            half = ir.VectorType(_ELEMENTS["i8"], 32)
            parts = [
                _call(b, "llvm.x86.avx2.pshuf.b", half, ir.Constant(half, table * 2), _shuffle(b, v, lanes))
                for lanes in (range(32), range(32, 64))
            ]
            return b.shuffle_vector(*parts, ir.Constant(ir.VectorType(_I32, 64), list(range(64))))
        result = _const(i8x64, table[0])
        for code in range(1, 16):
            hit = b.icmp_unsigned("==", v, _const(i8x64, code))
            result = b.select(hit, _const(i8x64, table[code]), result)
        return result

    look_up.__name__, look_up.__doc__ = name, f"Bytes 0..15 to {list(values)}."
    return operation(i8x64, i8x64)(look_up)


def dot_u8s8_ir(b: Builder, acc: Value, u: Value, s: Value) -> Value:
    """acc[i] + sum over j < 4 of u[4 i + j] * s[4 i + j], u unsigned, s signed, exact: as LLVM IR."""
    if ISA == "avx512":
        return _call(b, "llvm.x86.avx512.vpdpbusd.512", i32x16.llvm, acc, u, s)
    if ISA == "avxvnni":
        half, parts = ir.VectorType(_I32, 8), []
        for k in range(2):
            lanes, bytes_ = range(8 * k, 8 * k + 8), range(32 * k, 32 * k + 32)
            operands = [_shuffle(b, acc, lanes), _shuffle(b, u, bytes_), _shuffle(b, s, bytes_)]
            parts.append(_call(b, "llvm.x86.avx512.vpdpbusd.256", half, *operands))
        return b.shuffle_vector(*parts, ir.Constant(ir.VectorType(_I32, 16), list(range(16))))
    return b.add(acc, _dot_through_i16(b, u, s))


def _dot_through_i16(b: Builder, u: Value, s: Value) -> Value:
    """The four-byte dot products by widening: vpmaddubsw would saturate at 16 bits."""
    if ISA == "avx2":
        half, parts = ir.VectorType(_I32, 8), []
        for start in range(0, 64, 16):
            lanes = range(start, start + 16)
            wide = ir.VectorType(_ELEMENTS["i16"], 16)
            pair = b.zext(_shuffle(b, u, lanes), wide), b.sext(_shuffle(b, s, lanes), wide)
            parts.append(_call(b, "llvm.x86.avx2.pmadd.wd", half, *pair))
        join = ir.Constant(ir.VectorType(_I32, 16), list(range(16)))
        low, high = b.shuffle_vector(*parts[:2], join), b.shuffle_vector(*parts[2:], join)
        even = ir.Constant(ir.VectorType(_I32, 16), list(range(0, 32, 2)))
        odd = ir.Constant(ir.VectorType(_I32, 16), list(range(1, 32, 2)))
        return b.add(b.shuffle_vector(low, high, even), b.shuffle_vector(low, high, odd))
    wide = ir.VectorType(_I32, 64)
    products = b.mul(b.zext(u, wide), b.sext(s, wide))
    total = _shuffle(b, products, range(0, 64, 4))
    for j in range(1, 4):
        total = b.add(total, _shuffle(b, products, range(j, 64, 4)))
    return total


# --- int32 ----------------------------------------------------------------------------------------


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
    return b.shl(x, _splat(b, i32x16, n))


@operation(i32x16, i32x16, types.int32)
def shift_right_i32(b: Builder, x: Value, n: Value) -> Value:
    """x >> n, zeros shifted in."""
    return b.lshr(x, _splat(b, i32x16, n))


@operation(types.int32, i32x16)
def sum_i32(b: Builder, x: Value) -> Value:
    """The sum of all lanes."""
    return _call(b, "llvm.vector.reduce.add.v16i32", _I32, x)


# --- float32 --------------------------------------------------------------------------------------


@operation(f32x16, i32x16)
def to_f32(b: Builder, x: Value) -> Value:
    """int32 to float32."""
    return b.sitofp(x, f32x16.llvm)


@operation(i32x16, f32x16)
def round_to_i32(b: Builder, x: Value) -> Value:
    """float32 to the nearest int32, ties to even."""
    return b.fptosi(_call(b, "llvm.rint.v16f32", f32x16.llvm, x), i32x16.llvm)


@operation(i32x16, f32x16)
def bits_of_f32(b: Builder, x: Value) -> Value:
    """The bit patterns."""
    return b.bitcast(x, i32x16.llvm)


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
    return _call(b, "llvm.fma.v16f32", f32x16.llvm, x, y, z)


@operation(f32x16, f32x16, f32x16)
def maximum(b: Builder, x: Value, y: Value) -> Value:
    """The larger of each pair."""
    return _call(b, "llvm.maxnum.v16f32", f32x16.llvm, x, y)


@operation(f32x16, f32x16, f32x16)
def minimum(b: Builder, x: Value, y: Value) -> Value:
    """The smaller of each pair."""
    return _call(b, "llvm.minnum.v16f32", f32x16.llvm, x, y)


@operation(f32x16, f32x16)
def absolute(b: Builder, x: Value) -> Value:
    """|x|."""
    return _call(b, "llvm.fabs.v16f32", f32x16.llvm, x)


@operation(f32x16, f32x16)
def round_even(b: Builder, x: Value) -> Value:
    """The nearest integer as float32, ties to even."""
    return _call(b, "llvm.rint.v16f32", f32x16.llvm, x)


@operation(types.float32, f32x16)
def sum_f32(b: Builder, x: Value) -> Value:
    """The sum of all lanes, by halves: lanes i and i + 8, then i + 4, ..."""
    lanes = 16
    while lanes > 1:
        lanes //= 2
        x = b.fadd(_shuffle(b, x, range(lanes)), _shuffle(b, x, range(lanes, 2 * lanes)))
    return b.extract_element(x, ir.Constant(_I32, 0))


@operation(types.float32, f32x16)
def first_f32(b: Builder, x: Value) -> Value:
    """Lane 0."""
    return b.extract_element(x, ir.Constant(_I32, 0))


@operation(types.float32, f32x16)
def max_f32(b: Builder, x: Value) -> Value:
    """The largest lane."""
    return _call(b, "llvm.vector.reduce.fmax.v16f32", ir.FloatType(), x)


@operation(f32x16, f32x16, types.int32, types.float32)
def fill_from_lane(b: Builder, x: Value, first: Value, fill: Value) -> Value:
    """x with lanes `first` and above replaced by `fill`."""
    lanes = ir.Constant(i32x16.llvm, list(range(16)))
    keep = b.icmp_signed("<", lanes, _splat(b, i32x16, first))
    return b.select(keep, x, _splat(b, f32x16, fill))
