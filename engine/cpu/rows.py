"""Row operations that products need around them: 8-bit activations, exp, SiLU, RMSNorm."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from numoe.engine.cpu import simd as v
from numoe.engine.cpu.memory import align, inline
from numoe.engine.cpu.tile import META_BYTES

_LOG2E, _LN2_HIGH, _LN2_LOW = 1.4426950408889634, 0.693359375, -2.12194440e-4


def activation_bytes(cols: int, kind: str) -> int:
    """Bytes from one activation row to the next: kind "q8" or "f32"."""
    return align(cols + cols // 32 * META_BYTES if kind == "q8" else 4 * cols)


@inline
def exp(x: Any) -> Any:
    """e^x for each lane, within 2 units in the last place; below -87.3 as there, 1.2e-38.

    exp(x) = 2^n exp(r), r = x - n ln 2 in two parts (Cody & Waite 1980), exp(r) by the degree-6
    polynomial of the Cephes library's expf.
    """
    x = v.minimum(v.maximum(x, v.splat_f32(-87.3)), v.splat_f32(88.3))
    n = v.round_even(v.mul(x, v.splat_f32(_LOG2E)))
    r = v.fma(n, v.splat_f32(-_LN2_HIGH), x)
    r = v.fma(n, v.splat_f32(-_LN2_LOW), r)
    p = v.fma(v.splat_f32(1.9875691500e-4), r, v.splat_f32(1.3981999507e-3))
    p = v.fma(p, r, v.splat_f32(8.3334519073e-3))
    p = v.fma(p, r, v.splat_f32(4.1665795894e-2))
    p = v.fma(p, r, v.splat_f32(1.6666665459e-1))
    p = v.fma(p, r, v.splat_f32(5.0000001201e-1))
    p = v.fma(v.mul(r, r), p, v.add(r, v.splat_f32(1.0)))
    power = v.shift_left_i32(v.add_i32(v.round_to_i32(n), v.splat_i32(127)), 23)
    return v.mul(p, v.f32_of_bits(power))


@inline
def silu_mul(gate: Any, up: Any) -> Any:
    """gate * sigmoid(gate) * up: the SwiGLU activation (Shazeer 2020)."""
    one = v.splat_f32(1.0)
    sigmoid = v.div(one, v.add(one, exp(v.sub(v.splat_f32(0.0), gate))))
    return v.mul(v.mul(gate, sigmoid), up)


@inline
def quantize_block(a: Any, b: Any, codes: int, meta: int) -> None:
    """32 float32, as two vectors, to 32 int8 at `codes` and their scale and sums at `meta`.

    The element of the largest magnitude becomes -128, whatever its sign: the scale takes the other
    sign. The scale stored is the one that then fits best in the least-squares sense,
    sum(x q) / sum(q q).
    """
    extremes = v.max2_f32(v.maximum(a, b), v.sub(v.splat_f32(np.float32(0.0)), v.minimum(a, b)))
    largest, smallest = v.lane_f32(extremes, np.int32(0)), -v.lane_f32(extremes, np.int32(8))
    extreme = largest if largest > -smallest else smallest
    inverse = np.float32(0.0)
    if abs(extreme) > np.float32(1e-30):
        inverse = np.float32(-128.0) / extreme
    most = v.splat_f32(np.float32(127.0))
    qa = v.round_to_i32(v.minimum(v.mul(a, v.splat_f32(inverse)), most))
    qb = v.round_to_i32(v.minimum(v.mul(b, v.splat_f32(inverse)), most))
    fa, fb = v.to_f32(qa), v.to_f32(qb)
    sums = v.sum4_f32(v.fma(fa, fa, v.mul(fb, fb)), v.fma(fa, a, v.mul(fb, b)), fa, fb)
    squares, low, high = v.lane_f32(sums, np.int32(0)), v.lane_f32(sums, np.int32(8)), v.lane_f32(sums, np.int32(12))
    scale = np.float32(0.0)
    if squares > np.float32(0.0):
        scale = v.lane_f32(sums, np.int32(4)) / squares
    v.store_i32_as_s8(codes, qa)
    v.store_i32_as_s8(codes + 16, qb)
    v.store_scalar_f32(meta, scale)
    v.store_scalar_i32(meta + 4, np.int32(low + high))
    v.store_scalar_i32(meta + 8, np.int32(low))
    v.store_scalar_i32(meta + 12, np.int32(high))


@njit(nogil=True, error_model="numpy")
def quantize_row(x: int, cols: int, out: int) -> None:
    """float32 [cols] at `x` to an 8-bit activation row at `out`; cols is a multiple of 32."""
    for block in range(cols // 32):
        p = x + 128 * block
        quantize_block(v.load_f32(p), v.load_f32(p + 64), out + 32 * block, out + cols + META_BYTES * block)


@njit(nogil=True, error_model="numpy")
def rms_norm_row(x: int, weight: int, cols: int, eps: float, out: int) -> None:
    """out = x / sqrt(mean(x^2) + eps) * weight (Zhang & Sennrich 2019); float32, cols a multiple of 16."""
    total = v.splat_f32(0.0)
    for i in range(0, 4 * cols, 64):
        a = v.load_f32(x + i)
        total = v.fma(a, a, total)
    scale = v.splat_f32(np.float32(1.0 / np.sqrt(v.sum_f32(total) / np.float32(cols) + eps)))
    for i in range(0, 4 * cols, 64):
        v.store_f32(out + i, v.mul(v.mul(v.load_f32(x + i), scale), v.load_f32(weight + i)))


@njit(nogil=True, error_model="numpy")
def add_row(x: int, y: int, cols: int) -> None:
    """x += y, float32 [cols], cols a multiple of 16."""
    for i in range(0, 4 * cols, 64):
        v.store_f32(x + i, v.add(v.load_f32(x + i), v.load_f32(y + i)))


def quantize_reference(x: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """What `quantize_row` computes, in NumPy: codes int8 [rows, cols], scales float32 [rows, cols / 32]."""
    blocks = x.reshape(len(x), -1, 32).astype(np.float32)
    low, high = blocks.min(axis=2, keepdims=True), blocks.max(axis=2, keepdims=True)
    extreme = np.where(high > -low, high, low)
    inverse = np.where(np.abs(extreme) > 1e-30, np.float32(-128) / np.where(extreme == 0, 1, extreme), 0)
    codes = np.rint(np.minimum(blocks * inverse.astype(np.float32), np.float32(127)))
    squares = (codes * codes).sum(axis=2)
    scales = np.where(squares > 0, (codes * blocks).sum(axis=2) / np.maximum(squares, 1), 0)
    return codes.reshape(x.shape).astype(np.int8), scales.astype(np.float32)
