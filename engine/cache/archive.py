r"""A conversation in one file (`--prompt-cache FILE`): its manifest, then its chunks.

    magic "numoePC\n", bytes of the manifest u64, the manifest (`store/manifest.py`)
    for each chunk, in order: bytes u64, the object (`store/chunks.py`)

The file is written beside its place and renamed, so that there is always the old one or the new one.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import secrets
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from numoe.engine.errors import AccessError, DataLossError, NumoeError, ResourceError, UnavailableError
from numoe.engine.store.chunks import ChunkShape, decode_chunk
from numoe.engine.store.manifest import Manifest, Origin, check_compatible, decode_manifest, encode_manifest

if TYPE_CHECKING:
    from typing_extensions import Buffer

NAME: Final = "prompt-cache"
"""The name in the manifest of every such file."""
_MAGIC: Final = b"numoePC\n"
_SIZE: Final = struct.Struct("<Q")
_FULL: Final = (errno.ENOSPC, errno.EDQUOT)


def write_archive(path: Path, manifest: Manifest, chunks: Iterator[Buffer]) -> None:
    """Write a conversation, chunk by chunk; the old file stays if anything fails.

    Raises ResourceError or UnavailableError if the file cannot be written, and what `chunks` raises.
    """
    staged = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        staged.touch(mode=0o600, exist_ok=False)
        with staged.open("wb") as file:
            file.write(_MAGIC)
            for part in itertools.chain([encode_manifest(manifest)], chunks):
                file.write(_SIZE.pack(memoryview(part).nbytes))
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        staged.replace(path)
    except OSError as error:
        kind = ResourceError if error.errno in _FULL else UnavailableError
        raise kind(f"{path} cannot be written: {error.strerror}; name another --prompt-cache") from None
    finally:
        staged.unlink(missing_ok=True)


@dataclass(frozen=True)
class Archive:
    """An open file; chunks are read and verified when they are asked for.

    places: where the object of each chunk begins, and its bytes.
    """

    path: Path
    manifest: Manifest
    places: Mapping[bytes, tuple[int, int]]
    _descriptor: int

    def read(self, key: bytes, shape: ChunkShape) -> list[memoryview]:
        """The layers of a chunk, from any thread; DataLossError names the file and the chunk."""
        if key not in self.places:
            raise _damaged(self.path, f"it ends before chunk {key.hex()}")
        try:
            return decode_chunk(_read(self._descriptor, *self.places[key]), key, shape)
        except DataLossError as error:
            raise _damaged(self.path, error) from None


@contextlib.contextmanager
def open_archive(path: Path, origin: Origin) -> Iterator[Archive]:
    """Open a file.

    Raises FileNotFoundError, DataLossError, PreconditionError for another model's file, AccessError or
    UnavailableError for one that cannot be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise _unreadable(path, error) from None
    try:
        try:
            places = list(_places(descriptor))
            manifest = decode_manifest(_read(descriptor, *places[0]) if places else b"", NAME)
        except DataLossError as error:
            raise _damaged(path, error) from None
        except OSError as error:
            raise _unreadable(path, error) from None
        check_compatible(manifest, origin)
        yield Archive(path, manifest, dict(zip(manifest.keys, places[1:], strict=False)), descriptor)
    finally:
        os.close(descriptor)


def _places(descriptor: int) -> Iterator[tuple[int, int]]:
    """Where the parts of a file are."""
    length = os.fstat(descriptor).st_size
    if bytes(_read(descriptor, 0, len(_MAGIC))) != _MAGIC:
        raise DataLossError("it does not begin as a prompt cache of numoe does")
    at = len(_MAGIC)
    while at < length:
        begin = at + _SIZE.size
        size = _SIZE.unpack(_read(descriptor, at, _SIZE.size))[0] if begin <= length else length
        if begin + size > length:
            raise DataLossError(f"it ends after {length} bytes, in the middle")
        yield begin, size
        at = begin + size


def _read(descriptor: int, at: int, nbytes: int) -> memoryview:
    """Bytes of a file; fewer at its end."""
    data = np.empty(nbytes, np.uint8)
    filled = 0
    while filled < nbytes and (count := os.preadv(descriptor, [data[filled:].data], at + filled)):
        filled += count
    return data[:filled].data.toreadonly()


def _unreadable(path: Path, error: OSError) -> NumoeError:
    kind = AccessError if isinstance(error, PermissionError) else UnavailableError
    return kind(f"{path} cannot be read: {error.strerror}; name another --prompt-cache")


def _damaged(path: Path, how: object) -> DataLossError:
    return DataLossError(f"the prompt cache {path} is damaged: {how}; remove the file or name another one")
