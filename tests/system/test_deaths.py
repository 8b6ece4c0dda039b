"""Any actor may die or hang at any moment: what its clients see, and what is left of it."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import psutil
import pytest

from numoe.deploy.client import Client
from numoe.v1 import admin_pb2
from tests.models import make_model
from tests.system.harness import ServeProcess, numoe
from tests.system.streams import STREAMS, Streams, Told, varied

KILL, STOP, TERM = signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM
FLAGS = ("--parallel", STREAMS + 2, "--shards", 2, "--chunk", 32, "--ctx-size", 2048)


@pytest.fixture(scope="module")
def lasting(tiny_model: Path) -> Iterator[ServeProcess]:
    """A server that sees many deaths; at last its supervisor's, twice while it is stopped: it ends all the same."""
    server = ServeProcess(tiny_model, *FLAGS)
    yield server
    streams = Streams(server.address, [varied(number, 900) for number in range(STREAMS)])
    streams.started(STREAMS)
    strike(server, "supervisor", KILL)
    with ThreadPoolExecutor() as pool:
        stopping = pool.submit(numoe, "stop", "--address", server.address)
        while (supervisor := actors(server, "supervisor")[0])["state"] != "draining":
            assert not stopping.done(), "answers were too short"
        os.kill(supervisor["pid"], KILL)
        result = stopping.result()
    assert result.returncode == 0, result.stderr
    assert [told.error for told in streams.join()] == [None] * STREAMS, "they had the time that they were given"
    code, errors = server.stop()
    assert code == 0, errors
    assert "numoe: supervisor (pid " in errors
    assert "A worker died" not in errors, "of each death one line is enough"
    assert server.output == "", "what there is to say of deaths is said elsewhere"
    assert server.left_over() == []


@pytest.fixture(scope="module")
def undisturbed(lasting: ServeProcess) -> list[Told]:
    """What every stream is told where nobody dies."""
    told = Streams(lasting.address, [varied(number) for number in range(STREAMS)]).join()
    assert all(len(stream.token_ids) == 500 for stream in told)
    return told


def actors(server: ServeProcess, role: str) -> list[dict]:
    return [actor for actor in server.status()["actors"] if actor["role"] == role]


def strike(server: ServeProcess, role: str, number: int) -> dict:
    """Send a signal to the first actor of a role; what status said of it."""
    victim = actors(server, role)[0]
    os.kill(victim["pid"], number)
    return victim


def wait_replaced(server: ServeProcess, victim: dict) -> dict:
    """Wait until another process runs in the place of a dead one; what status says of it."""
    for _ in range(300):
        found = [actor for actor in actors(server, victim["role"]) if actor["restarts"] > victim["restarts"]]
        if found and found[0]["state"] == "running":
            assert found[0]["pid"] != victim["pid"]
            assert not psutil.pid_exists(victim["pid"])
            server.pids.add(found[0]["pid"])
            return found[0]
        time.sleep(0.1)
    raise AssertionError(f"{victim} was not replaced: {server.status()['actors']}")


@pytest.mark.parametrize(
    ("role", "number"),
    [
        ("expert", KILL), ("expert", STOP), ("expert", TERM), ("attention", KILL), ("attention", STOP),
        ("supervisor", STOP),
    ],
    ids=[
        "expert killed", "expert stopped", "expert terminated", "attention killed", "attention stopped",
        "supervisor stopped",
    ],
)  # fmt: skip
def test_streams_go_on_as_if_nothing_had_happened(
    lasting: ServeProcess, undisturbed: list[Told], role: str, number: int
) -> None:
    streams = Streams(lasting.address, [varied(number) for number in range(STREAMS)])
    streams.started(STREAMS)
    victim = strike(lasting, role, number)
    told = streams.join()
    assert [stream.error for stream in told] == [None] * STREAMS
    assert [stream.answer for stream in told] == [stream.answer for stream in undisturbed]
    assert [stream.starts for stream in told] == [1] * STREAMS
    wait_replaced(lasting, victim)


def test_the_queue_outlives_the_worker(lasting: ServeProcess, undisturbed: list[Told]) -> None:
    """All slots are taken and others wait; they begin in the order in which they came, one after the other."""
    waiting: dict[int, Streams] = {}
    with Client(lasting.address) as client:
        victim = next(actor.pid for actor in client.status().actors if actor.role == admin_pb2.ACTOR_ROLE_ATTENTION)
        running = Streams(lasting.address, [varied(number, 900 + 50 * number) for number in range(STREAMS + 2)])
        running.started(STREAMS + 2)
        for number in (1, 4, 7, 5, 3):
            waiting[number] = Streams(lasting.address, [varied(number, 75)])
            while client.status().queue.queued < len(waiting):
                assert all(told.finished is None for told in running.told), "they were too short"
    os.kill(victim, KILL)
    for told, want in zip(running.join(), undisturbed, strict=False):
        assert told.error is None
        assert told.token_ids[:500] == want.token_ids[: len(told.token_ids)]
    for number, stream in waiting.items():
        told = stream.join()[0]
        assert told.error is None
        assert told.token_ids == undisturbed[number].token_ids[:75]
    begins = [stream.begun[0] for stream in waiting.values()]
    assert begins == sorted(begins)


def test_a_gateways_clients_may_try_again_at_the_same_address(lasting: ServeProcess, undisturbed: list[Told]) -> None:
    requests = [varied(number) for number in range(STREAMS)]
    before = lasting.status()["actors"]  # not while they run: they might end meanwhile
    victim = next(actor for actor in before if actor["role"] == "gateway")
    streams = Streams(lasting.address, [varied(number, 1900) for number in range(STREAMS)])
    streams.started(STREAMS)
    os.kill(victim["pid"], KILL)
    cut = [stream.error for stream in streams.join() if stream.finished is None]
    assert cut, "answers were too short"
    assert set(cut) == {grpc.StatusCode.UNAVAILABLE}
    while True:
        again = Streams(lasting.address, requests).join()
        if grpc.StatusCode.UNAVAILABLE not in {stream.error for stream in again}:
            break
    assert [stream.answer for stream in again] == [stream.answer for stream in undisturbed]
    wait_replaced(lasting, victim)
    status = lasting.status()
    pids = [[actor["pid"] for actor in found if actor["role"] != "gateway"] for found in (before, status["actors"])]
    assert pids[0] == pids[1], "everybody else is still there"
    assert all(slot["state"] == "idle" for slot in status["slots"])


def test_three_deaths_at_once(lasting: ServeProcess, undisturbed: list[Told]) -> None:
    found = {actor["role"]: actor for actor in lasting.status()["actors"]}
    streams = Streams(lasting.address, [varied(number) for number in range(STREAMS)])
    streams.started(STREAMS)
    for role in ("expert", "attention", "supervisor"):
        os.kill(found[role]["pid"], KILL)
    assert [stream.answer for stream in streams.join()] == [stream.answer for stream in undisturbed]
    for role in ("expert", "attention"):
        wait_replaced(lasting, found[role])


def test_everybody_but_the_shards_dies_at_once(lasting: ServeProcess, undisturbed: list[Told]) -> None:
    found = {actor["role"]: actor for actor in lasting.status()["actors"]}
    for role in ("gateway", "attention", "supervisor"):
        os.kill(found[role]["pid"], KILL)
    while True:
        told = Streams(lasting.address, [varied(number) for number in range(STREAMS)]).join()
        if {stream.error for stream in told} == {None}:
            break
        assert lasting.process.poll() is None, "the server has ended"
    assert [stream.answer for stream in told] == [stream.answer for stream in undisturbed]
    for role in ("gateway", "attention"):
        wait_replaced(lasting, found[role])


def test_a_server_whose_actor_cannot_be_replaced_says_so_and_ends(tmp_path: Path) -> None:
    model = make_model(tmp_path / "gone.gguf", "qwen3moe", experts_type="Q8_0", attn_type="Q8_0")
    server = ServeProcess(model, "--shards", 2)
    model.unlink()
    victim = strike(server, "expert", KILL)
    server.process.wait(60)
    code, errors = server.stop()
    assert code == 1
    assert str(victim["pid"]) in errors
    assert "gone.gguf" in errors
    assert server.left_over() == []


def test_without_rays_head_streams_go_on_until_the_server_ends_and_nothing_is_left(
    tiny_model: Path, undisturbed: list[Told], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray would end every process of a cluster whose head is gone after this time, 60 s by default, on the spot."""
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "14")
    server = ServeProcess(tiny_model, *FLAGS)
    streams = Streams(server.address, [varied(number, 100) for number in range(STREAMS)])
    streams.started(STREAMS)
    head = next(p for p in psutil.Process(server.process.pid).children() if p.name() == "gcs_server")
    head.kill()
    assert [told.token_ids for told in streams.join()] == [want.token_ids[:100] for want in undisturbed]
    serve = psutil.Process(server.process.pid)
    before = serve.cpu_times().user
    time.sleep(2.0)
    assert serve.cpu_times().user - before < 1.0, "whoever waits for the head leaves the processors to others"
    server.process.wait(60)
    code, errors = server.stop()
    assert code == 1
    assert re.search(r"Ray's head at \S+ does not answer: streams go on", errors)
    assert "has not answered for 10 s; without it the server cannot go on: start the server again" in errors
    assert server.left_over() == []
