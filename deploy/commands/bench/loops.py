"""What `numoe bench kernels` times: loops that run on one thread, without Python."""

from __future__ import annotations

import numpy as np
from numba import njit

from numoe.engine.cpu import simd as v
from numoe.engine.cpu.sync import call_product

OPERAND_BYTES = 13 * 64
"""What `dots` and `fmas` read: one vector, and one for each chain."""
PRODUCT_GROUPS = 4
"""Groups of 16 weight rows that a call of a product kernel computes: what a thread takes of an expert."""
_CHAINS = 12
DOTS_MACS = 64 * _CHAINS
"""Multiply-adds of a round of `dots`: of one instruction, times the chains that hide its latency."""
FMAS_MACS = 16 * _CHAINS
"""The same of `fmas`."""

_dot = v.operation(v.i32x16, v.i32x16, v.i8x64, v.i8x64)(v.dot_u8s8)


@njit(nogil=True, error_model="numpy", cache=True)
def products(
    kernel: int, weights: int, first: int, last: int, group_bytes: int, blocks: int,
    pointers: int, rows: int, out: int,
) -> None:  # fmt: skip
    """The product kernel over groups `first` to `last` of a packed matrix, for `rows` activation rows.

    As many groups at a time as an expert has; their results, float32 [rows, 16 PRODUCT_GROUPS],
    overwrite those of the ones before at `out`.
    """
    for group in range(first, last, PRODUCT_GROUPS):
        w, groups = weights + group * group_bytes, min(PRODUCT_GROUPS, last - group)
        stride, ahead = 64 * PRODUCT_GROUPS, w + groups * group_bytes
        call_product(kernel, w, group_bytes, groups, blocks, 0, pointers, rows, out, stride, ahead)


@njit(nogil=True, error_model="numpy", cache=True)
def dots(rounds: int, source: int, out: int) -> int:
    """Twelve independent chains of integer dot products of a vector at `source` with those behind it.

    The store at `out` keeps the compiler from computing any of them only once.
    """
    x, zero = source + 64, v.splat_i32(np.int32(0))
    a, b, c, d, e, f = zero, zero, zero, zero, zero, zero
    g, h, i, j, k, m = zero, zero, zero, zero, zero, zero
    for number in range(rounds):
        w = v.load_i8(source)
        a, b, c = _dot(a, w, v.load_i8(x)), _dot(b, w, v.load_i8(x + 64)), _dot(c, w, v.load_i8(x + 128))
        d, e, f = _dot(d, w, v.load_i8(x + 192)), _dot(e, w, v.load_i8(x + 256)), _dot(f, w, v.load_i8(x + 320))
        g, h, i = _dot(g, w, v.load_i8(x + 384)), _dot(h, w, v.load_i8(x + 448)), _dot(i, w, v.load_i8(x + 512))
        j, k, m = _dot(j, w, v.load_i8(x + 576)), _dot(k, w, v.load_i8(x + 640)), _dot(m, w, v.load_i8(x + 704))
        v.store_scalar_i32(out, np.int32(number))
    low = v.add_i32(v.add_i32(v.add_i32(a, b), v.add_i32(c, d)), v.add_i32(e, f))
    high = v.add_i32(v.add_i32(v.add_i32(g, h), v.add_i32(i, j)), v.add_i32(k, m))
    return v.sum_i32(v.add_i32(low, high))


@njit(nogil=True, error_model="numpy", cache=True)
def fmas(rounds: int, source: int, out: int) -> float:
    """The same with float32 multiply-adds."""
    x, zero = source + 64, v.splat_f32(np.float32(0.0))
    a, b, c, d, e, f = zero, zero, zero, zero, zero, zero
    g, h, i, j, k, m = zero, zero, zero, zero, zero, zero
    for number in range(rounds):
        w = v.load_f32(source)
        a, b, c = v.fma(w, v.load_f32(x), a), v.fma(w, v.load_f32(x + 64), b), v.fma(w, v.load_f32(x + 128), c)
        d, e, f = v.fma(w, v.load_f32(x + 192), d), v.fma(w, v.load_f32(x + 256), e), v.fma(w, v.load_f32(x + 320), f)
        g, h, i = v.fma(w, v.load_f32(x + 384), g), v.fma(w, v.load_f32(x + 448), h), v.fma(w, v.load_f32(x + 512), i)
        j, k, m = v.fma(w, v.load_f32(x + 576), j), v.fma(w, v.load_f32(x + 640), k), v.fma(w, v.load_f32(x + 704), m)
        v.store_scalar_i32(out, np.int32(number))
    low = v.add(v.add(v.add(a, b), v.add(c, d)), v.add(e, f))
    high = v.add(v.add(v.add(g, h), v.add(i, j)), v.add(k, m))
    return v.sum_f32(v.add(low, high))
