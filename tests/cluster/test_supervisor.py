"""What the supervisor does when it, or an actor, dies at the worst moment: without Ray, whose part `FakeRay` plays."""

from __future__ import annotations

import errno
import math
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import ray
from ray.exceptions import RayActorError

from numoe.cluster import assembly, heartbeats, supervisor
from numoe.cluster.bandwidth import Bandwidth, ReadSpeed
from numoe.cluster.endpoint import ANY_PORT
from numoe.cluster.member import ServerRecord
from numoe.cluster.status import ActorPlacement, ActorRole
from numoe.cluster.supervisor import Supervisor
from numoe.cluster.topology import NumaNode, Topology
from numoe.engine import shm
from tests.cluster.actors import FakeActor, FakeRay

PLAN: Any = SimpleNamespace(shards=(), slices={}, mailbox=None, files=())
INSTANCE = "unit"
ONE_NODE = Topology(nodes=(NumaNode(id=0, cores=((0,),), memory_bytes=1 << 30),))


STARTED: list[Supervisor] = []


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeRay]:
    """A Ray, and shared memory in a folder of the test's own."""
    found = FakeRay(monkeypatch)
    monkeypatch.setattr(shm, "ROOT", tmp_path / "shm")
    monkeypatch.setattr(supervisor, "Placing", lambda *_: found)
    monkeypatch.setattr(supervisor, "_LINGER_S", 0.05)
    for module in (assembly, supervisor):
        monkeypatch.setattr(module, "sweep_incomplete", lambda: None)
    yield found
    kill_supervisors()


def start(fake: FakeRay, *, again: bool = False) -> Supervisor:
    """A supervisor; `again` the one that Ray starts in a dead one's place."""
    kill_supervisors()
    fake.reconstructed = again
    found = Supervisor(INSTANCE, PLAN, None, ANY_PORT)  # type: ignore[arg-type]
    STARTED.append(found)
    if not again:
        found.launch()
    return found


def kill_supervisors() -> None:
    """Have those that run do nothing any more."""
    while STARTED:
        dead = STARTED.pop()
        dead._outcome.ended.set()
        dead._take_down = lambda _: None  # type: ignore[method-assign]
    join("numoe-watch")
    join("numoe-exit")


def join(name: str) -> None:
    """Wait for the end of all threads of this name."""
    for thread in threading.enumerate():
        if thread.name == name:
            wait_for(lambda thread=thread: thread.ident)  # one that is being started cannot be joined
            thread.join()


def record() -> ServerRecord:
    found = ServerRecord.load(shm.ROOT / INSTANCE)
    assert found is not None
    return found


def wait_for(condition: Any) -> None:
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until, "it does not come true"
        time.sleep(0.01)


def test_a_gateway_that_dies_while_it_comes_up_is_replaced_once(fake: FakeRay) -> None:
    """Two who replace it at once would each take the other's gateway for dead, or the port from it."""
    serving, most, lock, raised = 0, 0, threading.Lock(), threading.Event()

    def initialize(actor: FakeActor, *_: Any) -> str:
        nonlocal serving, most
        with lock:
            serving += 1
            most = max(most, serving)
        time.sleep(0.05)
        with lock:
            serving -= 1
        return "here:1"

    def serve(actor: FakeActor) -> None:
        if len(fake.of("gateway")) == 2:
            actor.die()
            time.sleep(1.0)  # longer than it takes to see that it has died
            raised.set()
            raise RayActorError

    fake.on["gateway"] = {"initialize": initialize, "serve": serve}
    running = start(fake)
    fake.of("gateway")[0].die()
    assert raised.wait(20)
    join("numoe-gateway")
    assert all(member.state == "running" for member in record().members)
    running.shutdown(0.0)
    assert running.wait() == ""
    assert len(fake.of("gateway")) == 3, "the first, the one that died, and one more"
    assert most == 1


def test_a_stop_goes_on_when_the_supervisor_dies_in_it(fake: FakeRay, monkeypatch: pytest.MonkeyPatch) -> None:
    freed: list[Path] = []
    monkeypatch.setattr(supervisor, "free_weights", freed.append)
    dead = threading.Event()
    fake.on["gateway"] = {"drain": lambda *_: dead.wait(20)}
    first = start(fake)
    first.shutdown(500.0, keep_weights=True)
    gateway = fake.of("gateway")[0]
    wait_for(lambda: gateway.called("drain"))
    assert record().phase == "draining"
    fake.on["gateway"]["drain"] = lambda *_: None
    second = start(fake, again=True)
    assert second.wait() == ""
    dead.set()
    (told_first,), (told_again,) = gateway.called("drain")
    assert 0 < told_again < told_first <= 500.0, "no more than what was left"
    assert freed == [], "as --keep-weights has asked for"
    assert not (shm.ROOT / INSTANCE).exists()


def test_a_supervisor_ends_itself_when_the_server_is_down(fake: FakeRay) -> None:
    """Whoever started the server may be gone."""
    running = start(fake)
    running.shutdown(0.0)
    assert running.wait() == ""
    join("numoe-exit")
    assert fake.killed == [f"supervisor-{INSTANCE}"]
    start(fake, again=True)
    join("numoe-exit")
    assert len(fake.killed) == 2, "so does one that Ray starts after that"


def test_told_to_stop_twice_the_earlier_end_counts_and_weights_stay(fake: FakeRay) -> None:
    ends = threading.Event()
    fake.on["gateway"] = {"drain": lambda *_: ends.wait(20)}
    running = start(fake)
    running.shutdown(5.0, keep_weights=True)
    until = record().drain_until
    running.shutdown(500.0)
    assert (record().drain_until, record().keep_weights) == (until, True)
    ends.set()
    assert running.wait() == ""


def test_no_connection_has_the_number_of_one_before(fake: FakeRay) -> None:
    """A supervisor that dies after it has connected two actors does not remember that it had, but the number."""
    numbers: list[int] = []

    def connect(actor: FakeActor, gateway: Any, number: int) -> None:
        if gateway is not None:
            assert record().connection == number, "saved before it is used"
            numbers.append(number)

    fake.on["attention"] = {"connect": connect}
    start(fake)
    msgspec.structs.replace(record(), joined=("", "")).save(shm.ROOT / INSTANCE)
    second = start(fake, again=True)
    wait_for(lambda: len(numbers) == 2)
    assert numbers == [1, 2]
    second.shutdown(0.0)
    assert second.wait() == ""


def test_a_gateway_is_told_to_serve_should_the_supervisor_have_died_before(fake: FakeRay) -> None:
    start(fake)
    second = start(fake, again=True)
    assert len(fake.of("gateway")[0].called("serve")) == 2
    second.shutdown(0.0)
    assert second.wait() == ""


@pytest.mark.parametrize("roles", [("gateway", "attention"), ("attention", "gateway"), ("gateway",), ("attention",)])
def test_who_dies_with_the_supervisor_is_replaced(fake: FakeRay, roles: tuple[ActorRole, ...]) -> None:
    """The supervisor before does not know of it: its record says that they run."""
    start(fake)
    kill_supervisors()
    for role in roles:
        fake.of(role)[0].die()
    second = start(fake, again=True)
    wait_for(lambda: all(member.state == "running" for member in record().members))
    for role in roles:
        join(f"numoe-{role}")
    wait_for(lambda: record().joined == tuple(fake.of(role)[-1].name for role in ("attention", "gateway")))
    restarts = {member.role: member.restarts for member in record().members}
    assert restarts == {role: int(role in roles) for role in ("gateway", "attention")}
    assert len(fake.actors) == 2 + len(roles)
    second.shutdown(0.0)
    assert second.wait() == ""


def test_the_state_is_saved_where_there_is_no_room_any_more(fake: FakeRay, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the next supervisor would take those for dead who have been replaced, and replace them."""
    running, made = start(fake), {path: path.stat() for path in (shm.ROOT / INSTANCE).iterdir()}
    fake.of("gateway")[0].die()
    wait_for(lambda: len(fake.of("gateway")) == 2 and fake.of("gateway")[1].name in str(record().joined))
    for path, before in made.items():
        assert (path.stat().st_ino, path.stat().st_blocks) == (before.st_ino, before.st_blocks)
    assert {path.name for path in (shm.ROOT / INSTANCE).iterdir()} == {"server", "owner", "keeper"}
    running.shutdown(0.0)
    assert running.wait() == ""


def test_a_server_goes_on_where_somebody_removes_its_state(fake: FakeRay, caplog: pytest.LogCaptureFixture) -> None:
    running = start(fake)
    (shm.ROOT / INSTANCE / "server").unlink()
    fake.of("gateway")[0].die()
    wait_for(lambda: len(fake.of("gateway")) == 2 and fake.of("gateway")[1].called("serve"))
    assert f"the server's state cannot be saved in {shm.ROOT / INSTANCE}: No such file or directory" in caplog.text
    running.shutdown(0.0)
    assert running.wait() == ""


def test_bandwidth_that_is_measured_later_is_not_missed(fake: FakeRay, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks before `numoe doctor` has measured it gets no share, who asks after it does."""
    seats = SimpleNamespace(nodes=(0,))
    monkeypatch.setattr(PLAN, "shards", (SimpleNamespace(index=0, numa_node=0, seats=seats),))
    monkeypatch.setattr(supervisor, "Topology", SimpleNamespace(read=lambda: ONE_NODE))
    found: dict[str, Bandwidth | None] = {"known": None}
    monkeypatch.setattr(supervisor, "remembered", lambda _: found["known"])
    placed = ActorPlacement(
        nodes=(0,), weight_bytes=1, medium="plain", on_nodes=None, huge=0.0, cpus=(), ran_on=(), read_bytes_s=4e9
    )
    fake.on["expert"] = {"placement": lambda _: placed}
    fake.on["attention"] = {"placement": lambda _: None, "stop": lambda *_: fake.of("expert")[0].die()}
    running = start(fake)

    def share() -> float | None:
        (expert,) = (actor.placement for actor in running.actors() if actor.role == "expert")
        assert expert is not None
        return expert.bandwidth_share

    assert share() is None
    found["known"] = Bandwidth(measured=0.0, reads=(ReadSpeed(cores=0, memory=0, bytes_s=5e9),))
    assert share() == 0.8
    running.shutdown(0.0)
    assert running.wait() == ""


@pytest.mark.parametrize("role", ["gateway", "attention"])
def test_an_actor_that_hangs_is_replaced(fake: FakeRay, monkeypatch: pytest.MonkeyPatch, role: ActorRole) -> None:
    monkeypatch.setattr(heartbeats, "_SILENT_S", 0.2)
    fake.on[role] = {"pulse": lambda actor: Future[str]() if actor is fake.of(role)[0] else ""}
    running = start(fake)
    wait_for(lambda: len(fake.of(role)) == 2 and fake.of(role)[1].called("pulse"))
    join(f"numoe-{role}")
    assert fake.of(role)[0].end.done(), "it was killed"
    assert all(member.state == "running" for member in record().members)
    running.shutdown(0.0)
    assert running.wait() == ""


def test_a_start_ends_whatever_happens_in_it(fake: FakeRay, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for a server that cannot come up, although its memory cannot be freed either."""

    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(assembly, "sweep_incomplete", fail)
    monkeypatch.setattr(supervisor, "sweep_incomplete", fail)
    with pytest.raises(OSError, match="Input/output"):
        start(fake)
    assert STARTED[0]._outcome.ended.is_set()
    assert "Input/output" in STARTED[0].wait()
    assert all(actor.end.done() for actor in fake.actors.values())


def test_somebody_looks_whatever_happens(fake: FakeRay, monkeypatch: pytest.MonkeyPatch) -> None:
    running, waits = start(fake), fake.wait
    failures = [OSError("too many open files")] * 3

    def wait(*args: Any, **options: Any) -> Any:
        if failures:
            raise failures.pop()
        return waits(*args, **options)

    monkeypatch.setattr(ray, "wait", wait)
    wait_for(lambda: not failures)
    fake.of("gateway")[0].die()
    wait_for(lambda: len(fake.of("gateway")) == 2)
    join("numoe-gateway")
    running.shutdown(0.0)
    assert running.wait() == ""


def test_a_supervisor_that_does_not_look_any_more_says_so(fake: FakeRay, monkeypatch: pytest.MonkeyPatch) -> None:
    running, held = start(fake), threading.Event()
    wait_for(lambda: running._looked < math.inf)
    assert running.pulse() == ""
    monkeypatch.setattr(running, "_look", lambda _: held.wait(20))
    monkeypatch.setattr(supervisor, "_LONGEST_LOOK_S", 0.5)
    wait_for(lambda: "has not looked" in running.pulse())
    held.set()
    running.shutdown(0.0)
    assert running.wait() == ""
    assert running.pulse() == ""
