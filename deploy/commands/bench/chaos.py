"""`numoe bench chaos`: kills and stops a server's processes at random, and checks that no stream shows it."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from numoe.deploy.answers import Answer
from numoe.deploy.client import Client
from numoe.deploy.commands.placement import ANYWHERE, Placement
from numoe.deploy.console import one_line_errors
from numoe.engine.errors import InputError, NumoeError, UnavailableError
from numoe.v1 import generation_pb2 as pb

if TYPE_CHECKING:
    from numoe.deploy.cluster import Server
    from numoe.deploy.commands.bench.strikes import Strike

_PROMPT = "Tell the story number {} again, from its very beginning and with every detail."
_PROMPT_TOKENS = 256  # more than it has
_RETRY_S = 0.1
_PAUSE_S = 0.3  # what counts as one
_GATEWAY_S = 60.0  # in which a struck one is there again


def chaos(
    model: str,
    /,
    *,
    minutes: float = 1.0,
    seed: int = 0,
    streams: int = 8,
    max_tokens: int = 400,
    json_output: Annotated[bool, Parameter(name="--json", negative=())] = False,
    placement: Placement = ANYWHERE,
) -> int:
    """Kill and stop the processes of a server at random while streams run; exit code 1 if that can be seen.

    A server is started, and the answers of all streams are recorded undisturbed. Then they are asked for
    again and again, while SIGKILL or SIGSTOP hits one process after the other: shards, the attention worker,
    the gateway, the supervisor. Every answer must be the recorded one, token by token. Only a killed gateway may
    end a stream, as UNAVAILABLE; then it is asked for again. At the end nothing may be left: no process, no shared
    memory, and in the mailbox no waiter that does not exist.

    Parameters
    ----------
    model
        A GGUF file.
    minutes
        How long the strikes go on; there are about 36 a minute.
    seed
        Of the choice of processes, signals and moments.
    streams
        Streams at once; every other one is sampled.
    max_tokens
        Tokens of each answer.
    json_output
        Print one JSON object instead of the table.
    placement
        Where the model runs.

    """
    from numoe.cluster.endpoint import ANY_PORT
    from numoe.deploy.commands.bench.strikes import Strike, Victims, strike_at_random
    from numoe.deploy.launch import running_server
    from numoe.deploy.signals import StopSignals

    with one_line_errors():
        for flag, value in (("--minutes", minutes), ("--streams", streams), ("--max-tokens", max_tokens)):
            if value <= 0:
                raise InputError(f"{flag} {value} is not possible: give more than 0")
        options = placement.plan_options(context=_PROMPT_TOKENS + max_tokens, slots=streams)
        with StopSignals(), running_server(model, options, ANY_PORT) as server, _watched(server) as down:
            victims, strikes = Victims(server.instance, server.plan), list[Strike]()
            victims.look()
            requests = [_request(number, max_tokens) for number in range(streams)]
            with ThreadPoolExecutor(streams, "numoe-chaos") as pool:
                want = list(pool.map(lambda request: _ask(server.address, request)[0].token_ids, requests))
                tries = [_Tries(server.address, *pair, strikes, down) for pair in zip(requests, want, strict=True)]
                readers = [pool.submit(each.repeat) for each in tries]
                strike_at_random(victims, strikes, seed, time.monotonic() + 60 * minutes, down)
                for each in tries:
                    each.done = True
                for reader in readers:
                    reader.result()
            victims.look()
            left = [] if down.is_set() else victims.waiters()
        report = _report(strikes, tries, left + victims.left_over())
        print(json.dumps(report) if json_output else _text(report), flush=True)
    return 1 if report["wrong"] or report["left"] else 0


def _request(number: int, max_tokens: int) -> pb.GenerateRequest:
    sampling = pb.SamplingOptions(temperature=0.0)
    if number % 2:
        sampling = pb.SamplingOptions(temperature=0.9, top_p=0.95, seed=number, repetition_penalty=1.1)
    stopping = pb.StopOptions(max_tokens=max_tokens, ignore_eos=True)
    return pb.GenerateRequest(text=_PROMPT.format(number), sampling=sampling, stopping=stopping)


def _ask(
    address: str, request: pb.GenerateRequest, since: float | None = None
) -> tuple[Answer, list[tuple[float, float]]]:
    """An answer, and its pauses: when each ended, `time.monotonic`, and its seconds.

    since: when the stream was lost that this one goes on for.
    """
    answer, pauses, last = Answer(), list[tuple[float, float]](), since or time.monotonic()
    with Client(address) as client:
        for response in client.generate(request):
            answer.add(response)
            now = time.monotonic()
            if now - last > _PAUSE_S:
                pauses.append((now, now - last))
            last = now
    return answer, pauses


class _Tries:
    """One stream, asked for again and again until it is `done`."""

    def __init__(
        self, address: str, request: pb.GenerateRequest, want: Sequence[int],
        strikes: list[Strike], down: threading.Event,
    ) -> None:  # fmt: skip
        self._address, self._request, self._want, self._strikes, self._down = address, request, want, strikes, down
        self.equal, self.lost, self.wrong = 0, 0, list[str]()
        self.pauses: list[tuple[float, float]] = []
        self.done = False

    def repeat(self) -> None:
        """Ask, and compare, at least once more when `done` is set, so that what was struck last is looked at, too."""
        last, lost_at = False, None
        while not (last or self._down.is_set()):
            last, start = self.done, time.monotonic()
            try:
                answer, pauses = _ask(self._address, self._request, lost_at)
            except NumoeError as error:
                if isinstance(error, UnavailableError) and self._gateway_was_struck(start):
                    self.lost += lost_at is None
                    last, lost_at = False, lost_at or time.monotonic()
                    time.sleep(_RETRY_S)
                else:
                    self.wrong.append(str(error))
            else:
                lost_at = None
                self.pauses += pauses
                if answer.token_ids == self._want:
                    self.equal += 1
                else:
                    self.wrong.append(_difference(answer.token_ids, self._want))

    def _gateway_was_struck(self, start: float) -> bool:
        return any(strike.role == "gateway" and strike.at > start - _GATEWAY_S for strike in list(self._strikes))


def _difference(found: Sequence[int], want: Sequence[int]) -> str:
    same = next((n for n, pair in enumerate(zip(found, want, strict=False)) if pair[0] != pair[1]), len(found))
    return f"of {len(found)} tokens the first {same} are those of the undisturbed answer of {len(want)}"


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


def _report(strikes: Sequence[Strike], tries: Sequence[_Tries], left: list[str]) -> dict[str, Any]:
    """A pause counts for the last strike before it ended; of a stream that was lost, until it was there again."""
    pauses: dict[str, list[float]] = {}
    for ended, seconds in (pause for each in tries for pause in each.pauses):
        before = [strike.role for strike in strikes if strike.at < ended]
        if before:
            pauses.setdefault(before[-1], []).append(seconds)
    roles = sorted({strike.role for strike in strikes})
    count = Counter((strike.role, strike.how) for strike in strikes)
    return {
        "strikes": len(strikes),
        "roles": {
            role: {
                "killed": count[role, "kill"], "stopped": count[role, "stop"],
                "pause_s_p50": median(pauses[role]) if role in pauses else None,
                "pause_s_max": max(pauses[role]) if role in pauses else None,
            }
            for role in roles
        },
        "equal": sum(each.equal for each in tries),
        "lost_with_gateway": sum(each.lost for each in tries),
        "wrong": [what for each in tries for what in each.wrong],
        "left": left,
    }  # fmt: skip


def _text(report: dict[str, Any]) -> str:
    row = "|{:>11} |{:>7} |{:>8} |{:>10} |{:>10} |"
    lines = [row.format("process", "killed", "stopped", "pause p50", "longest")]
    for role, of in report["roles"].items():
        times = ("-" if of[name] is None else f"{of[name]:.2f} s" for name in ("pause_s_p50", "pause_s_max"))
        lines.append(row.format(role, of["killed"], of["stopped"], *times))
    lines.append(
        f"{report['strikes']} strikes; {report['equal']} answers as undisturbed, {len(report['wrong'])} not; "
        f"{report['lost_with_gateway']} streams ended with their gateway, and were asked for again"
    )
    return "\n".join([*lines, *report["wrong"][:10], *(f"left over: {what}" for what in report["left"])])
