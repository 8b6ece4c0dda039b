"""Reads a generation stream to its end: text as it comes, and the whole answer at last."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from numoe.v1 import generation_pb2 as pb


@dataclass(kw_only=True)
class Answer:
    """What a stream has said so far; `finish_reason` is "cancelled" until it has ended.

    timings: milliseconds by the names that `numoe generate --json` prints.
    """

    request_id: str = ""
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    seed: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    finish_reason: str = "cancelled"
    stop_string: str | None = None
    timings: dict[str, float] = field(default_factory=dict)

    def add(self, response: pb.GenerateResponse) -> str:
        """Take in one message; returns the text that it adds."""
        event = response.WhichOneof("event")
        if event == "started":
            started = response.started
            self.request_id, self.seed = started.request_id, started.seed
            self.prompt_tokens, self.cached_tokens = started.prompt_tokens, started.cached_tokens
        elif event == "tokens":
            self.text += response.tokens.text
            self.token_ids += response.tokens.token_ids
            self.logprobs += map(_logprobs, response.tokens.logprobs)
            return response.tokens.text
        elif event == "finished":
            self._finish(response.finished)
        return ""

    def _finish(self, finished: pb.Finished) -> None:
        self.finish_reason = pb.FinishReason.Name(finished.reason).removeprefix("FINISH_REASON_").lower()
        self.stop_string = finished.stop_string if finished.HasField("stop_string") else None
        self.completion_tokens = finished.usage.completion_tokens
        self.prompt_tokens = finished.usage.prompt_tokens
        self.cached_tokens = finished.usage.cached_tokens
        timings = finished.timings
        self.timings = {
            "queued": timings.queued_ms,
            "prefill": timings.prefill_ms,
            "decode": timings.decode_ms,
            "total": timings.total_ms,
            "prompt_ms_per_token": timings.prompt_ms_per_token,
            "decode_ms_per_token": timings.decode_ms_per_token,
        }

    def to_json(self, *, logprobs: bool = False) -> dict[str, Any]:
        """Make the object that `numoe generate --json` prints; times in milliseconds."""
        result: dict[str, Any] = {
            "text": self.text,
            "token_ids": self.token_ids,
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "completion_tokens": self.completion_tokens,
            "finish_reason": self.finish_reason,
            "timings": {name: round(value, 3) for name, value in self.timings.items()},
            "seed": self.seed,
            "request_id": self.request_id,
        }
        if self.stop_string is not None:
            result["stop_string"] = self.stop_string
        if logprobs:
            result["logprobs"] = self.logprobs
        return result

    def speed(self) -> str:
        """Say in one line how long prompt and answer took."""
        return "  ".join(
            [
                _pace("prompt", self.prompt_tokens - self.cached_tokens, self.timings["prompt_ms_per_token"])
                + (f" ({self.cached_tokens} cached)" if self.cached_tokens else ""),
                _pace("answer", self.completion_tokens, self.timings["decode_ms_per_token"]),
                f"total {self.timings['total'] / 1e3:.2f} s",
            ]
        )


def read_answer(
    stream: Iterable[pb.GenerateResponse],
    on_text: Callable[[str], None] | None = None,
    answer: Answer | None = None,
) -> Answer:
    """Read a stream to its end, calling `on_text` with each piece of text.

    Pass `answer` to keep what came before an interruption.
    """
    answer = answer if answer is not None else Answer()
    for response in stream:
        text = answer.add(response)
        if text and on_text is not None:
            on_text(text)
    return answer


def _logprobs(message: pb.TokenLogprobs) -> dict[str, Any]:
    return {**_logprob(message.token), "top": [_logprob(top) for top in message.top]}


def _logprob(message: pb.TokenLogprob) -> dict[str, Any]:
    piece = message.piece.decode(errors="replace")
    return {"token_id": message.token_id, "text": piece, "logprob": message.logprob}


def _pace(name: str, tokens: int, ms_per_token: float) -> str:
    per_second = f", {1e3 / ms_per_token:.1f} tok/s" if ms_per_token > 0 else ""
    return f"{name} {tokens} tok, {ms_per_token:.1f} ms/tok{per_second}"
