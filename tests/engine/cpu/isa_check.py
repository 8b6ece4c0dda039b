"""Checks of the kernels on the path that NUMOE_ISA names; run by test_isa.py in a process of its own."""

from __future__ import annotations

import numpy as np
from gguf import GGMLQuantizationType as QuantType
from numba import njit

from numoe.engine.cpu import ISA
from numoe.engine.cpu import simd as v
from numoe.engine.cpu.isa import host_isas
from numoe.engine.cpu.memory import address, aligned_bytes
from numoe.engine.cpu.rows import activation_bytes, quantize_reference, quantize_row
from numoe.engine.formats import pack
from tests.engine.cpu.support import Matrix, random_weights
from tests.engine.cpu.test_products import as_seen

# One for each way to hold codes and scales; packing is plain integer code, here that in NumPy.
FORMATS = (QuantType.IQ4_XS, QuantType.F16, QuantType.Q5_1, QuantType.Q6_K)
if host_isas()[0] != ISA:
    FORMATS = FORMATS[:2]  # what sets the paths apart: dot products, table lookups, float16


@njit
def _widen(x: int, out: int, n: int) -> None:
    for i in range(n // 16):
        v.store_f32(out + 64 * i, v.load_f16(x + 32 * i))


@njit
def _narrow(x: int, out: int, n: int) -> None:
    for i in range(n // 16):
        v.store_f16(out + 32 * i, v.load_f32(x + 64 * i))


def check_products() -> None:
    for qtype in FORMATS:
        raw, weights = random_weights(qtype, 33, 512)
        matrix = Matrix(raw, qtype, 512, (3, 13), pack)
        part = weights[:, 96:416]
        assert np.array_equal(matrix.unpacked(), part), qtype
        x = np.random.default_rng(0).standard_normal((14, 320)).astype(np.float32)
        want = as_seen(x, qtype) @ part.T.astype(np.float64)
        assert np.abs(matrix.product(x) - want).max() <= 1e-4 * want.std(), qtype


def check_extreme_codes() -> None:
    """Sums of products that would saturate 16 bits: codes 255 and 0 times activations of -128 and 127."""
    for weight in (127, -128):
        raw = np.zeros((16, 2 * 34), np.uint8)
        raw[:] = np.tile(np.array([1.0], np.float16).view(np.uint8).tolist() + [weight % 256] * 32, 2)
        x = np.full((4, 64), -3.0, np.float32)
        x[1::2, 1::2] = 2.9
        want = as_seen(x, QuantType.Q8_0) @ np.full((64, 16), float(weight))
        found = Matrix(raw, QuantType.Q8_0, 64, None, pack).product(x)
        np.testing.assert_allclose(found, want, rtol=1e-6, atol=1e-3)


def check_quantized_rows() -> None:
    """Codes are the reference's, also where a value lies half way between two."""
    x = np.random.default_rng(2).standard_normal((8, 64)).astype(np.float32)
    x[:, 32:] = np.arange(-16, 16) / 2
    x[:, 32] = 64  # one step is a half: the scale is exact, every other value a tie
    buffer = aligned_bytes(activation_bytes(64, "q8"))
    for row, codes in zip(x, quantize_reference(x)[0], strict=True):
        quantize_row(address(row), 64, address(buffer))
        assert np.array_equal(buffer[:64].view(np.int8), codes)


def check_f16() -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    out = np.empty(1 << 16, np.float32)
    _widen(address(every), address(out), len(every))
    assert np.array_equal(out, every.astype(np.float32), equal_nan=True)
    # Every half, the midpoints between neighbours (ties), and their neighbours in float32.
    finite = every[np.isfinite(every)].astype(np.float32)
    middle = ((np.sort(finite)[1:].astype(np.float64) + np.sort(finite)[:-1]) / 2).astype(np.float32)
    around = [np.nextafter(middle, np.float32(sign * np.inf)) for sign in (-1, 1)]
    special = np.array([65519.0, 65520.0, 1e30, -1e30, np.inf, -np.inf, np.nan, 1e-8, -1e-8], np.float32)
    x = np.concatenate([finite, middle, *around, special])
    x = np.resize(x, (len(x) + 15) // 16 * 16)
    narrowed = np.empty(len(x), np.float16)
    _narrow(address(x), address(narrowed), len(x))
    with np.errstate(over="ignore"):
        assert np.array_equal(narrowed, x.astype(np.float16), equal_nan=True)


if __name__ == "__main__":
    check_products()
    check_extreme_codes()
    check_quantized_rows()
    check_f16()
    print(ISA, "ok")
