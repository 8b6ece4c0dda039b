"""Product kernels against float64, and the row operations around them."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGMLQuantizationType as QuantType
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit

from numoe.engine.cpu import rows
from numoe.engine.cpu import simd as v
from numoe.engine.cpu.memory import address, aligned_bytes
from numoe.engine.cpu.rows import activation_bytes, quantize_reference, quantize_row, rms_norm_row
from tests.engine.cpu.support import ALL_FORMATS, Matrix, random_weights


def as_seen(x: np.ndarray, qtype: QuantType) -> np.ndarray:
    """The activations as the product reads them, float64."""
    if qtype.name in ("F32", "F16", "BF16"):
        return x.astype(np.float64)
    codes, scales = quantize_reference(x)
    return codes.astype(np.float64) * np.repeat(scales.astype(np.float64), 32, axis=1)


@pytest.mark.parametrize("qtype", ALL_FORMATS, ids=lambda q: q.name)
@settings(max_examples=10, deadline=None)
@given(n=st.integers(1, 29), rows=st.integers(1, 40), first=st.integers(0, 15), length=st.integers(1, 16))
def test_products_equal_float64(qtype: QuantType, n: int, rows: int, first: int, length: int) -> None:
    blocks = (first, min(16, first + length))
    raw, weights = random_weights(qtype, rows, 512, seed=n)
    cols = 32 * (blocks[1] - blocks[0])
    x = np.random.default_rng(n).standard_normal((n, cols)).astype(np.float32)
    found = Matrix(raw, qtype, 512, blocks).product(x)
    part = weights[:, 32 * blocks[0] : 32 * blocks[1]].astype(np.float64)
    want = as_seen(x, qtype) @ part.T
    scale = np.abs(as_seen(x, qtype)) @ np.abs(part).T
    assert np.abs(found - want).max() <= 3e-6 * scale.max()


@pytest.mark.parametrize("qtype", ALL_FORMATS, ids=lambda q: q.name)
def test_a_row_is_the_same_alone_and_in_any_batch(qtype: QuantType) -> None:
    raw, _ = random_weights(qtype, 32, 256)
    matrix, x = Matrix(raw, qtype, 256), np.random.default_rng(0).standard_normal((31, 256)).astype(np.float32)
    together = matrix.product(x)
    for start, stop in ((0, 1), (3, 7), (5, 17), (30, 31)):
        assert np.array_equal(matrix.product(x[start:stop]), together[start:stop])


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1e-20, 1e-3, 1.0, 1e6]))
def test_quantizing_a_row_is_what_the_reference_does(seed: int, scale: float) -> None:
    x = (np.random.default_rng(seed).standard_normal((1, 96)) * scale).astype(np.float32)
    x[0, :32] = 0 if seed % 3 == 0 else x[0, :32]
    buffer = aligned_bytes(activation_bytes(96, "q8"))
    quantize_row(address(x), 96, address(buffer))
    codes, scales = quantize_reference(x)
    meta = buffer[96 : 96 + 48].view(np.int32).reshape(3, 4)
    assert np.array_equal(buffer[:96].view(np.int8), codes[0])
    np.testing.assert_allclose(meta[:, 0].view(np.float32), scales[0], rtol=1e-5)
    sums = codes.astype(np.int32).reshape(3, 2, 16).sum(axis=2)
    assert np.array_equal(meta[:, 2:], sums)
    assert np.array_equal(meta[:, 1], sums.sum(axis=1))


def test_quantizing_is_within_half_a_step() -> None:
    x = np.random.default_rng(1).standard_normal((64, 256)).astype(np.float32)
    codes, scales = quantize_reference(x)
    error = np.abs(codes * np.repeat(scales, 32, axis=1) - x)
    assert (error <= 1.01 * np.repeat(np.abs(scales), 32, axis=1)).all()
    assert error.mean() < 0.27 * np.abs(scales).mean()


@njit
def _map_exp(x: int, out: int, n: int) -> None:
    for i in range(0, 4 * n, 64):
        v.store_f32(out + i, rows.exp(v.load_f32(x + i)))


def test_exp_is_within_two_units_in_the_last_place() -> None:
    x = np.concatenate([np.linspace(-87, 88, 1 << 14), [0.0, -0.0, 1.0, -1.0]]).astype(np.float32)
    x = np.resize(x, len(x) // 16 * 16 + 16)
    out = np.empty_like(x)
    _map_exp(address(x), address(out), len(x))
    want = np.exp(x.astype(np.float64))
    assert (np.abs(out - want) / np.spacing(want.astype(np.float32))).max() <= 2


@njit
def _map_silu(gate: int, up: int, n: int) -> None:
    for i in range(0, 4 * n, 64):
        v.store_f32(gate + i, rows.silu_mul(v.load_f32(gate + i), v.load_f32(up + i)))


def test_exp_and_swiglu_stay_finite_at_the_ends() -> None:
    x = np.array([-np.inf, -1e30, -200, -104, -88, 88, 0, 1e-40] * 2, np.float32)
    out = np.empty_like(x)
    _map_exp(address(x), address(out), 16)
    np.testing.assert_allclose(out[:8], [0, 0, 0, 0, np.exp(-88), np.exp(88), 1, 1], rtol=1e-6, atol=2e-38)
    gate, up = np.array([-1e4, -100, -88, 88, 100, 1e4, 0, -0.0] * 2, np.float32), np.full(16, 3, np.float32)
    _map_silu(address(gate), address(up), 16)
    np.testing.assert_allclose(gate[:8], [0, 0, 0, 264, 300, 3e4, 0, 0], rtol=1e-6, atol=1e-33)


def test_swiglu_equals_float64() -> None:
    rng = np.random.default_rng(3)
    gate, up = (4 * rng.standard_normal(1024).astype(np.float32) for _ in range(2))
    want = gate.astype(np.float64) / (1 + np.exp(-gate.astype(np.float64))) * up
    _map_silu(address(gate), address(up), 1024)
    np.testing.assert_allclose(gate, want, rtol=1e-6)


@pytest.mark.parametrize("cols", [16, 160])
def test_rms_norm_equals_float64(cols: int) -> None:
    rng = np.random.default_rng(2)
    x, weight = (rng.standard_normal(cols).astype(np.float32) for _ in range(2))
    out = np.empty_like(x)
    rms_norm_row(address(x), address(weight), cols, np.float32(1e-6), address(out))
    wide = x.astype(np.float64)
    np.testing.assert_allclose(out, wide / np.sqrt((wide**2).mean() + 1e-6) * weight, rtol=2e-6)
