"""The limits of sampling parameters, checked before a request gets anywhere."""

from __future__ import annotations

import math

from numoe.engine.errors import InputError
from numoe.engine.requests import SamplingParams

LARGEST = 1e9
"""Bound of what logits are changed by: with it, no combination overflows float32 into inf or NaN."""


def check_sampling(params: SamplingParams, vocab_size: int | None = None) -> None:
    """Raise InputError naming the first parameter that is out of its range.

    With `vocab_size`, the ids of `logit_bias` are checked against it too.
    """
    rules = (
        ("temperature", params.temperature, 0.0 <= params.temperature <= LARGEST, "from 0 to 1e9"),
        ("top_k", params.top_k, params.top_k >= 0, "at least 0 (0 keeps all)"),
        ("top_p", params.top_p, 0.0 <= params.top_p <= 1.0, "from 0 to 1"),
        ("min_p", params.min_p, 0.0 <= params.min_p <= 1.0, "from 0 to 1"),
        (
            "repetition_penalty",
            params.repetition_penalty,
            1 / LARGEST <= params.repetition_penalty <= LARGEST,
            "from 1e-9 to 1e9 (1 is off)",
        ),
        ("presence_penalty", params.presence_penalty, abs(params.presence_penalty) <= LARGEST, "from -1e9 to 1e9"),
        ("frequency_penalty", params.frequency_penalty, abs(params.frequency_penalty) <= LARGEST, "from -1e9 to 1e9"),
        ("penalty_window", params.penalty_window, params.penalty_window >= -1, "at least -1 (-1 is all)"),
    )
    for name, value, good, range_ in rules:
        if not good:
            raise InputError(f"{name} is {value}; it must be {range_}")
    _check_bias(params.logit_bias, vocab_size)


def _check_bias(bias: tuple[tuple[int, float], ...], vocab_size: int | None) -> None:
    for token_id, value in bias:
        if token_id < 0 or (vocab_size is not None and token_id >= vocab_size):
            limit = "0 or more" if vocab_size is None else f"from 0 to {vocab_size - 1}"
            raise InputError(f"logit_bias names token {token_id}; ids are {limit}")
        if not (abs(value) <= LARGEST or value == -math.inf):
            raise InputError(f"logit_bias of token {token_id} is {value}; it must be from -1e9 to 1e9, or -inf to ban")
