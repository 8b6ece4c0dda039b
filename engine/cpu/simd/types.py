"""Vector types, and making Numba operations of functions that emit LLVM IR."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

Builder = Any  # llvmlite.ir.IRBuilder
Value = Any  # llvmlite.ir.Value
Vector = Any  # in kernels: a value of one of the vector types

ELEMENTS = {
    "i8": ir.IntType(8),
    "i16": ir.IntType(16),
    "i32": ir.IntType(32),
    "f16": ir.HalfType(),
    "f32": ir.FloatType(),
}
I1, I32, I64 = ir.IntType(1), ir.IntType(32), ir.IntType(64)


class Vec(types.Type):
    """The Numba type of an LLVM vector."""

    def __init__(self, element: str, lanes: int) -> None:
        self.element, self.lanes = element, lanes
        super().__init__(name=f"{element}x{lanes}")

    @property
    def llvm(self) -> ir.VectorType:
        """The LLVM type."""
        return ir.VectorType(ELEMENTS[self.element], self.lanes)


@register_model(Vec)
class _VecModel(models.PrimitiveModel):
    def __init__(self, manager: Any, vec: Vec) -> None:
        super().__init__(manager, vec, vec.llvm)


i8x64, i32x16, f32x16 = Vec("i8", 64), Vec("i32", 16), Vec("f32", 16)
addr = types.intp


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


def call(builder: Builder, name: str, result: ir.Type, *values: Value) -> Value:
    """Call an LLVM intrinsic or an external C function."""
    kind = ir.FunctionType(result, [v.type for v in values])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), values)


def const(vec: Vec | ir.VectorType, value: float) -> Value:
    """The vector constant with every lane `value`."""
    kind = vec.llvm if isinstance(vec, Vec) else vec
    return ir.Constant(kind, [value] * kind.count)


def pointer(builder: Builder, address: Value, kind: ir.Type) -> Value:
    """The pointer to a `kind` at an integer address."""
    return builder.inttoptr(address, kind.as_pointer())


def load(builder: Builder, address: Value, kind: ir.Type) -> Value:
    """Load a `kind`, aligned or not."""
    return builder.load(pointer(builder, address, kind), align=1)


def store(builder: Builder, address: Value, value: Value) -> None:
    """Store a value, aligned or not."""
    builder.store(value, pointer(builder, address, value.type), align=1)


def splat(builder: Builder, vec: Vec, scalar: Value) -> Value:
    """The vector with every lane `scalar`."""
    undefined = ir.Constant(vec.llvm, ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(I32, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(I32, vec.lanes), [0] * vec.lanes))


def shuffle(builder: Builder, value: Value, lanes: Sequence[int]) -> Value:
    """The lanes of a vector that `lanes` lists."""
    mask = ir.Constant(ir.VectorType(I32, len(lanes)), list(lanes))
    return builder.shuffle_vector(value, ir.Constant(value.type, ir.Undefined), mask)
