"""A stream of `numoe bench chaos`: the same request again and again, each answer compared with the undisturbed one."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from numoe.deploy.answers import Answer
from numoe.deploy.client import Client
from numoe.deploy.commands.bench.strikes import Strike
from numoe.engine.errors import NumoeError, UnavailableError
from numoe.v1 import generation_pb2 as pb

CALM_DEADLINE_S = 3600.0
"""Of the undisturbed answers; it says how long others may take."""
_DEADLINE_S, _DEADLINE_FACTOR = 60.0, 5.0  # an answer may take this, and so many times what it took undisturbed
_RETRY_S = 0.1
_LEAST_PAUSE_S = 0.3  # what counts as one
_GATEWAY_S = 20.0
_INSTANT_S = 0.25


@dataclass(frozen=True)
class Pause:
    """Seconds without a token in a stream; `ended` is `time.monotonic`."""

    ended: float
    seconds: float

    def cause(self, strikes: Sequence[Strike]) -> Strike | None:
        """The first strike that came in it, or just before it began; None if there was none."""
        began = self.ended - self.seconds - _INSTANT_S
        return next((strike for strike in strikes if began <= strike.at <= self.ended), None)


class Absences:
    """When a caller may have been told UNAVAILABLE: while the gateway was away because it was struck.

    It is away from the strike until a call that began later is answered, whoever's it is, but for no more than
    20 s. Beside that only calls that were under way at the strike may end so.
    """

    def __init__(self, strikes: Sequence[Strike]) -> None:
        self._strikes, self._answered = strikes, 0.0

    def answered(self, start: float) -> None:
        """Note that a call was answered that began then."""
        self._answered = max(self._answered, start)

    def excuse(self, start: float) -> bool:
        """Whether a call that began then may have failed now."""
        last = max((strike.at for strike in list(self._strikes) if strike.role == "gateway"), default=None)
        if last is None:
            return False
        if last >= start - _INSTANT_S:
            return True
        return self._answered <= last + _INSTANT_S and start <= last + _GATEWAY_S


def ask(
    address: str, request: pb.GenerateRequest, deadline_s: float, lost: float | None = None,
    absences: Absences | None = None,
) -> tuple[Answer, list[Pause]]:  # fmt: skip
    """An answer, and its pauses. lost: when the stream ended that this one goes on for."""
    start = time.monotonic()
    answer, pauses, last = Answer(), list[Pause](), lost or start
    with Client(address) as client:
        for response in client.generate(request, deadline_s):
            if absences is not None:
                absences.answered(start)
            answer.add(response)
            now = time.monotonic()
            if now - last > _LEAST_PAUSE_S:
                pauses.append(Pause(now, now - last))
            last = now
    return answer, pauses


class Repeats:
    """One request, made again and again until `done` is set, and then at least once more.

    want: its undisturbed answer, which took `calm_s` seconds. down: set when the server is.
    """

    def __init__(
        self, address: str, request: pb.GenerateRequest, want: Answer, calm_s: float,
        absences: Absences, down: threading.Event,
    ) -> None:  # fmt: skip
        self._address, self._request, self._want = address, request, want
        self._deadline_s = _DEADLINE_S + _DEADLINE_FACTOR * calm_s
        self._absences, self._down = absences, down
        self.equal, self.lost, self.wrong = 0, 0, list[str]()
        self.pauses: list[Pause] = []
        self.done = False

    def run(self) -> None:
        """Ask, and compare: at last with an answer that was begun when everything was over."""
        last, lost_at = False, None
        while not (last or self._down.is_set()):
            last, start = self.done, time.monotonic()
            try:
                answer, pauses = ask(self._address, self._request, self._deadline_s, lost_at, self._absences)
            except NumoeError as error:
                in_time = time.monotonic() - start < self._deadline_s
                if isinstance(error, UnavailableError) and in_time and self._absences.excuse(start):
                    self.lost += lost_at is None
                    last, lost_at = False, lost_at or time.monotonic()
                    time.sleep(_RETRY_S)
                else:
                    self.wrong.append(str(error))
            else:
                lost_at = None
                self.pauses += pauses
                self._compare(answer)

    def _compare(self, answer: Answer) -> None:
        if (answer.token_ids, answer.text) == (self._want.token_ids, self._want.text):
            self.equal += 1
        else:
            self.wrong.append(difference(answer, self._want))


def difference(found: Answer, want: Answer) -> str:
    """In what an answer is not the undisturbed one."""
    if found.token_ids == want.token_ids:
        same = _same(found.text, want.text)
        return f"its tokens are right, but of {len(found.text)} characters only the first {same} of {len(want.text)}"
    same = _same(found.token_ids, want.token_ids)
    return (
        f"of {len(found.token_ids)} tokens the first {same} are those of the undisturbed answer of "
        f"{len(want.token_ids)}"
    )


def _same(found: Sequence[object], want: Sequence[object]) -> int:
    """How many of the first items are the same."""
    pairs = zip(found, want, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(found), len(want)))
