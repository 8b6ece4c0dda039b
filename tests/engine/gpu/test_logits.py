"""The likeliest tokens of logits in VRAM, against NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from numoe.engine.gpu.logits import DeviceLogits
from numoe.engine.sampling import Shortlist

pytestmark = pytest.mark.gpu


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def prepared(logits: np.ndarray) -> DeviceLogits:
    import cupy

    found = DeviceLogits(*logits.shape)
    found.device[:] = cupy.asarray(logits)
    for _ in range(2):  # the second time finds what the first has left
        found.prepare(len(logits))
    cupy.cuda.Device().synchronize()
    return found.of_rows(np.arange(len(logits), dtype=np.int32))


@pytest.mark.parametrize("cols", [1, 31, 288, 50257, 151936])
def test_the_likeliest_is_the_first_of_the_largest(cols: int) -> None:
    for rows in (1, 16):
        logits = normal(cols, rows, cols)
        logits[0] = np.round(logits[0])  # many equals
        logits[-1, cols // 2] = np.inf
        found = [prepared(logits).likeliest(row) for row in range(rows)]
        assert found == list(zip(logits.argmax(axis=1), logits.max(axis=1), strict=True))


def test_the_likeliest_of_nothing_useful() -> None:
    logits = np.array([[np.nan, np.nan], [-np.inf, -np.inf], [np.nan, -3]], np.float32)
    ids, largest = zip(*(prepared(logits).likeliest(row) for row in range(3)), strict=True)
    assert ids == (0, 0, 1)
    assert np.array_equal(largest, [np.nan, -np.inf, np.nan], equal_nan=True)


@pytest.mark.parametrize("cols", [1, 31, 1500, 151936])
def test_a_shortlist_holds_all_that_are_as_likely(cols: int) -> None:
    rows = 16
    logits = normal(cols, rows, cols) * 4
    logits[1] = np.round(logits[1])
    logits[2] = 0
    logits[3, : cols // 2] = -np.inf
    found = prepared(logits)
    for row in range(rows):
        few, wide = found.shortlist(row), logits[row].astype(np.float64)
        if few is None:
            assert row in (1, 2, 3)  # where many are equal
            continue
        assert len(few.ids) >= min(cols, 256)
        np.testing.assert_allclose(few.total, np.exp(wide - wide.max()).sum(), rtol=Shortlist.TOLERANCE / 2)
        assert np.array_equal(few.ids, np.flatnonzero(logits[row] >= few.logits.min()))
        assert np.array_equal(few.logits, logits[row, few.ids])
