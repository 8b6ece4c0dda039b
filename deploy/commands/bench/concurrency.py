"""`numoe bench concurrency`: many streams over gRPC at once, as clients see them."""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import quantiles
from typing import Annotated, Any

from cyclopts import Parameter

from numoe.deploy.client import Client
from numoe.deploy.commands.placement import ANYWHERE, Placement
from numoe.deploy.commands.security import DEFAULT, Connection
from numoe.deploy.console import one_line_errors
from numoe.engine.errors import InputError, NumoeError
from numoe.v1 import generation_pb2 as pb

_COLUMNS = "|{:>8} |{:>7} |{:>8} |{:>8} |{:>11} |{:>10} |{:>10} |{:>9} |{:>9} |"
_HEAD = ("streams", "tokens", "seconds", "tok/s", "all, tok/s", "TTFT p50", "TTFT p99", "ITL p50", "ITL p99")
_WARM_UP_TOKENS = 4


@dataclass
class Stream:
    """When tokens came, in seconds of `time.perf_counter`: one entry each."""

    start: float
    arrivals: list[float] = field(default_factory=list)

    @property
    def first_ms(self) -> float:
        """Milliseconds to the first token."""
        return 1e3 * (self.arrivals[0] - self.start)

    @property
    def gaps_ms(self) -> list[float]:
        """Milliseconds between tokens."""
        return [1e3 * (b - a) for a, b in zip(self.arrivals, self.arrivals[1:], strict=False)]


@dataclass(frozen=True)
class Load:
    """Every stream's prompt and answer, in tokens."""

    prompt: int
    answer: int
    vocab: int

    def request(self, number: int) -> pb.GenerateRequest:
        """A greedy request with a prompt of its own, which ends after `answer` tokens and not before."""
        ids = random.Random(number).choices(range(self.vocab), k=self.prompt)  # noqa: S311 - no secret
        return pb.GenerateRequest(
            token_ids=pb.TokenIds(ids=ids),
            sampling=pb.SamplingOptions(temperature=0.0),
            stopping=pb.StopOptions(max_tokens=self.answer, ignore_eos=True),
        )


def concurrency(
    model: str | None = None,
    /,
    *,
    streams: str = "1,2,4,8,16",
    prompt_tokens: int = 64,
    max_tokens: int = 64,
    json_output: Annotated[bool, Parameter(name="--json", negative=())] = False,
    placement: Placement = ANYWHERE,
    connection: Connection = DEFAULT,
) -> int:
    """Measure how a server shares its speed among 1, 2, 4, 8 and 16 streams.

    All streams of a row start together, each with a random prompt of its own. Shown are the tokens a
    second of all together, from the start to the last token, prompts included; the same only while all
    of them answer, from when the last has begun to when the first is done; and, in milliseconds,
    the time to the first token (TTFT) and from token to token (ITL). Tokens that come in one message
    share the time since the one before.

    Parameters
    ----------
    model
        A GGUF file, for which a server is started that ends with the measurement.
    streams
        Numbers of streams, with commas between.
    prompt_tokens
        Tokens of each prompt.
    max_tokens
        Tokens of each answer.
    json_output
        Print one JSON object a line instead of the table.
    placement
        Where the model runs.
    connection
        How a server is reached that runs already. Streams beyond its --parallel queue.

    """
    with one_line_errors():
        counts = _counts(streams)
        for flag, value in (("--prompt-tokens", prompt_tokens), ("--max-tokens", max_tokens)):
            if value < 1:
                raise InputError(f"{flag} {value} is not possible: give at least 1")
        with (
            _server(model, connection, max(counts), prompt_tokens + max_tokens, placement) as client,
        ):
            load, number = Load(prompt_tokens, max_tokens, client.model().vocab_size), 1
            if not json_output:
                print(_COLUMNS.format(*_HEAD), flush=True)
            drive(client, [Load(prompt_tokens, min(max_tokens, _WARM_UP_TOKENS), load.vocab).request(0)])
            for count in counts:
                # No two prompts of a run are the same: what a server has cached helps none.
                values = summary(drive(client, [load.request(number + i) for i in range(count)]))
                number += count
                print(json.dumps(values) if json_output else _row(values), flush=True)
    return 0


def _counts(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and 1 <= int(part) <= 256 for part in parts):
        raise InputError(f"--streams {text}: give numbers from 1 to 256 with commas between")
    return [int(part) for part in parts]


@contextmanager
def _server(
    model: str | None, connection: Connection, slots: int, context: int, placement: Placement
) -> Iterator[Client]:
    """A client of the server to measure."""
    named = connection.address not in (None, os.environ.get("NUMOE_ADDRESS"))
    if named if model else not connection.address:
        raise InputError("give either a model file or the --address of a server")
    if model is None:
        with connection.client() as client:
            yield client
        return
    from numoe.cluster.endpoint import ANY_PORT
    from numoe.deploy.launch import running_server
    from numoe.deploy.signals import StopSignals

    options = placement.plan_options(context=context, slots=slots)
    with StopSignals(), running_server(model, options, ANY_PORT) as server, Client(server.address) as client:
        yield client


def drive(client: Client, requests: Sequence[pb.GenerateRequest]) -> list[Stream]:
    """Send all requests at the same moment, and read their streams to the end."""
    together = threading.Barrier(len(requests))

    def read(request: pb.GenerateRequest) -> Stream:
        together.wait()
        stream = Stream(time.perf_counter())
        for response in client.generate(request):
            if count := len(response.tokens.token_ids):
                now, since = time.perf_counter(), stream.arrivals[-1] if stream.arrivals else None
                step = 0.0 if since is None else (now - since) / count
                stream.arrivals += [now - step * left for left in range(count - 1, -1, -1)]
        if not stream.arrivals:
            raise NumoeError(f"{client.address} ended a stream without a token")
        return stream

    with ThreadPoolExecutor(len(requests), thread_name_prefix="numoe-stream") as pool:
        try:
            return list(pool.map(read, requests))
        except BaseException:
            client.close()  # ends the other streams, which the pool would wait for
            raise


def summary(streams: Sequence[Stream]) -> dict[str, Any]:
    """What one row shows: times in milliseconds, speeds in tokens a second."""
    tokens = sum(len(stream.arrivals) for stream in streams)
    seconds = max(stream.arrivals[-1] for stream in streams) - min(stream.start for stream in streams)
    firsts = [stream.first_ms for stream in streams]
    gaps = [gap for stream in streams for gap in stream.gaps_ms]
    return {
        "streams": len(streams),
        "tokens": tokens,
        "seconds": seconds,
        "speed": tokens / seconds,
        "speed_of_all": _speed_of_all(streams),
        "first_ms_p50": percentile(firsts, 50),
        "first_ms_p99": percentile(firsts, 99),
        "between_ms_p50": percentile(gaps, 50),
        "between_ms_p99": percentile(gaps, 99),
    }


def _speed_of_all(streams: Sequence[Stream]) -> float | None:
    """Tokens a second while every stream answers; None if there is no such time."""
    begin, end = max(stream.arrivals[0] for stream in streams), min(stream.arrivals[-1] for stream in streams)
    if begin >= end:
        return None
    return sum(begin < arrival <= end for stream in streams for arrival in stream.arrivals) / (end - begin)


def percentile(values: Sequence[float], percent: int) -> float | None:
    """A percentile, interpolated between neighbours; None of nothing."""
    if len(values) < 2:
        return values[0] if values else None
    return quantiles(values, n=100, method="inclusive")[percent - 1]


def _row(values: dict[str, Any]) -> str:
    times = ("first_ms_p50", "first_ms_p99", "between_ms_p50", "between_ms_p99")
    return _COLUMNS.format(
        values["streams"], values["tokens"], f"{values['seconds']:.2f}", f"{values['speed']:.2f}",
        "-" if values["speed_of_all"] is None else f"{values['speed_of_all']:.2f}",
        *("-" if values[name] is None else f"{values[name]:.1f}" for name in times),
    )  # fmt: skip
