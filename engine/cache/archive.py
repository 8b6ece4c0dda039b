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
from pathlib import Path
from typing import TYPE_CHECKING, Final

from numoe.engine.errors import DataLossError, ResourceError, UnavailableError
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


def read_archive(path: Path, origin: Origin) -> tuple[Manifest, Mapping[bytes, memoryview]]:
    """The manifest and the chunks by key, not verified yet.

    Raises FileNotFoundError, DataLossError, and PreconditionError for another model's file.
    """
    parts = _parts(path)
    manifest = decode_manifest(next(parts), NAME)
    check_compatible(manifest, origin)
    return manifest, dict(zip(manifest.keys, parts, strict=False))


def _parts(path: Path) -> Iterator[memoryview]:
    data = memoryview(path.read_bytes())
    if bytes(data[: len(_MAGIC)]) != _MAGIC:
        raise DataLossError(f"{path} is not a prompt cache of numoe; remove it or name another file")
    at = len(_MAGIC)
    while at < data.nbytes:
        end = at + _SIZE.size
        size = _SIZE.unpack(data[at:end])[0] if end <= data.nbytes else data.nbytes
        if end + size > data.nbytes:
            raise DataLossError(f"{path} ends after {data.nbytes} bytes, in the middle; remove it")
        yield data[end : end + size]
        at = end + size
