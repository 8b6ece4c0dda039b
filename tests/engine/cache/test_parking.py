"""Conversations without a slot: one that goes on takes the place of what it was, and is never lost between the two."""

from __future__ import annotations

import dataclasses
import itertools
import time
from pathlib import Path

import msgspec
import pytest

from numoe.engine.cache import snapshots
from numoe.engine.cache.snapshots import conversation_of
from numoe.engine.errors import UnavailableError
from numoe.engine.scheduler.conversation import Parked
from numoe.engine.store import open_store
from numoe.engine.worker.parking import Parking
from tests.engine.cache.conftest import Story
from tests.engine.cache.support import Interrupted, Saver, Talk


class KilledError(Exception):
    """The process is gone."""


def die() -> None:
    raise KilledError


@pytest.mark.parametrize("operation", ["put_new", "put_if", "delete"])
def test_a_kill_leaves_what_was_or_what_became_of_it(story: Story, tmp_path: Path, operation: str) -> None:
    was, is_now = (Talk.read(path) for path in story.files)
    for number in itertools.count(1):
        store = open_store(tmp_path / f"{operation}-{number}")
        saver = Saver(store, was.pages, was.origin)
        dying = Saver(Interrupted(store, operation, number, die), was.pages, was.origin)  # type: ignore[arg-type]
        first, objects = was.salted(b"")
        saver.hold(objects)
        saver.snapshots.park(Parked(first))
        second, objects = is_now.salted(b"")
        second = dataclasses.replace(second, stored=(first.name,))
        dying.hold(objects)
        killed = False
        try:
            dying.snapshots.park(Parked(second, slot=1))
        except KilledError:
            killed = True
        (found,) = saver.snapshots.resumable()
        assert len(found.conversation.tokens) in (len(first.tokens), len(second.tokens))
        # Whoever finds it removes what is left of both in the end.
        saver.hold(objects)
        saver.snapshots.park(Parked(dataclasses.replace(second, stored=found.conversation.stored), slot=1))
        assert [entry.key.rsplit("/", 1)[-1] for entry in store.list("resumable")] == [f"{second.name}-1"]
        for one in (saver, dying):
            one.close()
        if not killed:
            return


def test_a_store_that_fails_is_left_alone_for_a_while(story: Story, tmp_path: Path) -> None:
    talk, asked = Talk.read(story.files[0]), list[int]()

    def fail() -> None:
        asked.append(1)
        raise UnavailableError("away")

    store = Interrupted(open_store(tmp_path), "get_versioned", each=fail)
    saver = Saver(store, talk.pages, talk.origin)  # type: ignore[arg-type]
    done = list[tuple[Parked, bool]]()
    parking = Parking(saver.snapshots, saver.tier, lambda *what: done.append(what))
    parked = Parked(talk.salted(b"")[0], {b"key": 1})
    parking.park(parked)
    parking.flush(time.monotonic() + 20)
    assert (len(asked), done) == (1, [(parked, False)])
    assert saver.tier.writing.error == "away"
    parking.close()
    saver.close()


def test_each_model_has_its_own_bound(story: Story, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshots, "MAX_RESUMABLE", 2)
    talk, store = Talk.read(story.files[0]), open_store(tmp_path)
    other = msgspec.structs.replace(talk.origin, fingerprint=b"o" * 32)
    savers = [Saver(store, talk.pages, origin) for origin in (talk.origin, other)]
    for number in range(3):
        for saver in savers[: 1 if number else 2]:
            manifest = msgspec.structs.replace(talk.manifest, origin=saver.snapshots.origin, salt=bytes([number]))
            saver.snapshots.park(Parked(conversation_of(manifest)))
    assert [len(saver.snapshots.resumable()) for saver in savers] == [2, 1]
    for saver in savers:
        saver.close()
