"""From the largest logits of a row alone, the same token is chosen as from all of it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from numoe.engine.errors import UnavailableError
from numoe.engine.requests import SamplingParams
from numoe.engine.sampling import HostLogits, Sampler, Shortlist


class Listed(HostLogits):
    """Logits whose rows are elsewhere, with `count` of the largest at hand; counts how often a row is fetched."""

    def __init__(self, rows: np.ndarray, count: int) -> None:
        super().__init__(rows)
        self.count, self.fetched = count, 0

    def __getitem__(self, row: int) -> np.ndarray:
        self.fetched += 1
        return super().__getitem__(row)

    def shortlist(self, row: int) -> Shortlist:
        logits = self._rows[row]
        ids = np.flatnonzero(logits >= np.sort(logits)[-min(self.count, logits.size)])
        total = np.exp(logits.astype(np.float64) - logits.max()).sum()
        return Shortlist(ids, logits[ids], float(total), logits.size)


def row(seed: int, vocab: int, spread: float, *, rounded: bool = False) -> np.ndarray:
    logits = (spread * np.random.default_rng(seed).standard_normal((1, vocab))).astype(np.float32)
    return np.round(logits) if rounded else logits


PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.5, 1.0, 3.0]),
    top_k=st.sampled_from([0, 1, 7, 40, 300]),
    top_p=st.sampled_from([0.0, 0.3, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    seed=st.integers(0, 1 << 32),
)


@given(
    params=PARAMS, seed=st.integers(0, 50), vocab=st.sampled_from([5, 300, 2000]),
    spread=st.sampled_from([0.1, 2.0, 10.0]), rounded=st.booleans(), logprobs=st.sampled_from([None, 0, 3]),
    count=st.sampled_from([1, 32, 256]),
)  # fmt: skip
def test_the_choice_is_that_of_the_whole_row(params, seed, vocab, spread, rounded, logprobs, count):
    logits, sampler = row(seed, vocab, spread, rounded=rounded), Sampler(params, logprobs=logprobs)
    want, found = sampler.choose(logits[0], [1, 2, 3]), sampler.choose_row(Listed(logits, count), 0, [1, 2, 3])
    assert found.token_id == want.token_id
    assert [top.token_id for top in found.top_logprobs] == [top.token_id for top in want.top_logprobs]
    if logprobs is not None:
        assert found.logprob == pytest.approx(want.logprob, abs=1e-5)
        for got, top in zip(found.top_logprobs, want.top_logprobs, strict=True):
            assert got.logprob == pytest.approx(top.logprob, abs=1e-5)


@pytest.mark.parametrize(
    ("params", "fetches"),
    [
        ({"top_k": 40, "top_p": 0.95}, 0),
        ({"top_p": 0.9}, 0),
        ({"top_p": 0.9999}, 1),
        ({"min_p": 0.1}, 0),
        ({"temperature": 0.0}, 0),
        ({}, 1),  # every token may be drawn
        ({"top_k": 300}, 1),
        ({"top_k": 40, "presence_penalty": 1.0}, 1),
        ({"top_k": 40, "logit_bias": ((3, 1.0),)}, 1),
    ],
)
def test_a_row_is_fetched_only_if_it_has_to_be(params: dict, fetches: int) -> None:
    logits = Listed(row(0, 32000, 8.0), 256)
    Sampler(SamplingParams(**({"temperature": 1.0} | params)), logprobs=2).choose_row(logits, 0, [5])
    assert logits.fetched == fetches


def test_a_total_that_rounding_may_decide_by_is_not_trusted() -> None:
    logits = Listed(np.log(np.array([[4, 2, 1, 1]], np.float32)), 3)
    exact = dataclasses.replace(logits.shortlist(0), ids=np.array([0, 1]), logits=logits.shortlist(0).logits[:2])
    logits.shortlist = lambda _: exact  # type: ignore[method-assign]
    for top_p, fetches in ((0.5, 1), (0.6, 0), (0.75, 1), (0.8, 1)):
        logits.fetched = 0
        Sampler(SamplingParams(temperature=1.0, top_p=top_p)).choose_row(logits, 0, [])
        assert logits.fetched == fetches


def test_logits_that_are_no_numbers_are_refused() -> None:
    logits = row(0, 300, 1.0)
    logits[0, 7] = np.nan
    with pytest.raises(UnavailableError, match="not finite"):
        Sampler(SamplingParams(temperature=1.0, top_k=5)).choose_row(Listed(logits, 32), 0, [])
