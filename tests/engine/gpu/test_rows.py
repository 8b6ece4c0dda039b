"""Operations on rows of activations, against NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from numoe.engine.gpu import rows as ops

pytestmark = pytest.mark.gpu
ROWS = (1, 2, 16, 17, 33)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("cols", [32, 96, 576, 2048, 7168])
def test_rms_norm(cols: int) -> None:
    import cupy

    weight = normal(0, cols)
    for rows in ROWS:
        x = normal(rows, rows + 1, cols) * 100
        wide = x.astype(np.float64)
        want = wide / np.sqrt((wide**2).mean(axis=1, keepdims=True) + 1e-5) * weight
        for in_place in (False, True):
            source = cupy.asarray(x)
            out = source if in_place else cupy.zeros_like(source)
            ops.rms_norm(source, cupy.asarray(weight), 1e-5, out, rows)
            np.testing.assert_allclose(out[:rows].get(), want[:rows], rtol=3e-6, atol=1e-6)
            np.testing.assert_array_equal(out[rows].get(), x[rows] if in_place else 0)


def test_a_normalised_row_does_not_depend_on_the_others() -> None:
    import cupy

    x, weight = cupy.asarray(normal(1, 16, 4096)), cupy.asarray(normal(2, 4096))
    together, alone = cupy.empty_like(x), cupy.empty_like(x)
    ops.rms_norm(x, weight, 1e-6, together, 16)
    for row in range(16):
        ops.rms_norm(x[row : row + 1], weight, 1e-6, alone[row : row + 1], 1)
    assert np.array_equal(together.get(), alone.get())


@pytest.mark.parametrize("cols", [32, 576, 6144])
def test_swiglu(cols: int) -> None:
    import cupy

    for rows in ROWS:
        gate, up = normal(rows, rows, cols) * 20, normal(rows + 1, rows, cols)
        wide = gate.astype(np.float64)
        out = cupy.asarray(gate)
        ops.swiglu(out, cupy.asarray(up), out, rows)
        np.testing.assert_allclose(out.get(), wide / (1 + np.exp(-wide)) * up, rtol=1e-6, atol=1e-30)


def test_swiglu_of_extremes() -> None:
    import cupy

    gate = np.array([[-1e30, -200, -88, 0, 88, 200, 1e30, -0.0]], np.float32)
    out = cupy.empty_like(cupy.asarray(gate))
    ops.swiglu(cupy.asarray(gate), cupy.ones_like(out), out, 1)
    np.testing.assert_allclose(out.get(), np.maximum(gate, 0), atol=1e-30)


def test_gather() -> None:
    import cupy

    x, indices = normal(3, 40, 96), np.array([3, 39, 0, 3], np.int32)
    out = cupy.zeros((5, 96), np.float32)
    ops.gather(cupy.asarray(x), cupy.asarray(indices), out, 4)
    assert np.array_equal(out.get(), np.concatenate([x[indices], np.zeros((1, 96), np.float32)]))
    ops.gather(cupy.asarray(x), cupy.asarray(indices), out, 0)
