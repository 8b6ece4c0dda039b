r"""A conversation in one file (`--prompt-cache FILE`): its manifest, then its chunks.

    magic "numoePC\n", bytes of the manifest u64, the manifest (`store/manifest.py`)
    for each chunk, in order: bytes u64, the object (`store/chunks.py`)

The file is written beside its place and renamed, so that there is always the old one or the new one.
"""

from __future__ import annotations

import errno
import os
import secrets
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from numoe.engine.errors import AccessError, DataLossError, ResourceError, UnavailableError
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
    """Write a conversation; ResourceError or UnavailableError, and the old file stays, where that fails."""
    staged = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        staged.touch(mode=0o600, exist_ok=False)
        with staged.open("wb") as file:
            file.write(_MAGIC)
            for part in (encode_manifest(manifest), *chunks):
                file.write(_SIZE.pack(memoryview(part).nbytes))
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        staged.replace(path)
    except OSError as error:
        staged.unlink(missing_ok=True)
        kind = ResourceError if error.errno in _FULL else UnavailableError
        raise kind(f"{path} cannot be written: {error.strerror}; name another --prompt-cache") from None


@dataclass(frozen=True)
class Archive:
    """What a file holds; the chunks are verified when they are asked for."""

    path: Path
    manifest: Manifest
    chunks: Mapping[bytes, memoryview]

    def read(self, key: bytes, shape: ChunkShape) -> list[memoryview]:
        """The layers of a chunk; DataLossError names the file and the chunk."""
        if key not in self.chunks:
            raise _damaged(self.path, f"it ends before chunk {key.hex()}")
        try:
            return decode_chunk(self.chunks[key], key, shape)
        except DataLossError as error:
            raise _damaged(self.path, error) from None


def read_archive(path: Path, origin: Origin) -> Archive:
    """Open a file.

    Raises FileNotFoundError, DataLossError, PreconditionError for another model's file, AccessError or
    UnavailableError for one that cannot be read.
    """
    try:
        parts = _parts(path)
        manifest = decode_manifest(next(parts, b""), NAME)
        check_compatible(manifest, origin)
        return Archive(path, manifest, dict(zip(manifest.keys, parts, strict=False)))
    except DataLossError as error:
        raise _damaged(path, error) from None
    except FileNotFoundError:
        raise
    except OSError as error:
        kind = AccessError if isinstance(error, PermissionError) else UnavailableError
        raise kind(f"{path} cannot be read: {error.strerror}; name another --prompt-cache") from None


def _parts(path: Path) -> Iterator[memoryview]:
    data = memoryview(path.read_bytes())
    if bytes(data[: len(_MAGIC)]) != _MAGIC:
        raise DataLossError("it does not begin as a prompt cache of numoe does")
    at = len(_MAGIC)
    while at < data.nbytes:
        end = at + _SIZE.size
        size = _SIZE.unpack(data[at:end])[0] if end <= data.nbytes else data.nbytes
        if end + size > data.nbytes:
            raise DataLossError(f"it ends after {data.nbytes} bytes, in the middle")
        yield data[end : end + size]
        at = end + size


def _damaged(path: Path, how: object) -> DataLossError:
    return DataLossError(f"the prompt cache {path} is damaged: {how}; remove the file or name another one")
