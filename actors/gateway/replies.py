"""Turns the worker's events of one request into the messages of its stream."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from numoe.actors.gateway.errors import DeadlineError, GenerationFailedError
from numoe.engine.errors import NumoeError, PreconditionError, UnavailableError
from numoe.engine.requests import (
    Event,
    Finished,
    GenerationRequest,
    PrefillProgress,
    Started,
    Timings,
    TokenGenerated,
)
from numoe.engine.text import StopMatcher, StreamDecoder, Tokenizer
from numoe.v1 import generation_pb2 as pb

_REASONS = {
    "stop": pb.FINISH_REASON_STOP,
    "length": pb.FINISH_REASON_LENGTH,
    "cancelled": pb.FINISH_REASON_CANCELLED,
}


class _Held(NamedTuple):
    """A token not sent yet: its text spans characters start to end of the answer."""

    token: TokenGenerated
    start: int
    end: int


class AnswerText:
    """Assembles text from tokens: whole characters only, and nothing of a stop string.

    Control tokens have no text, as llama-server has it.

    A token is taken together with the text that it completes.
    """

    def __init__(self, tokenizer: Tokenizer, stop_strings: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._decoder = StreamDecoder(tokenizer, skip_special=True)
        self._matcher = StopMatcher(stop_strings)
        self._held: deque[_Held] = deque()
        self._ready: list[str] = []
        self._decoded = 0  # characters decoded so far
        self._released = 0  # of these, characters that are ready or were taken
        self.stop_string: str | None = None

    def push(self, token: TokenGenerated) -> None:
        """Add a token; sets `stop_string` if its text completes one."""
        start, piece = self._decoded, self._decoder.push(token.token_id)
        waits = not piece and self._has_bytes(token.token_id)  # for the rest of a character
        self._held.append(_Held(token, start, start + len(piece) + waits))
        self._match(piece)

    def finish(self) -> None:
        """No token will come: what was held back for a possible stop string is text after all."""
        self._match(self._decoder.flush())
        if self.stop_string is None:
            self._release(self._matcher.flush())

    def take(self) -> tuple[str, list[TokenGenerated]]:
        """Return the text that is certain, and the tokens that are complete by its end."""
        text, self._ready = "".join(self._ready), []
        tokens = []
        while self._held and self._held[0].end <= self._released:
            tokens.append(self._held.popleft().token)
        return text, tokens

    def take_last(self) -> tuple[str, list[TokenGenerated]]:
        """After `finish` or a stop string: the rest.

        Tokens that lie entirely in the stop string are left out.
        """
        text, tokens = self.take()
        stopped = self.stop_string is not None
        tokens += [held.token for held in self._held if not stopped or held.start < self._released]
        self._held.clear()
        return text, tokens

    def _has_bytes(self, token_id: int) -> bool:
        return not self._tokenizer.is_special(token_id) and bool(self._tokenizer.token_bytes(token_id))

    def _match(self, piece: str) -> None:
        self._decoded += len(piece)
        if piece:
            text, self.stop_string = self._matcher.push(piece)
            self._release(text)

    def _release(self, text: str) -> None:
        if text:
            self._ready.append(text)
            self._released += len(text)


class Replies:
    """The stream of one request.

    request: what was submitted. arrived: `clock()` when the call came in. After the last message,
    `ended` is set; `error` is set too if the call must end with a status. `worker_finished` says
    whether the worker knows that the request is over. What a worker tells of its start with a request
    that another one had begun is not passed on.
    """

    def __init__(
        self,
        request: GenerationRequest,
        tokenizer: Tokenizer,
        stop_strings: Sequence[str],
        arrived: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._request = request
        self._tokenizer = tokenizer
        self._text = AnswerText(tokenizer, stop_strings)
        self._clock = clock
        self._arrived = self._started = self._first_token = arrived
        self._cached_tokens = 0
        self._tokens = self._starts = self._prefilled = 0
        self.ended = False
        self.worker_finished = False
        self.error: NumoeError | None = None

    def translate(self, events: Sequence[Event]) -> Iterator[pb.GenerateResponse]:
        """Messages for the events of one or more steps; tokens of all of them go into one."""
        for event in events:
            if isinstance(event, Started):
                self._starts += 1
                if self._starts == 1:
                    yield self._start(event)
            elif isinstance(event, PrefillProgress):
                if event.done_tokens > self._prefilled:
                    self._prefilled = event.done_tokens
                    progress = pb.PrefillProgress(done=event.done_tokens, total=event.prompt_tokens)
                    yield pb.GenerateResponse(prefill=progress)
            elif isinstance(event, TokenGenerated):
                self._push(event)
                if self._text.stop_string is not None:
                    yield from self._end_at_stop_string()
                    return
            elif isinstance(event, Finished):
                yield from self._finish(event)
                return
        yield from self._token_messages(*self._text.take())

    def _start(self, event: Started) -> pb.GenerateResponse:
        self._started = self._first_token = self._clock()
        self._cached_tokens = event.cached_tokens
        started = pb.Started(
            request_id=event.request_id,
            prompt_tokens=event.prompt_tokens,
            cached_tokens=event.cached_tokens,
            seed=self._request.sampling.seed,
        )
        return pb.GenerateResponse(started=started)

    def _push(self, event: TokenGenerated) -> None:
        if not self._tokens:
            self._first_token = self._clock()
        self._tokens += 1
        self._text.push(event)

    def _timings(self) -> Timings:
        """How long the phases took, as seen from here."""
        return Timings(
            queued_ms=1e3 * (self._started - self._arrived),
            prefill_ms=1e3 * (self._first_token - self._started),
            decode_ms=1e3 * (self._clock() - self._first_token),
        )

    def _end_at_stop_string(self) -> Iterator[pb.GenerateResponse]:
        timings = self._timings()
        yield from self._token_messages(*self._text.take_last())
        yield self._finished(pb.FINISH_REASON_STOP, self._tokens, timings, self._tokens - 1)
        self.ended = True

    def _finish(self, event: Finished) -> Iterator[pb.GenerateResponse]:
        self.worker_finished = True
        self._text.finish()
        yield from self._token_messages(*self._text.take_last())
        self.ended = True
        if event.reason == "deadline":
            self.error = DeadlineError("the call's deadline passed; the request was given up")
        elif event.reason == "unavailable":
            self.error = UnavailableError(event.error)
        elif event.reason == "slot_busy":
            self.error = PreconditionError(event.error)
        elif event.reason == "error":
            self.error = GenerationFailedError(event.error or "the worker gave the request up")
        else:
            reason = _REASONS["stop" if self._text.stop_string is not None else event.reason]
            # A stop token takes a decode step too, though it is not among the tokens received.
            steps = self._tokens if event.reason == "stop" else self._tokens - 1
            timings = event.timings if self._starts <= 1 else self._timings()  # the last worker knows its part only
            yield self._finished(reason, event.completion_tokens, timings, steps)

    def _finished(
        self, reason: pb.FinishReason.ValueType, tokens: int, timings: Timings, decode_steps: int
    ) -> pb.GenerateResponse:
        prompt = len(self._request.token_ids)
        return pb.GenerateResponse(
            finished=pb.Finished(
                reason=reason,
                usage=pb.Usage(prompt_tokens=prompt, cached_tokens=self._cached_tokens, completion_tokens=tokens),
                timings=pb.Timings(
                    queued_ms=timings.queued_ms,
                    prefill_ms=timings.prefill_ms,
                    decode_ms=timings.decode_ms,
                    total_ms=1e3 * (self._clock() - self._arrived),
                    prompt_ms_per_token=timings.prefill_ms / max(1, prompt - self._cached_tokens),
                    decode_ms_per_token=timings.decode_ms / decode_steps if decode_steps > 0 else 0.0,
                ),
                stop_string=self._text.stop_string,
            )
        )

    def _token_messages(self, text: str, tokens: Sequence[TokenGenerated]) -> Iterator[pb.GenerateResponse]:
        if not text and not tokens:
            return
        wanted = self._request.logprobs is not None
        yield pb.GenerateResponse(
            tokens=pb.Tokens(
                text=text,
                token_ids=[token.token_id for token in tokens],
                logprobs=[self._logprobs(token) for token in tokens] if wanted else (),
            )
        )

    def _logprobs(self, token: TokenGenerated) -> pb.TokenLogprobs:
        def message(token_id: int, logprob: float) -> pb.TokenLogprob:
            piece = self._tokenizer.token_bytes(token_id)
            return pb.TokenLogprob(token_id=token_id, logprob=logprob, piece=piece)

        return pb.TokenLogprobs(
            token=message(token.token_id, token.logprob if token.logprob is not None else float("nan")),
            top=[message(top.token_id, top.logprob) for top in token.top_logprobs],
        )
