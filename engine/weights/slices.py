"""`WeightSlice`: a file of packed weights, shared by everybody who serves the same part of the same model.

Whoever uses a slice holds a shared lock (flock) on its file; whoever loads it, an exclusive one. Locks go
with the process that holds them, so that what is locked is in use, and what is neither locked nor complete was
left by a load that crashed. The lock of a model's folder is held, for microseconds, by whoever makes or removes
files in it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from numoe.engine.errors import AccessError, DataLossError, PreconditionError, ResourceError, UnavailableError
from numoe.engine.mapping import map_file
from numoe.engine.private import make_private_folder
from numoe.engine.weights.contents import CONTENT
from numoe.engine.weights.header import HEADER_BYTES, PIECE, SliceHeader, file_bytes, read_header, write_header
from numoe.engine.weights.media import Medium, choose_medium, shm_medium, weights_root
from numoe.engine.weights.reserve import no_room, reserve
from numoe.engine.weights.source import layout_identity

_HUGETLB_SUFFIX: Final = ".huge"


@dataclass(frozen=True, kw_only=True)
class SliceKey:
    """Which slice: the fingerprint of the source, the part of it, and the NUMA nodes that its memory is on.

    nodes: one that it is bound to, several that it is spread over page by page, none for wherever it comes to lie.
    """

    source: str
    cut: str
    nodes: tuple[int, ...] = ()

    @property
    def path(self) -> Path:
        """Where it is, or will be."""
        place = f"-node{'+'.join(map(str, self.nodes))}" if self.nodes else ""
        return weights_root() / self.source / f"{self.cut}{place}-{layout_identity()}"


class WeightSlice:
    """A mapped slice; `array` is uint8 [nbytes], the packed weights.

    `header` is None while it is to be loaded: then this process holds it alone, until `finish`.
    """

    def __init__(self, path: Path, descriptor: int, *, medium: Medium | None, nbytes: int, writable: bool) -> None:
        self.path, self.medium, self._descriptor, self._nbytes = path, medium, descriptor, nbytes
        # Opened anew: a mapping keeps its descriptor, and with it would keep the lock, as long as an array shows it.
        mapped = os.open(f"/proc/self/fd/{descriptor}", os.O_RDWR)
        try:
            self._file = map_file(mapped, writable=writable)
        finally:
            os.close(mapped)
        self.array = self._file[HEADER_BYTES : HEADER_BYTES + nbytes]
        # Of a new file nothing is touched before its memory is reserved.
        self.header = None if medium else read_header(self._file)

    @classmethod
    def open(cls, path: Path, *, writable: bool = False) -> WeightSlice:
        """Map a complete slice and keep it from being removed; UnavailableError if it is not there or not complete."""
        try:
            descriptor = os.open(path, os.O_RDWR)
        except OSError as error:
            where = f"{path} -> {path.readlink()}" if path.is_symlink() else str(path)
            raise UnavailableError(f"weights {where} cannot be mapped: {error.strerror}") from None
        with _closed_on_error(descriptor):
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            header = complete_header(descriptor)
            if header is None or not _is_at(path, descriptor):
                raise UnavailableError(f"weights {path} are not complete: start the server again")
            return cls(path, descriptor, medium=None, nbytes=header.nbytes, writable=writable)

    def pieces(self) -> npt.NDArray[np.void]:
        """The table of pieces (`header.PIECE`); DataLossError if it is damaged."""
        assert self.header is not None
        return self._tables()[: self.header.pieces * PIECE.itemsize].view(PIECE)

    def contents(self) -> npt.NDArray[np.void]:
        """The table of contents (`contents.CONTENT`); DataLossError if it is damaged."""
        assert self.header is not None
        return self._tables()[self.header.pieces * PIECE.itemsize :].view(CONTENT)

    def _tables(self) -> npt.NDArray[np.uint8]:
        assert self.header is not None
        tables = self._file[HEADER_BYTES + self.header.nbytes : self.header.file_bytes]
        if blake3(tables.data).digest() != self.header.checksum:
            raise DataLossError(f"weights {self.path} are damaged (their table of checksums): `numoe weights rm` them")
        return tables

    def reserve(self, nodes: tuple[int, ...], threads: int, on_thread: Callable[[], None]) -> None:
        """Have the memory of a new slice; `medium` then is what it really got."""
        assert self.medium is not None
        self.medium = reserve(
            self._file, self._descriptor, self.path, self.medium, nodes=nodes, threads=threads, on_thread=on_thread
        )

    def finish(
        self, pieces: npt.NDArray[np.void], contents: npt.NDArray[np.void], header: Callable[[bytes], SliceHeader]
    ) -> None:
        """Everything is loaded: write tables, header and the complete flag, and let others attach."""
        at = HEADER_BYTES + self._nbytes
        tables = np.concatenate([table.view(np.uint8).reshape(-1) for table in (pieces, contents)])
        self._file[at : at + tables.nbytes] = tables
        write_header(self._file, header(blake3(tables.data).digest()))
        self.header = read_header(self._file)
        fcntl.flock(self._descriptor, fcntl.LOCK_SH)

    def close(self) -> None:
        """Unmap, as soon as nothing refers to the array, and allow it to be removed."""
        self.array = self._file = np.empty(0, np.uint8)
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def open_slice(
    key: SliceKey, nbytes: int, pieces: int, tensors: int,
    *, threads: int = 1, on_thread: Callable[[], None] = lambda: None,
) -> WeightSlice:  # fmt: skip
    """Attach to a slice, or make an empty one that this process has to load.

    Waits while another process loads it. Raises ResourceError if there is no room. Huge pages that were set aside
    may turn out not to be for us, by a limit of the mount or the container: then /dev/shm takes the slice.
    """
    path, may_be_huge = key.path, True
    while True:
        descriptor, medium = _open_or_create(key, path, file_bytes(nbytes, pieces, tensors), may_be_huge=may_be_huge)
        if medium is not None:
            try:
                return _reserved(path, descriptor, medium, nbytes, key.nodes, threads, on_thread)
            except (ResourceError, OSError):
                if medium.kind != "hugetlbfs":
                    raise
                may_be_huge = False
                continue
        with _closed_on_error(descriptor):
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            header = complete_header(descriptor) if _is_at(path, descriptor) else None
            if header is not None:
                if (header.nbytes, header.pieces, header.tensors) != (nbytes, pieces, tensors):
                    raise PreconditionError(f"weights {path} are not what they are named: `numoe weights rm` them")
                return WeightSlice(path, descriptor, medium=None, nbytes=nbytes, writable=False)
        os.close(descriptor)  # its loader has failed or crashed, or it was removed meanwhile


def _reserved(
    path: Path, descriptor: int, medium: Medium, nbytes: int, nodes: tuple[int, ...], threads: int,
    on_thread: Callable[[], None],
) -> WeightSlice:  # fmt: skip
    """A new slice whose memory is there; on any error the descriptor is closed and nothing is left of it."""
    found = None
    try:
        found = WeightSlice(path, descriptor, medium=medium, nbytes=nbytes, writable=True)
        found.reserve(nodes, threads, on_thread)
    except BaseException:
        if found is not None:
            found.close()
        else:
            os.close(descriptor)
        remove_slice(path)
        raise
    return found


@contextmanager
def _closed_on_error(descriptor: int) -> Iterator[None]:
    try:
        yield
    except BaseException:
        os.close(descriptor)
        raise


def _open_or_create(key: SliceKey, path: Path, nbytes: int, *, may_be_huge: bool) -> tuple[int, Medium | None]:
    """A descriptor of the slice's file: of an existing one, or of a new one with its medium, locked exclusively."""
    with locked_folder(path.parent, create=True):
        if os.path.lexists(path):
            if not is_unused_and_incomplete(path):
                return os.open(path, os.O_RDWR), None
            unlink(path)
        medium = choose_medium(nbytes, key.nodes) if may_be_huge else shm_medium()
        if medium.free_bytes(key.nodes) < nbytes:
            remove_empty(path.parent)
            raise no_room(path, nbytes, medium, key.nodes)
        if medium.kind == "hugetlbfs":
            try:
                make_private_folder(medium.folder)
                target = medium.folder / f"{key.source}-{path.name}{_HUGETLB_SUFFIX}"
                target.unlink(missing_ok=True)
                path.symlink_to(target)
            except (OSError, AccessError):
                medium = shm_medium()
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(descriptor, -(-nbytes // medium.page_bytes) * medium.page_bytes)
        return descriptor, medium


def complete_header(descriptor: int) -> SliceHeader | None:
    """The header of an open file; None if it is not complete, or shorter than it says."""
    header = read_header(os.pread(descriptor, HEADER_BYTES, 0))
    if header is None or os.fstat(descriptor).st_size < header.file_bytes:
        return None
    return header


@contextmanager
def locked_folder(folder: Path, *, create: bool = False) -> Iterator[None]:
    """Hold the lock of a model's folder. FileNotFoundError without it, unless it is to be made."""
    while True:
        try:
            if create:
                make_private_folder(folder.parent)
                make_private_folder(folder)
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            if create:
                continue
            raise
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if _is_at(folder, descriptor):
                yield
                return
        finally:
            os.close(descriptor)


def is_unused_and_incomplete(path: Path) -> bool:
    """Whether a load has crashed and left this; asked under the folder's lock."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except OSError:
        return True  # a link to nowhere
    try:
        return try_lock(descriptor) and complete_header(descriptor) is None
    finally:
        os.close(descriptor)


def remove_slice(path: Path) -> bool:
    """Remove a slice unless somebody uses it; whether it is gone."""
    try:
        with locked_folder(path.parent):
            try:
                descriptor = os.open(path, os.O_RDWR)
            except OSError:
                unlink(path)
            else:
                try:
                    if not try_lock(descriptor):
                        return False
                    unlink(path)
                finally:
                    os.close(descriptor)
            remove_empty(path.parent)
    except FileNotFoundError:
        pass
    return True


def remove_empty(folder: Path) -> None:
    """Remove a model's folder, and the one around it, if nothing is in them; asked under the folder's lock."""
    with contextlib.suppress(OSError):
        folder.rmdir()
        folder.parent.rmdir()


def try_lock(descriptor: int) -> bool:
    """Take the exclusive lock, unless somebody has one."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def unlink(path: Path) -> None:
    """Remove a slice's name, and what it is a link to."""
    if path.is_symlink():
        target = path.readlink()
        target.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            target.parent.rmdir()
    path.unlink(missing_ok=True)


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether an open file or folder still has this name."""
    try:
        named, opened = path.stat(), os.fstat(descriptor)
    except OSError:
        return False
    return (named.st_dev, named.st_ino) == (opened.st_dev, opened.st_ino)


def piece_table(offsets: Sequence[tuple[int, int]], digests: Sequence[bytes]) -> npt.NDArray[np.void]:
    """The table of pieces from their (offset, bytes) and their digests."""
    table = np.zeros(len(offsets), PIECE)
    if len(offsets):
        table["offset"], table["nbytes"] = np.array(offsets, np.uint64).T
        table["digest"] = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32)
    return table
