"""Keys and values outlive the attention worker: whoever takes its place computes nothing a second time."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from numoe.deploy.client import Client
from numoe.v1 import generation_pb2 as pb
from tests.system.harness import ServeProcess
from tests.system.streams import Streams, Told
from tests.system.test_deaths import actors, strike, wait_replaced
from tests.system.test_slots import answer

PROMPT_TOKENS, ANSWER_TOKENS = 900, 500
CHUNK = 32


@pytest.fixture(scope="module")
def server(tiny_model: Path) -> Iterator[ServeProcess]:
    """A server without any prompt cache beyond its pages."""
    flags = ("--parallel", 4, "--shards", 2, "--chunk", CHUNK, "--ctx-size", 2048, "--cache-ram", 0)
    server = ServeProcess(tiny_model, *flags)
    yield server
    server.stop()
    assert server.left_over() == []


def request(number: int) -> pb.GenerateRequest:
    """A long prompt of its own, every other one in a way that leaves nothing for others."""
    sampling = pb.SamplingOptions(temperature=0.0 if number < 2 else 0.8, seed=number)
    stopping = pb.StopOptions(max_tokens=ANSWER_TOKENS, ignore_eos=True)
    text = f"{number} is the number of this one. " + "so it goes on. " * (PROMPT_TOKENS // 15)
    cache = pb.CacheOptions(bypass=bool(number % 2))
    return pb.GenerateRequest(text=text, sampling=sampling, stopping=stopping, cache=cache)


@pytest.fixture(scope="module")
def undisturbed(server: ServeProcess) -> list[Told]:
    return Streams(server.address, [request(number) for number in range(4)]).join()


def steps(server: ServeProcess) -> int:
    """Of the worker that there is now."""
    count: int = server.status()["step"]["steps"]
    return count


@pytest.mark.parametrize("with_supervisor", [False, True], ids=["alone", "after its supervisor"])
def test_a_successor_goes_on_with_the_very_pages(
    server: ServeProcess, undisturbed: list[Told], *, with_supervisor: bool
) -> None:
    if with_supervisor:  # the next one does not have the memory yet, and gets it from the worker
        wait_replaced(server, strike(server, "supervisor", signal.SIGKILL))
    streams = Streams(server.address, [request(number) for number in range(4)])
    streams.started(4)
    victim = strike(server, "attention", signal.SIGKILL)
    told = streams.join()
    assert [stream.error for stream in told] == [None] * 4
    assert [stream.answer for stream in told] == [stream.answer for stream in undisturbed]
    wait_replaced(server, victim)
    assert 0 < steps(server) < ANSWER_TOKENS, "one for each token of the answers, and none for the prompts"


def test_the_next_prompt_finds_what_was_cached_when_the_worker_died(server: ServeProcess) -> None:
    ask = ("so it was. " * 80, "--max-tokens", 1)
    server.generate(*ask)
    wait_replaced(server, strike(server, "attention", signal.SIGKILL))
    assert server.generate(*ask)["cached_tokens"] >= 768


def test_slots_keep_their_conversations(server: ServeProcess) -> None:
    told = [number % 200 + 5 for number in range(300)]
    with Client(server.address) as client:
        said = [*told, *answer(client, told, slot_id=3).token_ids]
        before = server.status()["slots"][3]
        wait_replaced(server, strike(server, "attention", signal.SIGKILL))
        assert server.status()["slots"][3] == before
        assert answer(client, [*said, 7], 1, slot_id=3).cached_tokens == before["computed"] == len(said) - 1


def test_after_two_deaths_at_its_start_a_worker_begins_afresh(server: ServeProcess, undisturbed: list[Told]) -> None:
    streams = Streams(server.address, [request(number) for number in range(4)])
    streams.started(4)
    victim, first = strike(server, "attention", signal.SIGKILL), 0
    for _ in range(2):
        while (pid := actors(server, "attention")[0]["pid"]) in (0, victim["pid"], first):
            pass
        os.kill(pid, signal.SIGKILL)
        first = pid
    told = streams.join()
    assert [stream.answer for stream in told] == [stream.answer for stream in undisturbed]
