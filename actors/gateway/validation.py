"""Turns a GenerateRequest into a GenerationRequest, or says every field that is wrong with it."""

from __future__ import annotations

import math
import re
import secrets
import time
from collections.abc import Iterable, Sequence

from google.protobuf.duration_pb2 import Duration

from numoe.actors.gateway.errors import MAX_VIOLATIONS, BadRequestError, Violation
from numoe.actors.gateway.interfaces import Limits, ServerContext
from numoe.engine.errors import NotFoundError
from numoe.engine.requests import SamplingParams
from numoe.v1 import chat_pb2
from numoe.v1 import generation_pb2 as pb

GREEDY_BELOW = 1e-4  # smaller temperatures would overflow float32 logits and choose the same token
MAX_WAIT_S = 86_400.0
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class Violations:
    """Collects what is wrong with a request, to tell it all at once."""

    def __init__(self) -> None:
        self._found: list[Violation] = []

    def add(self, field: str, description: str) -> None:
        """Note that `field` is wrong; one may note any number, but the first few are kept."""
        if len(self._found) < MAX_VIOLATIONS:
            self._found.append(Violation(field, description))

    def number(self, field: str, value: float, low: float, high: float) -> float:
        """Note a value that is not a finite number in [low, high]; returns it."""
        if not low <= value <= high:  # false for NaN too
            self.add(field, f"is {value:g}, not a number from {low:g} to {high:g}")
        return value

    def token_ids(self, field: str, ids: Iterable[int], vocab_size: int) -> None:
        """Note the first id outside the vocabulary."""
        for index, token_id in enumerate(ids):
            if token_id >= vocab_size:
                self.add(f"{field}[{index}]", f"{token_id} is no token id: the vocabulary has {vocab_size}")
                return

    def at_most(self, field: str, count: int, limit: int, unit: str) -> bool:
        """Note a count over its limit; whether it is within: what is not may take too long to look at."""
        if count > limit:
            self.add(field, f"has {count} {unit}; at most {limit} are allowed")
        return count <= limit

    def duration(self, field: str, value: Duration) -> float:
        """Note a duration that is not from 0 to a day; returns its seconds."""
        seconds = value.seconds + value.nanos / 1e9
        if not 0 <= seconds <= MAX_WAIT_S:
            self.add(field, f"is {seconds:g} s, not from 0 to {MAX_WAIT_S:g} s")
        return seconds

    def raise_if_any(self) -> None:
        """Raise BadRequestError if something was noted."""
        if self._found:
            raise BadRequestError(self._found)


def request_id_of(request: pb.GenerateRequest) -> str:
    """Return the caller's request_id, or a fresh one. Raises BadRequestError."""
    if not request.HasField("request_id"):
        return secrets.token_hex(12)
    return checked_request_id(request.request_id)


def checked_request_id(request_id: str) -> str:
    """`request_id` if it is well-formed. Raises BadRequestError."""
    if not _REQUEST_ID.fullmatch(request_id):
        raise BadRequestError([Violation("request_id", "is not 1 to 128 characters of [A-Za-z0-9._:-]")])
    return request_id


def check_prompt(request: pb.GenerateRequest, context: ServerContext, violations: Violations) -> None:
    """Check what can be checked before tokenizing."""
    kind = request.WhichOneof("prompt")
    if kind is None:
        violations.add("prompt", "is missing: give text, token_ids or chat")
    elif kind == "text":
        if not request.text:
            violations.add("text", "is empty: give a prompt of at least one token")
        violations.at_most("text", len(request.text.encode()), context.limits.max_prompt_bytes, "bytes")
    elif kind == "token_ids":
        if not request.token_ids.ids:
            violations.add("token_ids.ids", "is empty: give a prompt of at least one token")
        check_token_ids("token_ids.ids", request.token_ids.ids, context, violations)
    else:
        check_messages("chat.messages", request.chat.messages, context.limits, violations)


def check_token_ids(field: str, ids: Sequence[int], context: ServerContext, violations: Violations) -> None:
    """Check token ids that stand for a text."""
    if violations.at_most(field, len(ids), context.limits.max_token_ids, "ids"):
        violations.token_ids(field, ids, context.model.vocab_size)


def check_messages(
    field: str, messages: Sequence[chat_pb2.ChatMessage], limits: Limits, violations: Violations
) -> None:
    """Check the messages of a conversation."""
    if not messages:
        violations.add(field, "is empty: give at least one message")
    if not violations.at_most(field, len(messages), limits.max_messages, "messages"):
        return
    size = 0
    for index, message in enumerate(messages):
        if not message.role:
            violations.add(f"{field}[{index}].role", 'is empty: give "system", "user" or "assistant"')
        size += len(message.role.encode()) + len(message.content.encode())
    violations.at_most(field, size, limits.max_prompt_bytes, "bytes")


def check_stopping(stopping: pb.StopOptions, context: ServerContext, violations: Violations) -> None:
    """Check when to stop."""
    limits = context.limits
    if stopping.HasField("max_tokens") and stopping.max_tokens == 0:
        violations.add("stopping.max_tokens", "is 0; at least 1 token is generated")
    if violations.at_most("stopping.strings", len(stopping.strings), limits.max_stop_strings, "strings"):
        for index, stop in enumerate(stopping.strings):
            if not stop:
                violations.add(f"stopping.strings[{index}]", "is empty: it would stop every generation at once")
            violations.at_most(
                f"stopping.strings[{index}]", len(stop.encode()), limits.max_stop_string_bytes, "bytes"
            )
    if violations.at_most("stopping.token_ids", len(stopping.token_ids), limits.max_stop_ids, "ids"):
        violations.token_ids("stopping.token_ids", stopping.token_ids, context.model.vocab_size)


def check_logprobs(request: pb.GenerateRequest, limits: Limits, violations: Violations) -> int | None:
    """How many alternatives to report, None for no logprobs."""
    if not request.HasField("logprobs"):
        return None
    violations.at_most("logprobs", request.logprobs, limits.max_logprobs, "alternatives")
    return request.logprobs


def slot_of(
    request: pb.GenerateRequest, context: ServerContext, violations: Violations
) -> tuple[int | None, float | None]:
    """The slot that a request names, and `time.time()` until which it waits for it."""
    if not request.HasField("slot_id"):
        if request.HasField("slot_wait"):
            violations.add("slot_wait", "is given without slot_id")
        return None, None
    check_slot(request.slot_id, context)
    if not request.HasField("slot_wait"):
        return request.slot_id, None
    return request.slot_id, time.time() + violations.duration("slot_wait", request.slot_wait)


def check_slot(slot: int, context: ServerContext) -> None:
    """Raise NotFoundError unless the server has such a slot."""
    if slot >= context.slots:
        raise NotFoundError(f"there is no slot {slot}: this server has slots 0 to {context.slots - 1} (--parallel)")


def sampling_params(
    options: pb.SamplingOptions, banned_ids: Iterable[int], context: ServerContext, violations: Violations
) -> SamplingParams:
    """Return sampling with defaults filled in; `banned_ids` are never chosen."""

    def number(name: str, default: float, low: float, high: float) -> float:
        if not options.HasField(name):  # type: ignore[arg-type]
            return default
        return violations.number(f"sampling.{name}", getattr(options, name), low, high)

    def count(name: str, default: int) -> int:
        return int(getattr(options, name)) if options.HasField(name) else default  # type: ignore[arg-type]

    temperature = number("temperature", 0.8, 0, 1000)
    penalty = number("repetition_penalty", 1.0, 0, 100)
    if penalty == 0:
        violations.add("sampling.repetition_penalty", "is 0; logits are divided by it")
    window = count("penalty_window", 64)
    if window < -1:
        violations.add("sampling.penalty_window", f"is {window}; give -1 for all tokens, or a count")
    return SamplingParams(
        temperature=0.0 if temperature < GREEDY_BELOW else temperature,
        top_k=min(count("top_k", 40), context.model.vocab_size),
        top_p=number("top_p", 0.95, 0, 1),
        min_p=number("min_p", 0.05, 0, 1),
        repetition_penalty=penalty,
        presence_penalty=number("presence_penalty", 0.0, -100, 100),
        frequency_penalty=number("frequency_penalty", 0.0, -100, 100),
        penalty_window=window,
        logit_bias=_logit_bias(options, banned_ids, context, violations),
        seed=options.seed if options.HasField("seed") else secrets.randbits(63),
    )


def _logit_bias(
    options: pb.SamplingOptions, banned_ids: Iterable[int], context: ServerContext, violations: Violations
) -> tuple[tuple[int, float], ...]:
    limit = context.limits.max_logit_bias
    if not violations.at_most("sampling.logit_bias", len(options.logit_bias), limit, "tokens"):
        return ()
    bias = dict(options.logit_bias)
    violations.token_ids("sampling.logit_bias", sorted(bias), context.model.vocab_size)
    for token_id, value in bias.items():
        if math.isnan(value) or value == math.inf:
            violations.add(
                f"sampling.logit_bias[{token_id}]", f"is {value:g}; give a finite number or -Infinity"
            )
            break
    bias |= dict.fromkeys(banned_ids, -math.inf)
    if sum(value == -math.inf for value in bias.values()) >= context.model.vocab_size:
        violations.add("sampling.logit_bias", "bans every token of the vocabulary; leave one to choose")
    return tuple(sorted(bias.items()))
