"""What is private is so from the first moment, and what is not is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from numoe.engine.errors import AccessError, InputError, NotFoundError
from numoe.engine.private import MAX_SECRET_BYTES, make_private_folder, read_secret, write_private

as_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file away")


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_a_folder_is_made_private_or_becomes_so(tmp_path: Path) -> None:
    for name, before in (("new", None), ("open", 0o777)):
        if before is not None:
            (tmp_path / name).mkdir()
            (tmp_path / name).chmod(before)
        make_private_folder(tmp_path / name)
        assert mode(tmp_path / name) == 0o700


def test_a_link_is_no_private_folder(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(AccessError, match="no folder: have it removed"):
        make_private_folder(tmp_path / "link")


@as_root
def test_another_users_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    os.chown(tmp_path / "theirs", 12345, -1)
    with pytest.raises(AccessError, match="belongs to user 12345"):
        make_private_folder(tmp_path / "theirs")


def test_a_private_file_is_its_owners_alone(tmp_path: Path) -> None:
    write_private(tmp_path / "file", b"first, and longer")
    write_private(tmp_path / "file", b"second")
    assert (mode(tmp_path / "file"), (tmp_path / "file").read_text()) == (0o600, "second")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    with pytest.raises(OSError, match="symbolic links"):
        write_private(tmp_path / "link", b"third")


@pytest.mark.parametrize("others", [0o640, 0o604, 0o660, 0o777])
def test_a_secret_that_others_may_read_is_refused(tmp_path: Path, others: int) -> None:
    path = tmp_path / "secret"
    write_private(path, b"s3cret")
    content, stamp = read_secret(path)
    assert content == b"s3cret"
    path.chmod(others)
    with pytest.raises(AccessError, match=f"others may read it: chmod 600 {path}"):
        read_secret(path)
    path.chmod(0o400)
    assert read_secret(path) != (b"s3cret", stamp)  # the stamp tells that something was changed


def test_a_secret_is_a_file_of_some_size(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=f"no file {tmp_path}/absent"):
        read_secret(tmp_path / "absent")
    with pytest.raises(InputError, match="is a folder"):
        read_secret(tmp_path)
    write_private(tmp_path / "long", b"x" * (MAX_SECRET_BYTES + 1))
    with pytest.raises(AccessError, match="cannot be read: Not a directory"):
        read_secret(tmp_path / "long" / "x")
    with pytest.raises(InputError, match="more than 1048576 bytes"):
        read_secret(tmp_path / "long")
