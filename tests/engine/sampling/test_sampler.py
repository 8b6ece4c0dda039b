"""The sampler chooses as often what the definitions say, reproducibly, and reports the truth about it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from numoe.engine.errors import InputError, NumoeError, UnavailableError
from numoe.engine.requests import SamplingParams
from numoe.engine.sampling import Sampler, check_sampling
from numoe.engine.sampling.sampler import uniform
from tests.engine.sampling.support import LOGITS, VOCAB, choose, distribution, normal_logits, softmax

# --- greedy ---------------------------------------------------------------------------------------


@given(logits=LOGITS)
def test_greedy_is_the_largest_logit_and_the_lowest_id_of_equals(logits):
    assert choose(logits) == min(range(logits.size), key=lambda i: (-logits[i], i))


@given(logits=LOGITS, history=st.lists(st.integers(0, 0), max_size=3), seed=st.integers(0, 2**64 - 1))
def test_greedy_ignores_filters_and_seed(logits, history, seed):
    assert choose(logits, history, top_k=3, top_p=0.1, min_p=0.9, seed=seed) == choose(logits, history)


@pytest.mark.parametrize("only", [{"top_k": 1}, {"top_p": 0.0}, {"min_p": 1.0}, {"temperature": 1e-9}])
def test_settings_that_leave_one_token_are_greedy(only):
    for seed in range(20):
        logits = normal_logits(seed)
        assert choose(logits, **({"temperature": 1.5, "seed": seed} | only)) == logits.argmax()


# --- frequencies ----------------------------------------------------------------------------------


def assert_frequencies_fit(counts, probability):
    """Pearson's chi-square test at about 1e-6 (Wilson and Hilferty's approximation of its quantile)."""
    assert counts[probability == 0].sum() == 0, "a token of probability 0 was chosen"
    expected = probability * counts.sum()
    likely = expected >= 5
    observed = np.append(counts[likely], counts[~likely].sum())
    expected = np.append(expected[likely], expected[~likely].sum())
    observed, expected = observed[expected > 0], expected[expected > 0]
    freedom = max(observed.size - 1, 1)
    bound = freedom * (1 - 2 / (9 * freedom) + 4.75 * math.sqrt(2 / (9 * freedom))) ** 3
    assert ((observed - expected) ** 2 / expected).sum() < bound


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 3.0},
        {"top_k": 5},
        {"top_p": 0.7},
        {"min_p": 0.1},
        {"temperature": 2.0, "top_k": 12, "top_p": 0.9, "min_p": 0.02},
        {"repetition_penalty": 1.7, "presence_penalty": 0.5, "frequency_penalty": 0.3},
        {"repetition_penalty": 0.6, "penalty_window": 2},
        {"logit_bias": ((3, 4.0), (7, -math.inf), (8, 1.0))},
        {"temperature": 0.8, "logit_bias": ((2, 5.0),), "presence_penalty": 1.0, "top_k": 9, "top_p": 0.95},
    ],
    ids=str,
)
def test_choices_are_as_frequent_as_the_definitions_say(params):
    params = SamplingParams(**({"temperature": 1.0} | params))
    logits, history, draws = normal_logits(1, spread=2.0), [2, 5, 2, 9, 11, 2], 4000
    counts = np.zeros(VOCAB)
    for seed in range(draws):
        counts[Sampler(structs.replace(params, seed=seed)).choose(logits, history).token_id] += 1
    assert_frequencies_fit(counts, distribution(logits, history, params))


def test_successive_tokens_of_one_sequence_are_independent_draws():
    logits, draws = normal_logits(2, size=6, spread=1.0), 6000
    sampler = Sampler(SamplingParams(temperature=1.0, seed=5))
    ids = [sampler.choose(logits, range(length)).token_id for length in range(draws + 1)]
    probability = distribution(logits, [], sampler.params)
    assert_frequencies_fit(np.bincount(ids, minlength=6), probability)
    pairs = np.zeros((6, 6))
    np.add.at(pairs, (ids[:-1], ids[1:]), 1)
    assert_frequencies_fit(pairs.ravel(), np.outer(probability, probability).ravel())


def test_the_random_numbers_are_uniform():
    for numbers in ([uniform(7, n) for n in range(5000)], [uniform(n, 7) for n in range(5000)]):
        assert min(numbers) >= 0
        assert max(numbers) < 1
        assert_frequencies_fit(np.histogram(numbers, bins=50, range=(0, 1))[0], np.full(50, 1 / 50))


# --- reproducible ---------------------------------------------------------------------------------


@given(seed=st.integers(0, 2**64 - 1), length=st.integers(1, 1000))
def test_equal_seeds_give_equal_choices_whatever_else_was_drawn(seed, length):
    logits, params = normal_logits(3), SamplingParams(temperature=1.0, top_p=0.9, seed=seed)
    history = list(range(length))
    busy, fresh, neighbour = Sampler(params), Sampler(params), Sampler(SamplingParams(temperature=2.0, seed=seed + 1))
    for other in range(3):  # what a batch with neighbours, a failed step and a preemption do
        neighbour.choose(logits, history)
        busy.choose(normal_logits(other), history)
    np.random.default_rng(0).random()
    assert busy.choose(logits, history) == fresh.choose(logits, history)


def test_seeds_differ_and_so_do_positions():
    flat = np.zeros(10_000, np.float32)
    assert len({choose(flat, temperature=1.0, seed=seed) for seed in range(50)}) > 45
    assert len({choose(flat, range(length), temperature=1.0, seed=0) for length in range(50)}) > 45


@given(seed=st.integers(0, 100))
def test_the_logits_are_not_changed(seed):
    logits = normal_logits(seed)
    before = logits.copy()
    Sampler(
        SamplingParams(temperature=1.0, top_k=5, repetition_penalty=2.0, logit_bias=((1, 3.0),), seed=seed), logprobs=2
    ).choose(logits, [1, 2])
    assert np.array_equal(logits, before)


# --- logprobs -------------------------------------------------------------------------------------


@given(logits=LOGITS, top=st.integers(0, 10), seed=st.integers(0, 100))
def test_logprobs_are_the_log_softmax_of_the_raw_logits(logits, top, seed):
    expected = np.log(softmax(logits.astype(np.float64)))
    # None of these may show in what is reported.
    params = SamplingParams(
        temperature=3.0, top_k=4, top_p=0.9, logit_bias=((0, 2.0),), repetition_penalty=1.5, seed=seed
    )
    token = Sampler(params, logprobs=top).choose(logits, [0])
    assert token.logprob == pytest.approx(expected[token.token_id], abs=1e-5)
    order = np.argsort(-logits, kind="stable")[:top]
    assert [entry.token_id for entry in token.top_logprobs] == order.tolist()
    assert [entry.logprob for entry in token.top_logprobs] == pytest.approx(expected[order].tolist(), abs=1e-5)


def test_logprobs_only_if_asked_for():
    token = Sampler(SamplingParams()).choose(np.zeros(3, np.float32), [0])
    assert (token.logprob, token.top_logprobs) == (None, ())
    token = Sampler(SamplingParams(), logprobs=0).choose(np.zeros(3, np.float32), [0])
    assert token.logprob == pytest.approx(-math.log(3))
    assert token.top_logprobs == ()
    with pytest.raises(InputError, match="logprobs is -1"):
        Sampler(SamplingParams(), logprobs=-1)


# --- what is not a number, and what is out of range -----------------------------------------------


@pytest.mark.parametrize("bad", [[math.nan, 1.0], [1.0, math.nan], [1.0, math.inf], [-math.inf, -math.inf]])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_reported(bad, temperature):
    with pytest.raises(UnavailableError, match=r"not finite .* at position 3"):
        choose(np.array(bad, np.float32), [0, 0, 0], temperature=temperature)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1), ("temperature", math.nan), ("temperature", math.inf), ("temperature", 1e38),
        ("top_k", -1), ("top_p", -0.1), ("top_p", 1.1), ("top_p", math.nan), ("min_p", -0.1), ("min_p", 1.1),
        ("repetition_penalty", 0.0), ("repetition_penalty", -1.0), ("repetition_penalty", math.inf),
        ("repetition_penalty", 1e-40), ("presence_penalty", math.nan), ("presence_penalty", 1e38),
        ("frequency_penalty", math.inf), ("frequency_penalty", -1e38), ("penalty_window", -2),
    ],
)  # fmt: skip
def test_a_parameter_out_of_range_is_named(name, value):
    with pytest.raises(InputError, match=f"^{name} is "):
        check_sampling(SamplingParams(**{name: value}))


@pytest.mark.parametrize("bias", [(-1, 0.0), (5, 0.0), (0, math.nan), (0, math.inf), (0, 1e38), (0, -1e38)])
def test_a_bias_out_of_range_is_named(bias):
    with pytest.raises(InputError, match=r"^logit_bias"):
        check_sampling(SamplingParams(logit_bias=(bias,)), vocab_size=5)


EXTREME = st.sampled_from([-1e9, -1.0, 0.0, 1.0, 1e9])


@settings(max_examples=200)
@given(
    params=st.builds(
        SamplingParams,
        temperature=st.sampled_from([0.0, 1e-9, 1e-6, 1.0, 1e9]),
        top_k=st.sampled_from([0, 1, 3, 10**9]),
        top_p=st.sampled_from([0.0, 1e-300, 0.5, 1.0]),
        min_p=st.sampled_from([0.0, 1e-300, 0.5, 1.0]),
        repetition_penalty=st.sampled_from([1e-9, 0.5, 1.0, 1e9]),
        presence_penalty=EXTREME,
        frequency_penalty=EXTREME,
        penalty_window=st.sampled_from([-1, 0, 2, 64]),
        logit_bias=st.lists(st.tuples(st.integers(0, 4), EXTREME | st.just(-math.inf)), max_size=5).map(tuple),
        seed=st.integers(-5, 2**64),
    ),
    logits=st.lists(st.sampled_from([-math.inf, -1e4, -1.0, 0.0, 1.0, 1e4]), min_size=5, max_size=5),
    history=st.lists(st.integers(0, 4), max_size=8),
)
def test_any_sound_parameters_give_a_token_that_is_not_banned_or_an_error(params, logits, history):
    # Warnings are errors here, so this also holds that nothing overflows on the way.
    try:
        token_id = Sampler(params, logprobs=2).choose(np.array(logits, np.float32), history).token_id
    except NumoeError:
        return
    assert logits[token_id] > -math.inf
    assert (token_id, -math.inf) not in params.logit_bias
