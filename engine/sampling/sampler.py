"""Chooses a request's next token."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from numoe.engine.errors import InputError, UnavailableError
from numoe.engine.requests import SamplingParams, TokenLogprob
from numoe.engine.sampling import filters
from numoe.engine.sampling.filters import Indices, Logits
from numoe.engine.sampling.logits import Shortlist, StepLogits
from numoe.engine.sampling.params import check_sampling

_GREEDY_BELOW = 1e-6  # the limit of temperature → 0, before float32 runs out


class SampledToken(msgspec.Struct, frozen=True):
    """A chosen token; its log-probability and the likeliest alternatives, likeliest first, if asked for."""

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[TokenLogprob, ...] = ()


class Sampler:
    """Chooses tokens as `params` say; `logprobs` is None, or how many alternatives to report.

    The order is llama.cpp's default: logit bias, penalties, top_k, top_p, min_p, temperature, draw.
    Temperature comes last, so top_p and min_p see the distribution at temperature 1. Greedy
    (temperature 0) takes the largest logit after bias and penalties, the lowest id of equals.

    The random number of a choice is a pure function of the seed and of the position of the token
    in its sequence (Philox, Salmon et al. 2011, keyed by the seed, counting positions). So there is
    no state to advance, lose or save: a step run again, a preempted sequence, and a sequence
    continued by another process from the same tokens all draw the same numbers.
    """

    def __init__(self, params: SamplingParams, *, logprobs: int | None = None) -> None:
        check_sampling(params)
        if logprobs is not None and logprobs < 0:
            raise InputError(f"logprobs is {logprobs}; it must be at least 0, or absent")
        self.params = params
        self.logprobs = logprobs
        self._bias_ids = np.array([token_id for token_id, _ in params.logit_bias], dtype=np.int64)
        self._bias = np.array([value for _, value in params.logit_bias], dtype=np.float32)
        penalised = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) != (1, 0, 0)
        self._penalised = penalised and params.penalty_window != 0

    @property
    def takes_likeliest(self) -> bool:
        """Whether the token is always the one with the largest logit, and nothing else is asked for."""
        return self._is_greedy and self.logprobs is None and not self._adjusts

    @property
    def _adjusts(self) -> bool:
        return bool(self._bias_ids.size) or self._penalised

    @property
    def _is_greedy(self) -> bool:
        return self.params.temperature < _GREEDY_BELOW

    def choose_row(self, logits: StepLogits, row: int, history: Sequence[int] | NDArray[np.int32]) -> SampledToken:
        """`choose` with row `row` of a step's logits, which is not fetched if its likeliest tokens are all that counts.

        Log-probabilities then differ by rounding.
        """
        if self.takes_likeliest:
            token_id, logit = logits.likeliest(row)
            _check_finite(logit, len(history))
            return SampledToken(token_id)
        few = None if self._adjusts else logits.shortlist(row)
        if few is not None:
            _check_finite(logits.likeliest(row)[1], len(history))
            chosen = self._pick_of(few, position=len(history))
            if chosen is not None and (self.logprobs or 0) <= len(few.ids):
                return self._report_of(few, chosen)
        return self.choose(logits[row], history)

    def choose(self, logits: Logits, history: Sequence[int] | NDArray[np.int32]) -> SampledToken:
        """The token that follows `history` (prompt and generated ids), given `logits` float32 [vocab].

        Raises UnavailableError when the logits are not numbers, and InputError when the bias names
        a token outside the vocabulary or leaves no token to choose. `logits` is not changed.
        """
        _check_finite(float(logits[logits.argmax()]), len(history))  # NumPy's argmax stops at a NaN
        token_id = self._pick(self._adjusted(logits, history), position=len(history))
        if self.logprobs is None:
            return SampledToken(token_id)
        return _with_logprobs(logits, token_id, self.logprobs)

    def _adjusted(self, logits: Logits, history: Sequence[int] | NDArray[np.int32]) -> Logits:
        """Logits after bias and penalties; the same array if neither is asked for."""
        if not self._adjusts:
            return logits
        adjusted = logits.copy()
        if self._bias_ids.size:
            if self._bias_ids.max() >= logits.size:
                check_sampling(self.params, logits.size)
            np.add.at(adjusted, self._bias_ids, self._bias)
            if adjusted.max() == -np.inf:
                raise InputError("logit_bias bans every token of the vocabulary; leave one to choose")
        if self._penalised:
            filters.apply_penalties(adjusted, np.asarray(history, dtype=np.int32), self.params)
        return adjusted

    def _pick(self, logits: Logits, position: int) -> int:
        params = self.params
        if self._is_greedy:
            return int(logits.argmax())
        token_ids: Indices | None = None  # None stands for the whole vocabulary
        if 0 < params.top_k < logits.size:
            token_ids, logits = _narrow(token_ids, logits, filters.largest(logits, params.top_k))
        if params.top_p < 1.0:
            size = filters.nucleus_size(logits, params.top_p)
            token_ids, logits = _narrow(token_ids, logits, filters.largest(logits, size))
        if params.min_p > 0.0:
            token_ids, logits = _narrow(token_ids, logits, filters.above_min_p(logits, params.min_p))
        index = filters.draw(logits, params.temperature, uniform(params.seed, position))
        return index if token_ids is None else int(token_ids[index])


    def _pick_of(self, few: Shortlist, position: int) -> int | None:
        """What `_pick` gives of the whole row; None if more of it may have to be known."""
        params, ids, logits = self.params, few.ids, few.logits
        if self._is_greedy:
            return int(ids[logits.argmax()])
        is_whole = len(ids) == few.vocab  # nothing but what is left here can be chosen
        if 0 < params.top_k < few.vocab:
            if params.top_k > len(ids):
                return None
            keep, is_whole = filters.largest(logits, params.top_k), True
            ids, logits = ids[keep], logits[keep]
        if params.top_p < 1.0:
            size = filters.nucleus_size(logits, params.top_p) if is_whole else _nucleus_size(few, params.top_p)
            if size is None:
                return None
            keep, is_whole = filters.largest(logits, size), True
            ids, logits = ids[keep], logits[keep]
        if params.min_p > 0.0:
            if not is_whole and logits.max() + np.log(params.min_p) < logits.min():
                return None
            keep, is_whole = filters.above_min_p(logits, params.min_p), True
            ids, logits = ids[keep], logits[keep]
        return int(ids[filters.draw(logits, params.temperature, uniform(params.seed, position))]) if is_whole else None

    def _report_of(self, few: Shortlist, token_id: int) -> SampledToken:
        if self.logprobs is None:
            return SampledToken(token_id)
        normalizer = float(few.logits.max()) + math.log(few.total)
        top = filters.largest(few.logits, self.logprobs) if self.logprobs else np.empty(0, np.int64)
        top = top[np.argsort(-few.logits[top], kind="stable")]
        chosen = float(few.logits[np.searchsorted(few.ids, token_id)])
        return SampledToken(
            token_id,
            chosen - normalizer,
            tuple(TokenLogprob(int(few.ids[i]), float(few.logits[i]) - normalizer) for i in top),
        )


def _nucleus_size(few: Shortlist, top_p: float) -> int | None:
    """`filters.nucleus_size` of the whole row; None if the list is too short, or rounding of its total may decide."""
    mass = np.cumsum(np.exp(np.sort(few.logits)[::-1] - few.logits.max()), dtype=np.float64)
    needed = top_p * few.total
    if mass[-1] < needed or np.abs(mass - needed).min() <= few.TOLERANCE * needed:
        return None
    return int(np.searchsorted(mass, needed)) + 1


def _check_finite(likeliest: float, position: int) -> None:
    if not math.isfinite(likeliest):
        raise UnavailableError(
            f"the model's logits are not finite ({likeliest} at position {position}): a kernel, "
            "a weight file or the memory is damaged"
        )


def uniform(seed: int, position: int) -> float:
    """The random number in [0, 1) for the token at `position` of a sequence with `seed`."""
    word = np.random.Philox(key=seed % 2**64, counter=position).random_raw()
    return (int(word) >> 11) * 2.0**-53


def _narrow(token_ids: Indices | None, logits: Logits, keep: Indices) -> tuple[Indices, Logits]:
    return keep if token_ids is None else token_ids[keep], logits[keep]


def _with_logprobs(logits: Logits, token_id: int, n_top: int) -> SampledToken:
    normalizer = filters.log_normalizer(logits)
    top = filters.largest(logits, n_top) if n_top else np.empty(0, dtype=np.int64)
    top = top[np.argsort(-logits[top], kind="stable")]
    return SampledToken(
        token_id,
        float(logits[token_id]) - normalizer,
        tuple(TokenLogprob(int(i), float(logits[i]) - normalizer) for i in top),
    )
