"""Routing picks the experts that the reference picks, with its weights."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from numoe.engine.cpu.memory import address
from numoe.engine.cpu.program import N_ROWS, STEP_FIELDS
from numoe.engine.experts.exchange import add_partials, route_softmax
from numoe.engine.models.config import MoeConfig
from numoe.engine.models.reference import route
from tests.engine.cpu.paged import padded, run


def routed(logits: np.ndarray, top_k: int, *, normalise: bool, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Expert ids and weights [rows, top_k] by the kernel, on two threads."""
    logits, step = padded(logits), np.zeros(STEP_FIELDS, np.int64)
    step[N_ROWS] = len(logits)
    ids, weights = np.full((len(logits), top_k), -1, np.int32), np.zeros((len(logits), top_k), np.float32)
    record = (
        address(logits), logits.strides[0], logits.shape[1], top_k, int(normalise), scale,
        address(ids), address(weights),
    )  # fmt: skip
    run([(route_softmax, record)], step, threads=2)
    return ids, weights


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 9), experts=st.sampled_from([1, 2, 8, 60, 128]), top_k=st.integers(1, 8),
    normalise=st.booleans(), scale=st.sampled_from([1.0, 2.5]), levels=st.sampled_from([2, 7, 1 << 20]),
)  # fmt: skip
def test_the_likeliest_experts_are_taken_the_lower_id_of_equals(
    rows: int, experts: int, top_k: int, normalise: bool, scale: float, levels: int
) -> None:
    top_k = min(top_k, experts)
    rng = np.random.default_rng(rows * experts)
    logits = (rng.integers(0, levels, (rows, experts)) / levels * 20 - 10).astype(np.float32)
    ids, weights = routed(logits, top_k, normalise=normalise, scale=scale)
    moe = MoeConfig(
        n_experts=experts, n_used=top_k, ffn=32, normalize_weights=normalise, gating="softmax", weights_scale=scale
    )
    want_ids, want_weights = route(logits.astype(np.float64), moe)
    assert np.array_equal(ids, want_ids)
    np.testing.assert_allclose(weights, want_weights, rtol=1e-6)


def test_a_step_that_diverged_still_asks_for_experts_that_exist() -> None:
    """Ids address memory in the shards: rows of NaN and infinities must not lead out of it."""
    logits = np.array([[np.nan] * 4, [np.inf, np.nan, -np.inf, 0], [-np.inf] * 4, [0, np.nan, 1, 2]], np.float32)
    ids, _ = routed(logits, 3, normalise=True, scale=1.0)
    assert ((ids >= 0) & (ids < 4)).all()
    assert all(len(set(row)) == 3 for row in ids.tolist())


@pytest.mark.parametrize("shards", [1, 3])
def test_partial_sums_are_added_in_the_order_of_the_shards(shards: int) -> None:
    rng, step = np.random.default_rng(0), np.zeros(STEP_FIELDS, np.int64)
    step[N_ROWS] = 5
    x, partials = padded(rng.standard_normal((5, 48)).astype(np.float32)), rng.standard_normal((shards, 7, 48))
    partials = partials.astype(np.float32)
    want = x.copy()
    for partial in partials:
        want += partial[:5]
    record = (address(x), x.strides[0], 48, address(partials), partials[0].nbytes, shards)
    run([(add_partials, record)], step, threads=3)
    assert np.array_equal(x, want)
