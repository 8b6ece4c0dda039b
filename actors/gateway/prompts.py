"""Tokenizes prompts and makes complete GenerationRequests of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import ParamSpec, TypeVar

from numoe.actors.gateway.errors import BadRequestError, Violation
from numoe.actors.gateway.interfaces import ServerContext
from numoe.actors.gateway.validation import (
    Violations,
    check_logprobs,
    check_prompt,
    check_stopping,
    sampling_params,
    slot_of,
)
from numoe.engine.errors import UnsupportedError
from numoe.engine.requests import GenerationRequest
from numoe.v1 import chat_pb2
from numoe.v1 import generation_pb2 as pb

UNBOUNDED = (1 << 31) - 1  # tokens of an answer
INLINE_BYTES = 16 << 10  # texts up to this take under a millisecond or so: not worth a thread

Params = ParamSpec("Params")
Result = TypeVar("Result")


async def off_loop(
    size: int, function: Callable[Params, Result], *args: Params.args, **kwargs: Params.kwargs
) -> Result:
    """Call `function`, in a thread if `size` bytes of text would hold up the event loop."""
    if size <= INLINE_BYTES:
        return function(*args, **kwargs)
    return await asyncio.to_thread(function, *args, **kwargs)


async def render_chat(
    context: ServerContext, messages: Iterable[chat_pb2.ChatMessage], *, add_generation_prompt: bool
) -> str:
    """Render the prompt of a conversation.

    Raises UnsupportedError without a chat template, InputError when the template refuses it.
    """
    if context.chat_template is None:
        raise UnsupportedError(f"{context.model.name} has no chat template: send text or token_ids")
    values = [{"role": message.role, "content": message.content} for message in messages]
    size = sum(len(value["content"]) for value in values)
    return await off_loop(size, context.chat_template.render, values, add_generation_prompt=add_generation_prompt)


async def prompt_tokens(context: ServerContext, request: pb.GenerateRequest) -> tuple[str, list[int]]:
    """Return the field that holds the prompt, and the prompt's token ids."""
    if request.WhichOneof("prompt") == "token_ids":
        return "token_ids.ids", list(request.token_ids.ids)
    if request.WhichOneof("prompt") == "text":
        return "text", await off_loop(len(request.text), context.tokenizer.encode, request.text)
    chat = request.chat
    opened = chat.add_generation_prompt if chat.HasField("add_generation_prompt") else True
    text = await render_chat(context, chat.messages, add_generation_prompt=opened)
    return "chat", await off_loop(len(text), context.tokenizer.encode_chat, text)


async def generation_request(
    context: ServerContext, request: pb.GenerateRequest, request_id: str, deadline: float | None
) -> GenerationRequest:
    """Validate, fill in defaults, tokenize.

    deadline: `time.time()` at which the call expires. Raises BadRequestError, UnsupportedError.
    """
    violations = Violations()
    stopping, eog_ids = request.stopping, context.tokenizer.eog_ids
    check_prompt(request, context, violations)
    check_stopping(stopping, context, violations)
    logprobs = check_logprobs(request, context.limits, violations)
    violations.at_most("cache.salt", len(request.cache.salt), context.limits.max_salt_bytes, "bytes")
    slot, slot_deadline = slot_of(request, context, violations)
    asked = frozenset(stopping.token_ids[: context.limits.max_stop_ids])
    banned = eog_ids - asked if stopping.ignore_eos else frozenset[int]()
    sampling = sampling_params(request.sampling, banned, context, violations)
    violations.raise_if_any()

    field, token_ids = await prompt_tokens(context, request)
    room = context.model.context_tokens - len(token_ids)
    if not token_ids:
        raise BadRequestError([Violation(field, "is empty: give a prompt of at least one token")])
    if room < 1:
        raise BadRequestError([Violation(field, too_long(len(token_ids), context.model.context_tokens))])
    most = UNBOUNDED if context.outlasts_context else room
    return GenerationRequest(
        request_id=request_id,
        token_ids=tuple(token_ids),
        max_tokens=min(stopping.max_tokens, most) if stopping.HasField("max_tokens") else most,
        sampling=sampling,
        stop_ids=asked if stopping.ignore_eos else asked | eog_ids,
        logprobs=logprobs,
        deadline=deadline,
        cache_salt=request.cache.salt,
        bypass_cache=request.cache.bypass,
        slot=slot,
        slot_deadline=slot_deadline,
    )


def too_long(prompt: int, context: int) -> str:
    """Say what is wrong with a prompt that leaves no room in the context."""
    return (
        f"the prompt has {prompt} tokens, but the context holds {context} with at least one to generate: "
        f"shorten it or serve with a larger --ctx-size"
    )
