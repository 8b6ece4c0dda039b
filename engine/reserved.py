"""Small files that can be rewritten where there is no room any more, and are whole whoever dies while he writes.

The room for two versions is taken when a file is made. A version has a number and a digest and is written over the
older one, so that the newer one stays until the next is whole.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

from blake3 import blake3

from numoe.engine.errors import ResourceError

_HEADER = struct.Struct("<QI16s")  # the version's number, its bytes, their digest with both
_LOOKS = 3


def make_reserved(path: Path, nbytes: int) -> None:
    """Make a file, private to this user, for contents of up to `nbytes` bytes; ResourceError if there is no room."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, 2 * (_HEADER.size + nbytes))
    except OSError as error:
        path.unlink(missing_ok=True)
        raise ResourceError(f"there is no room for {path} ({error.strerror}): make some on {path.parent}") from None
    finally:
        os.close(descriptor)


def rewrite(path: Path, content: bytes) -> None:
    """Put a content in the place of the one before. One writer at a time.

    Raises OSError where the file is gone, and ResourceError for more bytes than it was made for.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    with os.fdopen(descriptor, "r+b", buffering=0) as file:
        versions = _versions(file.read())
        half = os.fstat(descriptor).st_size // 2
        if _HEADER.size + len(content) > half:
            raise ResourceError(f"{path} has room for {half - _HEADER.size} bytes, not for {len(content)}")
        number = max(versions)[0] + 1
        oldest = min(range(2), key=lambda index: versions[index][0])
        header = _HEADER.pack(number, len(content), _digest(number, content))
        os.pwrite(descriptor, header + content, oldest * half)


def read_reserved(path: Path) -> bytes | None:
    """The content that was written last, None if none ever was. Raises OSError where there is no file."""
    for _ in range(_LOOKS):  # somebody may have written both versions while they were read
        number, content = max(_versions(path.read_bytes()))
        if number:
            return content
    return None


def _versions(file: bytes) -> list[tuple[int, bytes]]:
    """Number and content of the two versions; of one that is not whole 0 and nothing."""
    half, found = len(file) // 2, list[tuple[int, bytes]]()
    if half < _HEADER.size:  # it is just being made
        return [(0, b"")] * 2
    for start in (0, half):
        number, length, digest = _HEADER.unpack_from(file, start)
        begin = start + _HEADER.size
        content = file[begin : begin + length]
        whole = number > 0 and length <= half - _HEADER.size and digest == _digest(number, content)
        found.append((number, content) if whole else (0, b""))
    return found


def _digest(number: int, content: bytes) -> bytes:
    return blake3(_HEADER.pack(number, len(content), bytes(16)) + content).digest(length=16)
