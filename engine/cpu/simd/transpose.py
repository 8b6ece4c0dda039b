"""Transpositions in registers: vectors of 16 bytes, `stride` bytes apart, read, dealt out anew and written.

A riffle takes turns between the first and the second half of all elements; k of them turn a matrix of
2^k rows into its transpose. LLVM has an instruction for a riffle of two vectors on every CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba import types

from numoe.engine.cpu.simd.types import ELEMENTS, I32, I64, Builder, Value, addr, call, load, operation, store

_BYTES = 16


def _riffle(b: Builder, vectors: Sequence[Value]) -> list[Value]:
    """The elements of the first half and those of the second half in turns."""
    half, lanes = len(vectors) // 2, vectors[0].type.count
    out = []
    for first, second in zip(vectors[:half], vectors[half:], strict=True):
        for start in (0, lanes // 2):
            mask = [start + i // 2 + lanes * (i % 2) for i in range(lanes)]
            out.append(b.shuffle_vector(first, second, ir.Constant(ir.VectorType(I32, lanes), mask)))
    return out


def _transposition(name: str, element: str, count: int, riffles: int, flip: int, doc: str) -> Any:
    """An operation (source, stride, target, stride) on `count` vectors; `flip` is what elements are xor-ed with."""
    kind = ir.VectorType(ELEMENTS[element], 8 * _BYTES // ELEMENTS[element].width)

    def transpose(b: Builder, source: Value, source_stride: Value, target: Value, target_stride: Value) -> None:
        def at(base: Value, stride: Value, number: int) -> Value:
            return b.add(base, b.mul(stride, ir.Constant(I64, number)))

        vectors = [load(b, at(source, source_stride, i), kind) for i in range(count)]
        if flip:
            vectors = [b.xor(vector, ir.Constant(kind, [flip] * kind.count)) for vector in vectors]
        for _ in range(riffles):
            vectors = _riffle(b, vectors)
        for i, vector in enumerate(vectors):
            store(b, at(target, target_stride, i), vector)

    transpose.__name__, transpose.__doc__ = name, doc
    return operation(types.void, addr, addr, addr, addr)(transpose)


transpose_8x8_i16 = _transposition("transpose_8x8_i16", "i16", 8, 3, 0, "8 rows of 8 16-bit elements, transposed.")
# The top bit of every byte is flipped on the way: signed codes become biased ones, or the other way round.
transpose_4x4_words = _transposition("transpose_4x4_words", "i32", 4, 2, 0x80808080, "4 rows of 4 words, transposed.")
rows_to_quads = _transposition("rows_to_quads", "i8", 4, 2, 0x80, "4 rows of 16 bytes to 16 words of 4 bytes.")
quads_to_rows = _transposition("quads_to_rows", "i8", 4, 4, 0x80, "16 words of 4 bytes to 4 rows of 16 bytes.")


@operation(types.void, addr, addr, addr)
def copy(b: Builder, target: Value, source: Value, nbytes: Value) -> None:
    """`nbytes` bytes from `source` to `target`, which do not overlap."""
    pointers = [b.inttoptr(p, ir.IntType(8).as_pointer()) for p in (target, source)]
    call(b, "llvm.memcpy.p0.p0.i64", ir.VoidType(), *pointers, nbytes, ir.Constant(ir.IntType(1), 0))
