"""`numoe bench chaos`: kills and stops a server's processes at random, and checks that no stream shows it."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from numoe.deploy.commands.bench.concurrency import percentile
from numoe.deploy.commands.placement import ANYWHERE, Placement
from numoe.deploy.console import one_line_errors
from numoe.engine.errors import InputError, NumoeError, UnavailableError
from numoe.v1 import generation_pb2 as pb

if TYPE_CHECKING:
    from numoe.deploy.cluster import Server
    from numoe.deploy.commands.bench.repeats import Repeats
    from numoe.deploy.commands.bench.strikes import Strike

_PROMPT = "Tell the story number {} again, from its very beginning and with every detail."
_PROMPT_TOKENS = 256  # more than it has
_PROMISED_S = 3.0
"""No stream should pause for longer after one strike."""


def chaos(
    model: str,
    /,
    *,
    minutes: float = 1.0,
    seed: int = 0,
    streams: int = 8,
    max_tokens: int = 400,
    calm: float = 1.0,
    json_output: Annotated[bool, Parameter(name="--json", negative=())] = False,
    placement: Placement = ANYWHERE,
) -> int:
    """Kill and stop the processes of a server at random while streams run; exit code 1 if that can be seen.

    A server is started, and the answers of all streams are recorded undisturbed. Then they are asked for
    again and again, while SIGKILL or SIGSTOP hits one process after the other: shards, the attention worker,
    the gateway, the supervisor. Every answer must be the recorded one, token by token and in its text. Only a struck
    gateway may end a stream, as UNAVAILABLE, and only one that was under way or that began before another gateway
    answered, 20 s later at most; then it is asked for again. Before and after the strikes the server may have no
    process, file or waiter that is not its own, and after its end nothing may be left of it.

    Every fifth strike is alone: all processes run before it, and no other follows for 6 s. The pauses after these
    are reported apart.

    Parameters
    ----------
    model
        A GGUF file.
    minutes
        How long the strikes go on; there are about 22 a minute.
    seed
        Of the choice of processes, signals and moments.
    streams
        Streams at once; every other one is sampled.
    max_tokens
        Tokens of each answer.
    calm
        Seconds for which all processes run undisturbed before a strike that is alone. Some seconds later
        spare processes wait to take the place of others.
    json_output
        Print one JSON object instead of the table.
    placement
        Where the model runs.

    """
    from numoe.cluster.endpoint import ANY_PORT
    from numoe.deploy.commands.bench.repeats import CALM_DEADLINE_S, Absences, Repeats, ask
    from numoe.deploy.commands.bench.strikes import Strike, Victims, strike_at_random
    from numoe.deploy.launch import running_server
    from numoe.deploy.signals import StopSignals

    with one_line_errors():
        given = {"--minutes": minutes, "--streams": streams, "--max-tokens": max_tokens, "--calm": calm}
        for flag, value in given.items():
            if value <= 0:
                raise InputError(f"{flag} {value} is not possible: give more than 0")
        options = placement.plan_options(context=_PROMPT_TOKENS + max_tokens, slots=streams)
        with StopSignals(), running_server(model, options, ANY_PORT) as server, _watched(server) as down:
            victims, strikes = Victims(server.instance, server.plan), list[Strike]()
            requests, absences = [_request(number, max_tokens) for number in range(streams)], Absences(strikes)
            with ThreadPoolExecutor(streams, "numoe-chaos") as pool:
                start = time.monotonic()
                undisturbed = list(pool.map(lambda asked: ask(server.address, asked, CALM_DEADLINE_S)[0], requests))
                calm_s = time.monotonic() - start
                left = [f"before any strike: {what}" for what in victims.strays()]
                pairs = zip(requests, undisturbed, strict=True)
                repeats = [Repeats(server.address, *pair, calm_s, absences, down) for pair in pairs]
                readers = [pool.submit(each.run) for each in repeats]
                strike_at_random(victims, strikes, seed, time.monotonic() + 60 * minutes, down, calm_s=calm)
                for each in repeats:
                    each.done = True
                for reader in readers:
                    reader.result()
            if not down.is_set():
                left += victims.strays()
                server.close()
            left += victims.left_over()  # now: the end of Ray takes with it what should have ended before
        report = _report(strikes, repeats, left)
        print(json.dumps(report) if json_output else _text(report), flush=True)
    return 1 if report["wrong"] or report["left"] else 0


def _request(number: int, max_tokens: int) -> pb.GenerateRequest:
    sampling = pb.SamplingOptions(temperature=0.0)
    if number % 2:
        sampling = pb.SamplingOptions(temperature=0.9, top_p=0.95, seed=number, repetition_penalty=1.1)
    stopping = pb.StopOptions(max_tokens=max_tokens, ignore_eos=True)
    return pb.GenerateRequest(text=_PROMPT.format(number), sampling=sampling, stopping=stopping)


@contextmanager
def _watched(server: Server) -> Iterator[threading.Event]:
    """Watch the supervisor, as `numoe serve` does; the event is set when the server is down.

    Raises UnavailableError at the end if it was down before.
    """
    stop, down, why = threading.Event(), threading.Event(), list[str]()

    def watch() -> None:
        try:
            why.append(server.wait(stop))
        except NumoeError as error:
            why.append(str(error))
        down.set()

    thread = threading.Thread(target=watch, name="numoe-wait")
    thread.start()
    try:
        yield down
    finally:
        stop.set()
        thread.join()
    if why[0]:
        raise UnavailableError(why[0])


def _report(strikes: Sequence[Strike], repeats: Sequence[Repeats], left: list[str]) -> dict[str, Any]:
    """What came of it. A pause counts for the first strike in it; that of a lost stream ends when it is there again."""
    pauses: dict[str, list[float]] = {}
    alone: dict[str, list[float]] = {}
    for pause in (pause for each in repeats for pause in each.pauses):
        if cause := pause.cause(strikes):
            pauses.setdefault(cause.role, []).append(pause.seconds)
            if cause.alone:
                alone.setdefault(cause.role, []).append(pause.seconds)
    roles = sorted({strike.role for strike in strikes})
    count = Counter((strike.role, strike.how) for strike in strikes)
    return {
        "strikes": len(strikes),
        "roles": {
            role: {
                "killed": count[role, "kill"], "stopped": count[role, "stop"],
                **_percentiles(pauses.get(role, [])),
                "alone": {
                    "strikes": sum(strike.alone for strike in strikes if strike.role == role),
                    **_percentiles(alone.get(role, [])),
                    "pauses_above_3_s": sum(seconds > _PROMISED_S for seconds in alone.get(role, [])),
                },
            }
            for role in roles
        },
        "equal": sum(each.equal for each in repeats),
        "lost_with_gateway": sum(each.lost for each in repeats),
        "wrong": [what for each in repeats for what in each.wrong],
        "left": left,
    }  # fmt: skip


def _percentiles(seconds: list[float]) -> dict[str, float | None]:
    return {
        "pause_s_p50": percentile(seconds, 50),
        "pause_s_p99": percentile(seconds, 99),
        "pause_s_max": max(seconds, default=None),
    }


def _text(report: dict[str, Any]) -> str:
    row = "|{:>11} |{:>7} |{:>8} |{:>7} |{:>7} |{:>8} |{:>6} |{:>7} |{:>8} |{:>6} |"
    names = ("process", "killed", "stopped", "p50", "p99", "longest", "alone", "p50", "longest", "> 3 s")
    lines = ["pauses of streams, after all strikes and after those that were alone", row.format(*names)]
    for role, of in report["roles"].items():
        alone = of["alone"]
        times = (_seconds(of[f"pause_s_{name}"]) for name in ("p50", "p99", "max"))
        alone_times = (_seconds(alone[f"pause_s_{name}"]) for name in ("p50", "max"))
        counts = alone["strikes"], *alone_times, alone["pauses_above_3_s"]
        lines.append(row.format(role, of["killed"], of["stopped"], *times, *counts))
    lines.append(
        f"{report['strikes']} strikes; {report['equal']} answers as undisturbed, {len(report['wrong'])} not; "
        f"{report['lost_with_gateway']} streams ended with their gateway, and were asked for again"
    )
    return "\n".join([*lines, *report["wrong"][:10], *(f"left over: {what}" for what in report["left"])])


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} s"
