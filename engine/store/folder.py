"""A store in a folder. Objects are files; what was written survives a crash of the process and of the machine.

obstore's LocalFileSystem neither flushes what it writes nor has conditional puts, so this is our own.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

import numpy as np
from blake3 import blake3

from numoe.engine.errors import PreconditionError
from numoe.engine.store.base import Entry, Store
from numoe.engine.store.failures import timeout_error

if TYPE_CHECKING:
    from typing_extensions import Buffer

_STAGING: Final = ".staging"
_LOCK: Final = ".lock"
_LEFT_OVER_SECONDS: Final = 3600.0
_Result = TypeVar("_Result")


class FolderStore(Store):
    """Objects as files of `root`, which is made if it is missing; private to its user.

    A file is written and flushed to disk under another name, then renamed, then its folder is
    flushed. Processes and threads take turns, by a lock of the operating system that ends with its
    holder, between looking at what is there and renaming. A version is the hash of the content.

    A folder that cannot be opened is like a remote store that does not answer: `check` says so, and
    what uses it does, until it is mended. One that vanishes later is not made anew: a disk may have gone.
    """

    def __init__(self, root: Path, deadline: float) -> None:
        super().__init__(str(root), deadline)
        self._root = root
        with contextlib.suppress(OSError):
            self._open()

    def check(self) -> None:
        """Raise what opening the folder raises; makes it, if it can be made."""
        super()._do("opening it", self._open)
        super().check()

    def _do(self, doing: str, operation: Callable[[], _Result]) -> _Result:
        """As every store's; but where the folder itself is gone, nothing can be told about what was in it."""

        def watched() -> _Result:
            try:
                return operation()
            except FileNotFoundError:
                if self._root.is_dir():
                    raise
                raise OSError(errno.ENXIO, "the folder is not there") from None

        return super()._do(doing, watched)

    def _open(self) -> None:
        self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
        (self._root / _STAGING).mkdir(mode=0o700, exist_ok=True)
        self._sweep()

    def _put(self, key: str, data: Buffer, version: str | None) -> str:
        path = self._root / key
        view = memoryview(data).cast("B")
        if version is None and path.exists():  # spares the writing; looked at again below
            raise self._changed(key)
        staged = self._stage(view)
        try:
            self._make_folders(path.parent)
            self._rename(staged, key, version)
        except BaseException:
            staged.unlink(missing_ok=True)
            raise
        _flush_folder(path.parent)
        return blake3(view).hexdigest()

    def _get(self, key: str) -> memoryview:
        return self._read(key, None)

    def _get_first(self, key: str, nbytes: int) -> memoryview:
        return self._read(key, nbytes)

    def _get_versioned(self, key: str) -> tuple[memoryview, str]:
        data = self._get(key)
        return data, blake3(data).hexdigest()

    def _head(self, key: str) -> int:
        path = self._root / key
        if path.is_dir():
            raise FileNotFoundError
        return path.stat().st_size

    def _list(self, folder: str) -> list[Entry]:
        self._root.stat()  # which `os.walk` passes over
        entries = []
        for path, folders, names in os.walk(self._root / folder):
            folders[:] = [name for name in folders if not name.startswith(".")]
            for name in names:
                file = Path(path, name)
                with contextlib.suppress(FileNotFoundError):  # removed while we look
                    status = file.stat()
                    tag = f"{status.st_ino} {status.st_mtime_ns}"
                    entries.append(Entry(str(file.relative_to(self._root)), status.st_size, status.st_mtime, tag))
        return [entry for entry in entries if not entry.key.startswith(".")]

    def _delete(self, key: str) -> None:
        path = self._root / key
        with self._locked(key), contextlib.suppress(FileNotFoundError):
            path.unlink()
            _flush_folder(path.parent)

    def _read(self, key: str, nbytes: int | None) -> memoryview:
        """The first bytes of an object, all for None."""
        with (self._root / key).open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size if nbytes is None else nbytes
            data = np.empty(size, np.uint8)  # large arrays get huge pages
            filled = 0
            while filled < data.size and (count := file.readinto(data[filled:].data)):
                filled += count
        return data[:filled].data.toreadonly()

    def _stage(self, view: memoryview) -> Path:
        """Write bytes to a file of no name yet, and to the disk."""
        staged = self._root / _STAGING / secrets.token_hex(16)
        staged.parent.mkdir(mode=0o700, exist_ok=True)
        descriptor = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            written = 0
            while written < view.nbytes:
                written += os.write(descriptor, view[written:])
            os.fsync(descriptor)
        except BaseException:
            staged.unlink()
            raise
        finally:
            os.close(descriptor)
        return staged

    def _rename(self, staged: Path, key: str, version: str | None) -> None:
        """Give a staged file its name, if `version` is what has it now."""
        path = self._root / key
        with self._locked(key):
            current = blake3(path.read_bytes()).hexdigest() if path.exists() else None
            if current != version:
                raise self._changed(key)
            staged.rename(path)

    def _make_folders(self, folder: Path) -> None:
        if not folder.exists():
            self._make_folders(folder.parent)
            folder.mkdir(mode=0o700, exist_ok=True)
            _flush_folder(folder.parent)

    @contextlib.contextmanager
    def _locked(self, key: str) -> Iterator[None]:
        """Nobody else changes an object meanwhile; UnavailableError if the others take too long."""
        until = time.monotonic() + self.deadline
        descriptor = os.open(self._root / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > until:
                        raise timeout_error(f"waiting to change {key}", self.url, self.deadline) from None
                    time.sleep(0.001)
            yield
        finally:
            os.close(descriptor)

    def _sweep(self) -> None:
        """Remove what processes that were killed left half-written."""
        for staged in (self._root / _STAGING).iterdir():
            with contextlib.suppress(FileNotFoundError):
                if time.time() - staged.stat().st_mtime > _LEFT_OVER_SECONDS:
                    staged.unlink()

    def _changed(self, key: str) -> PreconditionError:
        return PreconditionError(f"store {self.url}: {key} is not what it was; somebody else wrote it: read it again")


def _flush_folder(folder: Path) -> None:
    """Make the names in a folder survive a crash of the machine."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
