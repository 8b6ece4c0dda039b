"""Files that are rewritten in their place are whole, whoever dies while he writes and however full the disk is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from numoe.engine.errors import ResourceError
from numoe.engine.reserved import make_reserved, read_reserved, rewrite


@pytest.fixture
def path(tmp_path: Path) -> Path:
    make_reserved(tmp_path / "file", 100)
    return tmp_path / "file"


def test_what_was_written_last_is_read(path: Path) -> None:
    assert read_reserved(path) is None
    for content in (b"one", b"another one", b"", b"x" * 100, b"two"):
        rewrite(path, content)
        assert read_reserved(path) == content
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_write_that_is_cut_off_anywhere_leaves_what_was_there(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for content in (b"the first", b"the second, which is longer"):
        rewrite(path, content)
        whole = path.read_bytes()
        for cut in range(60):
            with monkeypatch.context() as patch:
                pwrite = os.pwrite
                patch.setattr(os, "pwrite", lambda file, data, at: pwrite(file, data[:cut], at))  # noqa: B023
                rewrite(path, b"the next one, of which not all is written")
            found = read_reserved(path)
            assert found == content, cut
            path.write_bytes(whole)


def test_it_takes_no_more_room_than_when_it_was_made(path: Path) -> None:
    before = path.stat()
    for number in range(10):
        rewrite(path, bytes([number]) * 10 * number)
    after = path.stat()
    assert (before.st_ino, before.st_size, before.st_blocks) == (after.st_ino, after.st_size, after.st_blocks)


def test_what_is_too_long_is_refused_and_nothing_lost(path: Path) -> None:
    rewrite(path, b"short")
    with pytest.raises(ResourceError, match="room for 100 bytes, not for 101"):
        rewrite(path, b"x" * 101)
    assert read_reserved(path) == b"short"


def test_without_room_there_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="make some on"):
        make_reserved(tmp_path / "file", 1 << 60)
    assert not (tmp_path / "file").exists()


def test_a_file_that_is_just_being_made_has_no_content(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert read_reserved(tmp_path / "file") is None
