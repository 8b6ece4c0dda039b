"""Named shared memory under /dev/shm/numoe-UID: one folder an instance, private to its user."""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import psutil

from numoe.engine.errors import AccessError, ResourceError, UnavailableError
from numoe.engine.private import make_private_folder
from numoe.engine.reserved import make_reserved, read_reserved, rewrite

ROOT = Path(f"/dev/shm/numoe-{os.getuid()}")  # noqa: S108 - shared memory is what this is for
_OWNER_FILE, _OWNER_BYTES = "owner", 16 << 10
_UNSIGNED_SECONDS = 30.0
_TRIES = 100


class SharedSegment:
    """A file in shared memory, mapped as uint8 `array`."""

    def __init__(self, path: Path, nbytes: int, descriptor: int) -> None:
        self.path, self.nbytes = path, nbytes
        try:
            self._map = mmap.mmap(descriptor, nbytes)
        finally:
            os.close(descriptor)
        self.array: npt.NDArray[np.uint8] = np.frombuffer(self._map, np.uint8)

    @classmethod
    def create(cls, path: str | Path, nbytes: int) -> SharedSegment:
        """Make the file and reserve its memory; ResourceError if there is no room."""
        path = Path(path)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            # Reserved now: a page that cannot be had later would be a bus error inside a kernel.
            os.posix_fallocate(descriptor, 0, nbytes)
        except OSError as error:
            os.close(descriptor)
            path.unlink(missing_ok=True)
            raise ResourceError(
                f"shared memory has no room for {nbytes / 1e9:.2f} GB at {path.parent} ({error.strerror}); "
                "free some, or enlarge it (mount -o remount,size=... /dev/shm; in a container --shm-size)"
            ) from None
        return cls(path, nbytes, descriptor)

    @classmethod
    def attach(cls, path: str | Path, nbytes: int) -> SharedSegment:
        """Map an existing file of that size; UnavailableError if it is gone, AccessError if it is another user's."""
        path = Path(path)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
        except OSError as error:
            raise UnavailableError(f"shared memory {path} cannot be mapped: {error.strerror}") from None
        found = os.fstat(descriptor)
        if found.st_uid != os.getuid() or found.st_mode & 0o077:
            os.close(descriptor)
            raise AccessError(f"shared memory {path} is not this user's alone: remove it and start the server again")
        if found.st_size != nbytes:
            os.close(descriptor)
            raise UnavailableError(f"shared memory {path} does not have the {nbytes} bytes expected")
        return cls(path, nbytes, descriptor)

    def close(self) -> None:
        """Unmap as soon as nothing refers to the array; the file stays."""
        self.array = np.empty(0, np.uint8)
        with contextlib.suppress(BufferError):
            self._map.close()


def create_folder(instance: str) -> Path:
    """The folder of an instance, owned by this process: `remove_stale` spares it while the owner lives.

    Raises AccessError where the root is another user's, ResourceError where there is no room.
    """
    folder = ROOT / instance
    for tries_left in reversed(range(_TRIES)):
        try:
            make_private_folder(ROOT)
            folder.mkdir(mode=0o700)
            break
        except FileNotFoundError:  # another server has ended meanwhile, and removed the root
            if not tries_left:
                raise
    make_reserved(folder / _OWNER_FILE, _OWNER_BYTES)
    adopt_folder(folder, [os.getpid()])
    return folder


def adopt_folder(folder: Path, pids: Iterable[int]) -> None:
    """Make processes the owners of an instance's folder, which `remove_stale` spares while one of them lives."""
    owners = []
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            owners.append(f"{pid} {psutil.Process(pid).create_time()}")
    rewrite(folder / _OWNER_FILE, "\n".join(owners).encode())


def owners_of(folder: Path) -> list[tuple[int, float]] | None:
    """Process id and start, in seconds since 1970, of each owner of an instance's folder; None while it is unsigned."""
    try:
        found = read_reserved(folder / _OWNER_FILE)
    except OSError:
        return None
    if found is None:
        return None
    pairs = (line.split() for line in found.decode().splitlines())
    return [(int(pid), float(started)) for pid, started in pairs]


def remove_folder(folder: Path) -> None:
    """Remove an instance's shared memory, and the root if that leaves it empty."""
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):
        ROOT.rmdir()


def remove_stale() -> list[Path]:
    """Remove the folders whose owner died without cleaning up; what was removed.

    Raises AccessError where the root is another user's.
    """
    if not os.path.lexists(ROOT):
        return []
    try:
        make_private_folder(ROOT)  # never clean up behind somebody's link
        folders = sorted(ROOT.iterdir())
    except FileNotFoundError:  # the last server has just ended
        return []
    removed = []
    for folder in folders:
        if not _owner_lives(folder):
            remove_folder(folder)
            removed.append(folder)
    return removed


def _owner_lives(folder: Path) -> bool:
    if (owners := owners_of(folder)) is not None:
        return any(_lives(pid, started) for pid, started in owners)
    # Just being made, by another process that has not signed it yet.
    return folder.exists() and time.time() - folder.stat().st_mtime < _UNSIGNED_SECONDS


def _lives(pid: int, started: float) -> bool:
    try:
        return abs(psutil.Process(pid).create_time() - started) < 1.0
    except psutil.NoSuchProcess:
        return False
