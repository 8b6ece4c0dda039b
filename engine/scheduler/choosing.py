"""Which rows run in the next step."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

from numoe.engine.scheduler.sequence import Sequence

Rows = list[tuple[Sequence, int]]
"""Sequences of a step, each with how many of its tokens are computed in it."""


class Chooser:
    """Chooses steps of at most `chunk_tokens` tokens of prompts, and of answers.

    few_rows: see `SchedulerConfig`. make_room: whether a sequence has pages for its first tokens, so many of them, or
    gets them now; others may lose theirs, and their slot, for that.
    """

    def __init__(self, chunk_tokens: int, few_rows: int, make_room: Callable[[Sequence, int], bool]) -> None:
        self._chunk_tokens, self._few_rows, self._make_room = chunk_tokens, few_rows, make_room
        self._short_steps, self._has_answered = count(1), False

    def choose(self, ready: list[Sequence]) -> Rows:
        """The next step's rows; some of the chosen may have lost their slot since, as others needed pages."""
        return self._choose_apart(ready) if self._few_rows else self._choose(ready)

    def _choose(self, ready: list[Sequence]) -> Rows:
        """All answers, and as much of prompts as a step may hold."""
        chosen = [(s, 1) for s in ready if s.is_decoding and self._make_room(s, len(s.tokens))]
        reading = [s for s in ready if not s.is_decoding]
        return chosen + self._fill(reading, self._chunk_tokens, lambda sequence: sequence.pending)

    def _choose_apart(self, ready: list[Sequence]) -> Rows:
        """Either answers or a prompt; they take turns, unless there is no room for one of them."""
        for choose in (self._read, self._answer) if self._has_answered else (self._answer, self._read):
            if chosen := choose(ready):
                self._has_answered = choose == self._answer
                return chosen
        return []

    def _answer(self, ready: list[Sequence]) -> Rows:
        """A short step of those whose turn was longest ago."""
        answering = sorted((s for s in ready if s.computed >= s.read), key=lambda s: s.stepped)
        chosen = self._fill(answering, self._few_rows, lambda sequence: sequence.pending)
        for sequence, _ in chosen:
            sequence.stepped = next(self._short_steps)
        return chosen

    def _read(self, ready: list[Sequence]) -> Rows:
        """A long step of the first prompt that there is room for."""
        reading = (s for s in ready if s.computed < s.read)
        turns = (self._fill([s], self._chunk_tokens, lambda s: s.read - s.computed) for s in reading)
        return next(filter(None, turns), [])

    def _fill(self, sequences: list[Sequence], budget: int, wanted: Callable[[Sequence], int]) -> Rows:
        """As many rows of sequences, one after the other, as there is room for in a step and in the cache."""
        chosen = []
        for sequence in sequences:
            rows = 0 if sequence.slot is None else min(budget, wanted(sequence))
            if rows and self._make_room(sequence, sequence.computed + rows):
                chosen.append((sequence, rows))
                budget -= rows
        return chosen
