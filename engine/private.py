"""Files and folders that only their owner may see."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import NamedTuple

from numoe.engine.errors import AccessError, InputError, NotFoundError

MAX_SECRET_BYTES = 1 << 20


class Stamp(NamedTuple):
    """What tells one state of a file from another."""

    inode: int
    nbytes: int
    modified_ns: int
    changed_ns: int

    @classmethod
    def of(cls, found: os.stat_result) -> Stamp:
        """The stamp of a file that `os.stat` has seen."""
        return cls(found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)

    @classmethod
    def at(cls, path: Path) -> Stamp | None:
        """The stamp of the file at a path, None if there is none to be seen."""
        try:
            return cls.of(path.stat())
        except OSError:
            return None


def make_private_folder(path: Path) -> None:
    """Make a folder that only this user may enter, or take the one that is there.

    Raises AccessError where it is another user's, or no folder: in a directory that all may write to,
    somebody may have been there first.
    """
    path.mkdir(mode=0o700, exist_ok=True)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise AccessError(f"{path} belongs to user {found.st_uid} or is no folder: have it removed, then try again")
    if found.st_mode & 0o077:
        path.chmod(0o700)


def write_private(path: Path, content: bytes) -> None:
    """Write a file that only this user may read."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
    with os.fdopen(os.open(path, flags, 0o600), "wb") as file:
        file.write(content)


def read_secret(path: Path) -> tuple[bytes, Stamp]:
    """The content of a file that holds a secret.

    Raises NotFoundError, AccessError where others than its owner may read it (of root's files, others than
    its group too), InputError for one that is too long.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        raise NotFoundError(f"there is no file {path}") from None
    except OSError as error:
        raise AccessError(f"{path} cannot be read: {error.strerror}") from None
    found = os.fstat(descriptor)
    if stat.S_ISDIR(found.st_mode):
        os.close(descriptor)
        raise InputError(f"{path} is a folder, not a file")
    with os.fdopen(descriptor, "rb") as file:
        if found.st_mode & (0o007 if found.st_uid == 0 != os.getuid() else 0o077):
            raise AccessError(f"{path} holds a secret, but others may read it: chmod 600 {path}")
        content = file.read(MAX_SECRET_BYTES + 1)
    if len(content) > MAX_SECRET_BYTES:
        raise InputError(f"{path} has more than {MAX_SECRET_BYTES} bytes: that is no secret of a person or server")
    return content, Stamp.of(found)
