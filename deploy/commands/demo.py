"""`numoe demo`: a real model answers, from nothing but this package."""

from __future__ import annotations

import sys
import time
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from numoe.deploy.answers import Answer, read_answer
from numoe.deploy.client import Client
from numoe.deploy.commands.placement import Placement
from numoe.deploy.console import one_line_errors
from numoe.deploy.signals import StopSignals
from numoe.engine.errors import InputError
from numoe.v1 import chat_pb2
from numoe.v1 import generation_pb2 as pb

_CONTEXT = 2048
_console = Console(stderr=True)


def demo(
    prompt: str | None = None,
    /,
    *,
    chat: Annotated[bool, Parameter(negative=())] = False,
    max_tokens: int = 200,
    shards: str = "auto",
) -> int:
    """Make a small Mixture of Experts, serve it, and let it answer; everything is gone afterwards.

    Parameters
    ----------
    prompt
        A text for the model to continue, to the end of the line; without it, a chat begins.
    chat
        Put the prompt to the model as a message instead.
    max_tokens
        Tokens of an answer at most.
    shards
        Expert shards: "auto" is one for each NUMA node.

    """
    with one_line_errors(), StopSignals():
        if max_tokens < 1:
            raise InputError(f"--max-tokens {max_tokens} is not possible: give at least 1")
        from numoe.cluster.endpoint import ANY_PORT
        from numoe.deploy.launch import running_server

        start = time.monotonic()
        options = Placement(shards=shards).plan_options(context=_CONTEXT, slots=1)
        with running_server(_model(), options, ANY_PORT) as server, Client(server.address) as client:
            _console.print(f"ready after {time.monotonic() - start:.1f} s", style="dim", highlight=False)
            if prompt is None:
                _chat(client, max_tokens)
            elif chat:
                _say(client, _conversation([_message("user", prompt)], max_tokens))
            else:
                print(prompt, end="", flush=True)
                _say(client, _continuation(prompt, max_tokens))
    return 0


def _model() -> str:
    from numoe.deploy.demo import demo_model

    columns = (TextColumn("making the demo model (once)"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, console=_console, transient=True) as bars:
        task = bars.add_task("", total=None, visible=False)
        return str(demo_model(lambda done, total: bars.update(task, completed=done, total=total, visible=True)))


def _message(role: str, content: str) -> chat_pb2.ChatMessage:
    return chat_pb2.ChatMessage(role=role, content=content)


def _continuation(prompt: str, max_tokens: int) -> pb.GenerateRequest:
    stopping = pb.StopOptions(max_tokens=max_tokens, strings=["\n"])
    return pb.GenerateRequest(text=prompt, sampling=pb.SamplingOptions(temperature=0.0), stopping=stopping)


def _conversation(messages: list[chat_pb2.ChatMessage], max_tokens: int) -> pb.GenerateRequest:
    # So small a model repeats itself when it is always given the likeliest token.
    sampling = pb.SamplingOptions(temperature=0.0, repetition_penalty=1.1)
    stopping = pb.StopOptions(max_tokens=max_tokens)
    return pb.GenerateRequest(chat=pb.ChatPrompt(messages=messages), sampling=sampling, stopping=stopping)


def _chat(client: Client, max_tokens: int) -> None:
    """Take turns until end of input or Ctrl-C."""
    _console.print("Say something; Ctrl-D ends the chat.", style="dim")
    history: list[chat_pb2.ChatMessage] = []
    while True:
        try:
            text = input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if text.strip():
            history.append(_message("user", text))
            history.append(_message("assistant", _say(client, _conversation(history, max_tokens))))


def _say(client: Client, request: pb.GenerateRequest) -> str:
    """Send a request, print the answer as it comes and its timings; the answer."""
    answer = Answer()
    read_answer(client.generate(request, None), _print_text, answer)
    print(flush=True)
    _console.print(answer.speed(), style="dim", highlight=False)
    return answer.text


def _print_text(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
