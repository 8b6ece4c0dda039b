"""What the sampler should do, in float64 over the whole vocabulary, as the papers and API documents have it."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from numoe.engine.requests import SamplingParams
from numoe.engine.sampling import Sampler

VOCAB = 40
# Multiples of 1/8: exact in float32, and often equal to one another.
LOGITS = st.lists(st.integers(-80, 80).map(lambda n: n / 8), min_size=1, max_size=VOCAB).map(
    lambda values: np.array(values, np.float32)
)


def normal_logits(seed: int, size: int = VOCAB, spread: float = 3.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(size) * spread).astype(np.float32)


def choose(logits, history=(0,), **params) -> int:
    return Sampler(SamplingParams(**params)).choose(logits, list(history)).token_id


def softmax(logits):
    weights = np.exp(logits - np.max(logits))
    return weights / weights.sum()


def adjusted(logits, history, params):
    """Logits after bias and penalties, token by token."""
    logits = logits.astype(np.float64)
    for token_id, value in params.logit_bias:
        logits[token_id] += value
    window = list(history)[-params.penalty_window :] if params.penalty_window > 0 else list(history)
    for token_id in set(window) if params.penalty_window != 0 else ():
        if logits[token_id] > 0:
            logits[token_id] /= params.repetition_penalty
        else:
            logits[token_id] *= params.repetition_penalty
        logits[token_id] -= params.presence_penalty + params.frequency_penalty * window.count(token_id)
    return logits


def distribution(logits, history, params):
    """The probability of each token: bias, penalties, top_k, top_p, min_p, temperature."""
    logits = adjusted(logits, history, params)
    order = np.argsort(-logits, kind="stable")  # likeliest first, the lowest id of equals
    if params.top_k:
        order = order[: params.top_k]
    reached = np.cumsum(softmax(logits[order]))
    order = order[: int(np.searchsorted(reached, params.top_p)) + 1] if params.top_p < 1 else order
    if params.min_p:
        probability = softmax(logits[order])
        order = order[probability >= params.min_p * probability[0]]
    result = np.zeros(logits.size)
    result[order] = softmax(logits[order] / params.temperature)
    return result
