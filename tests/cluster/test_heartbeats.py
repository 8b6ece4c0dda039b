"""Who hangs is noticed; who looks after a long time does not take everybody for hung."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError

from numoe.cluster import heartbeats
from numoe.cluster.heartbeats import Heartbeats, Pulse
from numoe.engine.experts.mailbox import HEARTBEAT, Mailbox, MailboxLayout
from tests.cluster.actors import FakeRay

LAYOUT = MailboxLayout(shards=2, max_rows=1, top_k=1, hidden=32)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """`time.monotonic` of who looks."""
    found = SimpleNamespace(now=100.0)
    found.monotonic = lambda: found.now
    monkeypatch.setattr(heartbeats, "time", found)
    return found


@pytest.fixture
def beats(tmp_path: Path) -> Any:
    return Mailbox.create(str(tmp_path / "mailbox"), LAYOUT).shard_words(HEARTBEAT)


def test_a_shard_that_beats_is_not_still_and_one_that_does_not_is(
    clock: SimpleNamespace, tmp_path: Path, beats: Any
) -> None:
    looks = Heartbeats(tmp_path, LAYOUT)
    still = []
    for _ in range(60):
        beats[0] += 1
        clock.now += 0.2
        still.append((looks.is_still(0, since=90.0), looks.is_still(1, since=90.0)))
    assert not any(first for first, _ in still)
    assert not any(second for _, second in still[:20])
    assert all(second for _, second in still[30:])


def test_one_late_look_is_not_enough(clock: SimpleNamespace, tmp_path: Path, beats: Any) -> None:
    """Everything has stood still, this process too: at the first look nobody can have beaten yet."""
    looks = Heartbeats(tmp_path, LAYOUT)
    assert not looks.is_still(0, since=90.0)
    clock.now += 3600.0
    assert not looks.is_still(0, since=90.0)
    beats[0] += 1
    assert not looks.is_still(0, since=90.0)
    clock.now += 3600.0
    assert not looks.is_still(0, since=90.0), "again it is the first"
    assert looks.is_still(0, since=90.0)


class Asked:
    """An actor; `calls` are those of its pulse."""

    def __init__(self) -> None:
        self.calls: list[Future[str]] = []
        self.pulse = SimpleNamespace(remote=self._ask)

    def _ask(self) -> Future[str]:
        self.calls.append(Future())
        return self.calls[-1]


def test_an_actor_that_does_not_answer_hangs(clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeRay(monkeypatch)
    actor = Asked()
    pulse = Pulse(actor)
    for _ in range(10):
        actor.calls[-1].set_result("")
        clock.now += 10.0
        assert pulse.why_hung() == ""
        clock.now += 10.0
        assert pulse.why_hung() == "", "it asks again"
    assert len(actor.calls) == 11
    clock.now += 3600.0
    assert pulse.why_hung() == "", "one look is not enough"
    actor.calls[-1].set_result("")
    assert pulse.why_hung() == ""
    pulse.why_hung()
    clock.now += 3600.0
    assert [pulse.why_hung(), pulse.why_hung()] == ["", "has not answered for 3600 s"]


def test_an_actor_may_say_itself_that_it_hangs_and_of_a_dead_one_others_hear(
    clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeRay(monkeypatch)
    actor = Asked()
    pulse = Pulse(actor)
    told = []
    for _ in range(2):
        actor.calls[-1].set_result("is stuck")
        told.append(pulse.why_hung())
        clock.now += 10.0
        assert pulse.why_hung() == ""
    assert told == ["", "is stuck"]
    actor.calls[-1].set_exception(RayActorError())
    assert pulse.why_hung() == ""
