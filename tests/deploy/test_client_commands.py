"""numoe generate, status and stop against a gateway with a scripted worker."""

import asyncio
import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import pytest

from numoe.deploy.client import Client
from numoe.engine.errors import InputError, ResourceError, UnavailableError
from numoe.v1 import generation_pb2 as pb
from tests.actors.gateway.harness import Gateway, serving

APP = """
from cyclopts import App
from numoe.deploy.commands.generate import generate
from numoe.deploy.commands.slots import slots
from numoe.deploy.commands.status import status
from numoe.deploy.commands.stop import stop
app = App(name="numoe")
for command in (generate, slots, status, stop):
    app.command(command)
app()
"""


class Background:
    """A gateway in a thread, as the commands block."""

    def __init__(self, gateway: Gateway, loop: asyncio.AbstractEventLoop) -> None:
        self.gateway, self.loop, self.engine = gateway, loop, gateway.engine
        self.address = gateway.server.address

    def run(self, *arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
        return numoe(*arguments, "--address", self.address, text=text)


@contextmanager
def background(**script: Any) -> Iterator[Background]:
    started, holder, loop = threading.Event(), list[Background](), asyncio.new_event_loop()
    done = asyncio.Event()

    async def serve() -> None:
        async with serving(**script) as gateway:
            holder.append(Background(gateway, loop))
            started.set()
            await done.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    assert started.wait(10)
    try:
        yield holder[0]
    finally:
        loop.call_soon_threadsafe(done.set)
        thread.join(10)
        loop.close()


def numoe(*arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", APP, *arguments]
    return subprocess.run(command, input=text, capture_output=True, text=True, timeout=30, check=False)


def test_generate_prints_the_text() -> None:
    with background(tokens=list("hé😀\n".encode())) as server:
        done = server.run("generate", "The capital", "--max-tokens", "9", "--temperature", "0", "--seed", "7")
        assert (done.stdout, done.stderr, done.returncode) == ("hé😀\n\n", "", 0)
        request = server.engine.requests[0]
        assert bytes(request.token_ids[1:]) == b"The capital"
        assert (request.max_tokens, request.sampling.temperature, request.sampling.seed) == (9, 0.0, 7)


def test_generate_json_is_one_object() -> None:
    with background(cached=2) as server:
        done = server.run("generate", "prompt", "--json", "--logprobs", "1", "--stop", "no", "--stop", "lo")
        answer = json.loads(done.stdout)
        assert (answer["text"], bytes(answer["token_ids"]), answer["finish_reason"]) == (
            "hel",
            b"hel",
            "stop",
        )
        assert (answer["prompt_tokens"], answer["cached_tokens"], answer["stop_string"]) == (7, 2, "lo")
        assert answer["timings"].keys() == {
            *("queued", "prefill", "decode", "total", "prompt_ms_per_token", "decode_ms_per_token")
        }
        assert [len(entry["top"]) for entry in answer["logprobs"]] == [1, 1, 1]


def test_generate_chat_reads_standard_input() -> None:
    with background() as server:
        server.run("generate", "-", "--system", "Be brief.", text="héllo")
        assert bytes(server.engine.requests[0].token_ids).decode() == (
            "system: Be brief.\nuser: héllo\nassistant: "
        )


def test_ctrl_c_aborts_the_request_and_exits_130() -> None:
    with background(reason=None) as server:
        command = [sys.executable, "-c", APP, "generate", "hi", "--address", server.address]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.read(5) == b"hello"
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=10)
        assert (process.returncode, errors) == (130, b"")
        end = time.monotonic() + 5
        while not server.engine.aborted and time.monotonic() < end:
            time.sleep(0.01)
        assert server.engine.aborted


def test_status_shows_the_server() -> None:
    with background() as server:
        values = json.loads(server.run("status", "--json").stdout)
        assert values["actors"][1] == {
            "role": "expert",
            "pid": 2,
            "host": "box",
            "numa_node": 0,
            "state": "restarting",
            "restarts": 3,
            "placement": {
                "nodes": [0],
                "weight_bytes": 3_000_000_000,
                "memory": "hugetlbfs",
                "on_nodes": 0.995,
                "huge_pages": 1.0,
                "cpus": [0, 1, 2, 5],
                "ran_on": [0, 1, 2, 5],
                "read_bytes_per_second": 40e9,
                "bandwidth_share": 0.8,
                "problem": "they lie elsewhere: move them",
            },
        }
        assert values["actors"][0]["placement"] is None
        assert values["actors"][0]["numa_node"] is None
        assert (values["state"], values["model"]["name"]) == ("serving", "tiny")
        assert values["slots"][0].items() >= {"slot": 0, "state": "decode", "request_id": "a", "tokens": 7}.items()
        assert values["cache"]["hits"] == {"pages": 5, "ram": 4, "store": 3}
        assert values["queue"] == {"queued": 2, "limit": 64, "streams": 0}
        shown = server.run("status")
        assert shown.returncode == 0
        for word in ("hugetlbfs", "0-2,5", "40.0", "80 %", "they lie elsewhere"):
            assert word in shown.stdout
        for word in ("gateway", "expert", "restarting", "tiny", "decode", "s3://bucket/prefix", "it is full", "chat"):
            assert word in shown.stdout


def test_stop_waits_until_the_server_is_gone() -> None:
    with background() as server:

        async def shutdown(deadline_s: float, *, keep_weights: bool) -> None:
            server.engine.shutdowns.append(deadline_s)
            server.loop.call_later(0.5, lambda: server.loop.create_task(server.gateway.server.stop(0)))

        server.engine.shutdown = shutdown  # type: ignore[method-assign]
        done = server.run("stop", "--timeout", "3")
        warning = "numoe: the store is not used, conversations may be lost: it is full\n"
        assert (done.returncode, done.stderr) == (0, warning)
        assert server.engine.shutdowns == [3.0]
        assert numoe("status", "--address", server.address).returncode == 1


@pytest.mark.parametrize("seconds", ["-1", "nan", "inf", "86401"])
def test_stop_refuses_a_timeout_that_is_none(seconds: str) -> None:
    done = numoe("stop", "--timeout", seconds, "--address", "127.0.0.1:1")
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"numoe: --timeout .*seconds from 0 to 86400\n", done.stderr)


@pytest.mark.parametrize("command", [["generate", "hi"], ["status"], ["stop"]])
def test_an_unreachable_server_is_one_line_with_the_cure(command: list[str]) -> None:
    done = numoe(*command, "--address", "127.0.0.1:1")
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"numoe: no numoe server answers at 127\.0\.0\.1:1: .*numoe serve.*\n", done.stderr)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--address", "nonsense"], "HOST:PORT"),
        (["--top-k", "-1"], "--top-k -1"),
        (["--top-p", "7"], "sampling.top_p"),
        (["--max-tokens", "0"], "stopping.max_tokens"),
    ],
)
def test_bad_values_are_one_line(arguments: list[str], message: str) -> None:
    with background() as server:
        address = [] if "--address" in arguments else ["--address", server.address]
        done = numoe("generate", "hi", *arguments, *address)
        assert (done.returncode, done.stdout) == (1, "")
        assert message in done.stderr
        assert done.stderr.count("\n") == 1


def test_the_client_explains_what_the_server_refused() -> None:
    with (
        background(submit_error=ResourceError("the queue is full")) as server,
        Client(server.address) as client,
    ):
        assert client.model().name == "tiny"
        with pytest.raises(ResourceError, match="the queue is full"):
            list(client.generate(pb.GenerateRequest(text="a")))
        with pytest.raises(InputError, match="text: is empty"):
            list(client.generate(pb.GenerateRequest(text="")))


def test_the_client_says_when_a_server_is_still_loading() -> None:
    with (
        background(ready=False) as server,
        Client(server.address) as client,
        pytest.raises(UnavailableError, match="not ready"),
    ):
        list(client.generate(pb.GenerateRequest(text="a")))


def test_the_client_imports_fast_and_alone() -> None:
    script = "import sys, numoe.deploy.commands.generate; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not {"ray", "numba", "numpy", "tokenizers", "rich.table"} & set(done.stdout.split())


class Cut(grpc.RpcError):
    """What gRPC raises when a connection ends: a call that yields `messages` before that."""

    def __init__(self, *messages: str) -> None:
        self.messages, self.cancelled = messages, False

    def __iter__(self) -> Iterator[str]:
        yield from self.messages
        raise self

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.UNAVAILABLE

    def details(self) -> str:
        return "Socket closed"

    def trailing_metadata(self) -> tuple[()]:
        return ()

    def cancel(self) -> None:
        self.cancelled = True


@pytest.mark.parametrize(("call", "told"), [(Cut(), "no numoe server answers"), (Cut("a", "b"), "in the middle")])
def test_a_server_that_goes_away_is_told_from_one_that_is_not_there(call: Cut, told: str) -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(UnavailableError, match=told):
        list(client._stream(call))
    assert call.cancelled
