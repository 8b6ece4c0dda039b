"""Hostile requests leave the server healthy and its memory flat.

A few hundred of them by default; NUMOE_FUZZ=10000 sends as many, and NUMOE_FUZZ_LOG=FILE keeps what was measured.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hypothesis import HealthCheck, given, settings

from numoe.deploy.client import Client
from numoe.deploy.credentials import Credentials
from numoe.v1 import admin_pb2
from numoe.v1 import generation_pb2 as pb
from tests.certificates import write_tokens
from tests.system.harness import ServeProcess
from tests.system.hostile.attacks import METHODS, Target
from tests.system.hostile.strategies import attacks, good_request

EXAMPLES = int(os.environ.get("NUMOE_FUZZ", "300"))
EVERY = 50
GROWTH = 64 << 20
"""Between the medians of the first and the last quarter, of a process of 200 MB: what allocators keep, and no more."""
TOKEN = "fuzz-0123456789abcdef"


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tokens(tmp_path_factory.mktemp("tokens") / "tokens", TOKEN)


@pytest.fixture(scope="module")
def fuzzed(tiny_model: Path, tokens: str) -> Iterator[ServeProcess]:
    """A server that wants a token."""
    process = ServeProcess(tiny_model, "--ctx-size", 512, "--queue", 16, "--token-file", tokens)
    yield process
    process.stop()


class Watch:
    """Checks every now and then that the server is well, and what it holds."""

    def __init__(self, target: Target, pid: int) -> None:
        self._target, self._process = target, psutil.Process(pid)
        self._health = health_pb2_grpc.HealthStub(target.channel)
        self._expected = self._answer()
        self.sent = 0
        self.resident: list[int] = []
        self.files: list[int] = []

    def look(self) -> None:
        check = self._health.Check(health_pb2.HealthCheckRequest(), timeout=10)
        assert check.status == health_pb2.HealthCheckResponse.SERVING
        assert self._answer() == self._expected
        self.resident.append(self._process.memory_info().rss)
        self.files.append(self._process.num_fds())

    def count(self) -> None:
        self.sent += 1
        if self.sent % EVERY == 0:
            self.look()

    def _answer(self) -> list[int]:
        """A greedy answer, over a connection that has seen everything; it waits for what was left running."""
        for _ in range(100):
            call = self._target.call(METHODS[0], good_request("once upon", 8), self._target.metadata, 30)
            with contextlib.suppress(grpc.RpcError):
                replies = [pb.GenerateResponse.FromString(message) for message in call]
                return [token_id for reply in replies for token_id in reply.tokens.token_ids]
            if call.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                raise AssertionError(call)
            self._target.release()  # the queue was full
        raise AssertionError("the queue stays full")


@pytest.mark.filterwarnings("ignore:Generating overly large repr")
@pytest.mark.timeout(300 + EXAMPLES)
def test_hostile_requests_leave_the_server_healthy_and_its_memory_flat(fuzzed: ServeProcess, tokens: str) -> None:
    target = Target(fuzzed.address, TOKEN)
    with Client(fuzzed.address, Credentials(token_file=tokens)) as client:
        actors = client.status().actors
    watch = Watch(target, next(actor.pid for actor in actors if actor.role == admin_pb2.ACTOR_ROLE_GATEWAY))

    @settings(
        max_examples=EXAMPLES, deadline=None, database=None, derandomize=EXAMPLES <= 1000,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(attacks(TOKEN))
    def fuzz(attack: object) -> None:
        attack.send(target)  # type: ignore[attr-defined]
        watch.count()

    fuzz()
    target.release()
    watch.look()
    target.close()
    if log := os.environ.get("NUMOE_FUZZ_LOG"):
        Path(log).write_text(json.dumps({"sent": watch.sent, "resident": watch.resident, "files": watch.files}))
    quarter = max(1, len(watch.resident) // 4)
    assert watch.sent >= EXAMPLES
    assert median(watch.resident[-quarter:]) - median(watch.resident[:quarter]) <= GROWTH
    assert watch.files[-1] <= max(watch.files[:quarter]) + 8
