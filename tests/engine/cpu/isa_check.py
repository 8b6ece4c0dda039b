"""Checks of the kernels on the path that NUMOE_ISA names; run by test_isa.py in a process of its own."""

from __future__ import annotations

import numpy as np
from gguf import GGMLQuantizationType as QuantType
from numba import njit

from numoe.engine.cpu import ISA
from numoe.engine.cpu import simd as v
from numoe.engine.cpu.memory import address
from tests.engine.cpu.support import Matrix, random_weights
from tests.engine.cpu.test_products import as_seen

FORMATS = (QuantType.Q4_0, QuantType.Q5_1, QuantType.Q6_K, QuantType.IQ4_XS, QuantType.F16)


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
        matrix = Matrix(raw, qtype, 512, (3, 13))
        part = weights[:, 96:416]
        assert np.array_equal(matrix.unpacked(), part), qtype
        x = np.random.default_rng(0).standard_normal((14, 320)).astype(np.float32)
        want = as_seen(x, qtype) @ part.T.astype(np.float64)
        assert np.abs(matrix.product(x) - want).max() <= 1e-4 * want.std(), qtype


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
    check_f16()
    print(ISA, "ok")
