"""Bias, penalties, top_k, top_p and min_p are as defined, at any size and with ties."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from numoe.engine.errors import InputError
from numoe.engine.requests import SamplingParams
from numoe.engine.sampling.filters import above_min_p, apply_penalties, largest, nucleus_size
from tests.engine.sampling.support import LOGITS, VOCAB, adjusted, choose, normal_logits, softmax

# --- bias and penalties ---------------------------------------------------------------------------


@given(
    logits=st.lists(st.floats(-20, 20, width=32), min_size=8, max_size=8).map(lambda v: np.array(v, np.float32)),
    history=st.lists(st.integers(0, 7), max_size=30),
    window=st.integers(-1, 40),
    repetition=st.floats(0.25, 4),
    presence=st.floats(-2, 2),
    frequency=st.floats(-2, 2),
)
def test_penalties_are_as_defined(logits, history, window, repetition, presence, frequency):
    params = SamplingParams(
        repetition_penalty=repetition, presence_penalty=presence, frequency_penalty=frequency, penalty_window=window
    )
    expected, result = adjusted(logits, history, params), logits.copy()
    apply_penalties(result, np.array(history, np.int32), params)
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)


def test_penalties_of_a_long_history_are_the_same():
    history = np.random.default_rng(0).integers(0, VOCAB // 2, 10_000).astype(np.int32)
    params = SamplingParams(frequency_penalty=0.01, presence_penalty=0.5, repetition_penalty=1.2, penalty_window=-1)
    logits = normal_logits(4)
    expected = adjusted(logits, history.tolist(), params)
    apply_penalties(logits, history, params)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)


def test_a_repetition_penalty_weakens_logits_of_either_sign():
    logits = np.array([2.0, -2.0, 1.0], np.float32)
    apply_penalties(logits, np.array([0, 1], np.int32), SamplingParams(repetition_penalty=2.0))
    assert logits.tolist() == [1.0, -4.0, 1.0]


def test_penalties_look_back_no_further_than_their_window():
    logits = np.array([1.0, 0.9, 0.8], np.float32)
    assert choose(logits, [0, 1, 2, 2], presence_penalty=1.0, penalty_window=3) == 0
    assert choose(logits, [0, 1, 2, 2], presence_penalty=1.0, penalty_window=2) == 0
    assert choose(logits, [1, 0, 2, 2], presence_penalty=1.0, penalty_window=3) == 1
    assert choose(logits, [0, 1, 2, 2], frequency_penalty=0.15, penalty_window=-1) == 0
    assert choose(logits, [0], presence_penalty=1.0, penalty_window=0) == 0


@given(logits=LOGITS, seed=st.integers(0, 1000), data=st.data())
def test_a_banned_token_is_never_chosen(logits, seed, data):
    banned = data.draw(st.sets(st.integers(0, logits.size - 1), max_size=logits.size - 1))
    bias = tuple((token_id, -math.inf) for token_id in banned)
    assert choose(logits, [0], temperature=50.0, logit_bias=bias, seed=seed) not in banned
    assert choose(logits, [0], logit_bias=bias) not in banned


def test_biases_of_one_token_add_up():
    logits = np.array([1.0, 0.0], np.float32)
    assert choose(logits, logit_bias=((1, 0.6),)) == 0
    assert choose(logits, logit_bias=((1, 0.6), (1, 0.6))) == 1


def test_a_bias_that_bans_everything_is_an_error():
    with pytest.raises(InputError, match="bans every token"):
        choose(np.zeros(2, np.float32), logit_bias=((0, -math.inf), (1, -math.inf)))


def test_a_bias_outside_the_vocabulary_is_an_error():
    with pytest.raises(InputError, match="logit_bias names token 2; ids are from 0 to 1"):
        choose(np.zeros(2, np.float32), logit_bias=((2, 1.0),))


# --- filters --------------------------------------------------------------------------------------


@given(logits=LOGITS, count=st.integers(1, VOCAB + 5))
def test_top_k_keeps_the_k_largest_and_the_lowest_ids_of_equals(logits, count):
    assert largest(logits, count).tolist() == sorted(np.argsort(-logits, kind="stable")[:count].tolist())


@pytest.mark.parametrize("size", [63, 64, 65, 1000, 5000, 152_064])
@pytest.mark.parametrize("count", [1, 2, 40, 1024, 4999])
@pytest.mark.parametrize("levels", [3, 1000])
def test_top_k_of_large_vocabularies(size, count, levels):
    logits = np.random.default_rng(size + count).integers(0, levels, size).astype(np.float32)
    assert np.array_equal(largest(logits, count), np.sort(np.argsort(-logits, kind="stable")[:count]))


@given(logits=LOGITS, top_p=st.floats(0, 0.999))
def test_a_nucleus_is_the_fewest_tokens_that_reach_top_p(logits, top_p):
    probability = np.sort(softmax(logits.astype(np.float64)))[::-1]
    size = nucleus_size(logits, top_p)
    assert probability[:size].sum() >= top_p - 1e-6
    assert size == 1 or probability[: size - 1].sum() < top_p + 1e-6


@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.99, 0.999999])
@pytest.mark.parametrize("spread", [0.1, 3.0])
def test_a_nucleus_of_a_large_vocabulary(top_p, spread):
    logits = normal_logits(5, size=20_000, spread=spread)
    probability = np.sort(softmax(logits.astype(np.float64)))[::-1]
    size = nucleus_size(logits, top_p)
    assert probability[:size].sum() >= top_p - 1e-6
    assert probability[: size - 1].sum() < top_p + 1e-6


@given(logits=LOGITS, min_p=st.floats(0.001, 1))
def test_min_p_is_relative_to_the_likeliest(logits, min_p):
    ratio = softmax(logits.astype(np.float64)) / softmax(logits.astype(np.float64)).max()
    kept = np.zeros(logits.size, bool)
    kept[above_min_p(logits, min_p)] = True
    assert kept[ratio >= min_p * (1 + 1e-6)].all()
    assert not kept[ratio < min_p * (1 - 1e-6)].any()
    assert kept[logits.argmax()]
