"""The journal's file: whose it is, and when it is begun anew."""

from __future__ import annotations

from pathlib import Path

import pytest

from numoe.engine import shm
from numoe.engine.errors import ResourceError
from numoe.engine.kv.journal import PageJournal, digest_of

SIZES = {"n_pages": 4, "slots": 2, "context": 600}
IDENTITY = b"this very memory"


def opened(path: Path, identity: bytes = IDENTITY) -> PageJournal:
    return PageJournal.open(path, identity, **SIZES)


def test_a_successor_reads_what_was_written(tmp_path: Path) -> None:
    journal = opened(tmp_path / "pages")
    journal.page_tables[1, :2] = 3, 0
    journal.note(1, "a", range(400), [3, 0], 0, 400)
    journal.publish(3, b"k" * 32, 256, foreign=True)
    journal.hold(0, b"what was said")
    after = opened(tmp_path / "pages")
    run = after.runs()[digest_of("a")]
    assert (run.slot, run.computed, run.pages) == (1, 400, (3, 0))
    assert after.agrees(run, [*range(400), 9])
    assert after.agrees(run, range(399))
    assert not after.agrees(run, [*range(399), 9])
    assert list(after.published()) == [(3, b"k" * 32, 256, True)]
    assert list(after.conversations()) == [(0, b"what was said")]


def test_a_journal_of_other_memory_says_nothing(tmp_path: Path) -> None:
    journal = opened(tmp_path / "pages")
    journal.page_tables[0, 0] = 2
    journal.note(0, "a", range(10), [2], 0, 10)
    journal.publish(2, b"k" * 32, 10, foreign=False)
    journal.hold(0, b"what was said")
    other = opened(tmp_path / "pages", b"some other bytes")
    assert (other.runs(), list(other.published()), list(other.conversations())) == ({}, [], [])
    assert opened(tmp_path / "pages").runs() == {}, "nor does it again"


def test_a_file_that_is_not_whole_is_made_anew(tmp_path: Path) -> None:
    path = tmp_path / "pages"
    path.write_bytes(b"half")
    path.chmod(0o600)
    assert opened(path).runs() == {}
    assert path.stat().st_size > 4 * 4 * 256


def test_without_room_it_lives_in_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise ResourceError("shared memory has no room")

    monkeypatch.setattr(shm.SharedSegment, "create", full)
    journal = opened(tmp_path / "pages")
    journal.note(0, "a", range(10), [2], 0, 10)
    assert "will not outlive" in caplog.text


def test_what_takes_too_much_room_is_left_out() -> None:
    journal = PageJournal(**SIZES)
    journal.hold(0, b"short")
    journal.hold(0, bytes(100_000))
    assert list(journal.conversations()) == []
