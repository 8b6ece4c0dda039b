"""What lies in shared memory: finding, checking and removing slices, and which of them a server uses."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from numoe.engine.weights.contents import ContentSum, name_digest
from numoe.engine.weights.header import SliceHeader
from numoe.engine.weights.loading import verify_pieces
from numoe.engine.weights.media import weights_root
from numoe.engine.weights.slices import (
    SliceKey,
    WeightSlice,
    complete_header,
    is_unused_and_incomplete,
    locked_folder,
    remove_empty,
    remove_slice,
    try_lock,
    unlink,
)
from numoe.engine.weights.source import layout_identity

LINK_PREFIX: Final = "weights-"
"""How the links in a server's folder begin that say which slices it uses."""


@dataclass(frozen=True)
class StoredSlice:
    """A slice that lies in shared memory; `header` is None for one that is being loaded, or was left by a crash.

    bytes: of its file. in_use: whether a server uses or loads it. current: whether this version of numoe
    can attach to it.
    """

    path: Path
    nbytes: int
    in_use: bool
    header: SliceHeader | None

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the source."""
        return self.path.parent.name

    @property
    def current(self) -> bool:
        """Whether this version of numoe packs weights so."""
        return self.header is not None and self.header.layout == layout_identity()


def stored_slices() -> Iterator[StoredSlice]:
    """Every slice of this user."""
    for path in _paths():
        with contextlib.suppress(FileNotFoundError), locked_folder(path.parent):
            descriptor = os.open(path, os.O_RDWR)
            try:
                nbytes, header = os.fstat(descriptor).st_size, complete_header(descriptor)
                found = StoredSlice(path, nbytes, in_use=not try_lock(descriptor), header=header)
            finally:
                os.close(descriptor)
            yield found


def is_loaded(key: SliceKey) -> bool:
    """Whether a slice is complete and can be attached to."""
    try:
        descriptor = os.open(key.path, os.O_RDWR)
    except OSError:
        return False
    try:
        return complete_header(descriptor) is not None
    finally:
        os.close(descriptor)


def sweep_incomplete() -> None:
    """Remove what loads that crashed have left."""
    for folder in {path.parent for path in _paths()}:
        with contextlib.suppress(FileNotFoundError), locked_folder(folder):
            for path in folder.iterdir():
                if not path.is_dir() and is_unused_and_incomplete(path):
                    unlink(path)
            remove_empty(folder)


def verify_slice(path: Path, threads: int) -> list[int]:
    """The first bytes of the damaged pieces of a slice; DataLossError if its table of checksums is damaged."""
    found = WeightSlice.open(path)
    try:
        table = found.pieces()
        return [int(table[number]["offset"]) for number in verify_pieces(found.array, table, threads, lambda: None)]
    finally:
        found.close()


def link_slice(folder: Path, name: str, found: WeightSlice) -> None:
    """Note in a server's folder that it uses a slice, as `name`."""
    link = linked(folder, name)
    link.unlink(missing_ok=True)
    link.symlink_to(found.path)


def linked(folder: Path, name: str) -> Path:
    """The link in a server's folder to the slice that it uses as `name`."""
    return folder / f"{LINK_PREFIX}{name}"


def linked_slices(folder: Path) -> list[Path]:
    """The links in a server's folder."""
    return sorted(folder.glob(f"{LINK_PREFIX}*"))


def hold_weights(folder: Path) -> list[WeightSlice]:
    """Use the slices of a server, beside the actors that do: so they stay while an actor is replaced."""
    return [WeightSlice.open(link) for link in linked_slices(folder)]


def linked_contents(folder: Path, tensors: Iterable[str]) -> dict[str, ContentSum]:
    """What the slices of a server know of what is in tensors, by name; units that none of them read are missing."""
    names = {name_digest(name): name for name in tensors}
    sums: dict[str, ContentSum] = {}
    for found in hold_weights(folder):
        try:
            for row in found.contents():
                if (name := names.get(row["tensor"].tobytes())) is not None:
                    content = ContentSum(int(row["units"]), row["lanes"].copy())
                    sums[name] = sums.get(name, ContentSum()) + content
        finally:
            found.close()
    return sums


def free_weights(folder: Path) -> None:
    """Remove the slices of a server that nobody else uses, once its own processes are gone."""
    for link in linked_slices(folder):
        remove_slice(link.readlink())


def _paths() -> Iterable[Path]:
    """Slices, and what else lies where they do; folders are nobody's of numoe."""
    return sorted(path for path in weights_root().glob("*/*") if not path.is_dir())

