"""`numoe generate`: continue a prompt on a running server."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from numoe.deploy.answers import Answer, read_answer
from numoe.deploy.client import Client
from numoe.deploy.commands.security import DEFAULT, Connection
from numoe.deploy.commands.values import duration, unsigned
from numoe.deploy.console import INTERRUPTED, one_line_errors
from numoe.engine.errors import InputError, NumoeError
from numoe.v1 import chat_pb2
from numoe.v1 import generation_pb2 as pb


def generate(
    prompt: Annotated[str, Parameter(allow_leading_hyphen=True)],
    /,
    *,
    connection: Connection = DEFAULT,
    max_tokens: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    presence_penalty: float | None = None,
    frequency_penalty: float | None = None,
    seed: int | None = None,
    stop: Annotated[tuple[str, ...], Parameter(negative=())] = (),
    ignore_eos: Annotated[bool, Parameter(negative=())] = False,
    chat: Annotated[bool, Parameter(negative=())] = False,
    system: str | None = None,
    logprobs: int | None = None,
    cache_salt: str = "",
    no_cache: Annotated[bool, Parameter(negative=())] = False,
    slot: int | None = None,
    slot_wait: float | None = None,
    json_output: Annotated[bool, Parameter(name="--json", negative=())] = False,
    timeout: float | None = None,
) -> int:
    """Continue a prompt and print the text as it comes.

    Parameters
    ----------
    prompt
        What to continue; "-" reads standard input.
    max_tokens
        Tokens to generate at most; as many as the context holds if not given.
    temperature
        0 always takes the likeliest token; 0.8 if not given.
    top_k
        Keep the k likeliest tokens, 0 for all; 40 if not given.
    top_p
        Keep the likeliest tokens that reach this probability together; 0.95 if not given.
    min_p
        Drop tokens less likely than this share of the likeliest; 0.05 if not given.
    repetition_penalty
        Weaken tokens that occurred lately; 1 (off) if not given.
    presence_penalty
        Subtracted from the logits of tokens that occurred lately; 0 if not given.
    frequency_penalty
        The same, once for each time they occurred; 0 if not given.
    seed
        Equal seeds give equal answers; random if not given.
    stop
        A text that ends the answer; may be given several times.
    ignore_eos
        Never end before --max-tokens.
    chat
        Treat the prompt as a user's message, with the model's chat template.
    system
        A system message before it; implies --chat.
    logprobs
        With --json, report this many likeliest alternatives beside each token.
    cache_salt
        Share cached prompts only with requests of the same salt.
    no_cache
        Neither use cached prompts nor leave this one behind.
    slot
        Run in this slot and leave the conversation in it; any free one if not given. What the slot holds is not
        read again as far as the prompt begins with it.
    slot_wait
        Wait this many seconds while others use that slot; if not given, a busy slot is an error.
    json_output
        Print one JSON object at the end, times in milliseconds, instead of the text.
    timeout
        Give up after this many seconds.
    connection
        How the server is reached.

    """
    with one_line_errors():
        request = pb.GenerateRequest(
            sampling=sampling_options(
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                min_p=min_p,
                repetition_penalty=repetition_penalty,
                presence_penalty=presence_penalty,
                frequency_penalty=frequency_penalty,
                seed=seed,
            ),
            stopping=pb.StopOptions(
                max_tokens=unsigned("--max-tokens", max_tokens), strings=stop, ignore_eos=ignore_eos
            ),
            logprobs=unsigned("--logprobs", logprobs),
            cache=pb.CacheOptions(salt=cache_salt.encode(), bypass=no_cache),
            slot_id=unsigned("--slot", slot),
            slot_wait=duration("--slot-wait", slot_wait),
        )
        _set_prompt(request, prompt, system, chat=chat)
        with connection.client() as client:
            return _run(client, request, timeout, json_output=json_output)


def sampling_options(
    *, top_k: int | None = None, seed: int | None = None, **values: float | None
) -> pb.SamplingOptions:
    """Make sampling options a message; what is None takes the server's default."""
    options = pb.SamplingOptions(top_k=unsigned("--top-k", top_k), seed=unsigned("--seed", seed, bits=64))
    for name, value in values.items():
        if value is not None:
            setattr(options, name, value)
    return options


def _set_prompt(request: pb.GenerateRequest, prompt: str, system: str | None, *, chat: bool) -> None:
    if prompt.startswith("-") and prompt != "-":
        raise InputError(
            f"unknown option {prompt}; a prompt that begins with a hyphen goes through standard input: "
            f"printf %s PROMPT | numoe generate -"
        )
    try:
        text = sys.stdin.read() if prompt == "-" else prompt
        text.encode()
    except UnicodeError as error:
        raise InputError(f"the prompt is not UTF-8: {error}") from error
    if chat or system is not None:
        if system is not None:
            request.chat.messages.append(chat_pb2.ChatMessage(role="system", content=system))
        request.chat.messages.append(chat_pb2.ChatMessage(role="user", content=text))
    else:
        request.text = text


def _run(client: Client, request: pb.GenerateRequest, timeout_s: float | None, *, json_output: bool) -> int:
    answer, code = Answer(), 0
    stream = client.generate(request, timeout_s)
    try:
        read_answer(stream, None if json_output else _print_text, answer)
    except KeyboardInterrupt:
        stream.close()  # type: ignore[attr-defined]  # a generator: cancels the call now
        code = INTERRUPTED
    except NumoeError:
        if answer.text and not json_output:
            print(flush=True)  # the error begins on a line of its own
        raise
    except BrokenPipeError:  # the reader, `head` perhaps, has enough
        stream.close()  # type: ignore[attr-defined]
        _discard_stdout()
        return 0
    if json_output:
        print(json.dumps(answer.to_json(logprobs=request.HasField("logprobs")), ensure_ascii=False))
        return code
    print(flush=True)
    if answer.timings and sys.stderr.isatty():
        print(answer.speed(), file=sys.stderr)
    return code


def _print_text(text: str) -> None:
    print(text, end="", flush=True)


def _discard_stdout() -> None:
    """Let the interpreter flush what is left to nowhere instead of complaining at exit."""
    os.dup2(os.open(Path(os.devnull), os.O_WRONLY), sys.stdout.fileno())
