"""Which model file, in which state, weights were loaded from."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Final

from blake3 import blake3

_PACKERS: Final = ("formats", "weights", "cpu/packing.py", "experts/shard.py", "worker/weights.py")
"""What decides how the bytes of a slice lie; the layouts are the same for every instruction set."""


def source_fingerprint(paths: Iterable[str | Path]) -> str:
    """32 hexadecimal digits for the files of a model as they are now: device, inode, size and times of each.

    No name and no path. Weights in shared memory never outlive the host's uptime, and for so long an
    inode whose times did not change holds the same bytes, so nothing needs to be read for it.
    """
    digest = blake3(b"numoe source")
    for path in paths:
        status = Path(path).stat()
        fields = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        digest.update(f"{fields}".encode())
    return digest.hexdigest(length=16)


@cache
def layout_identity() -> str:
    """8 hexadecimal digits for how this state of the sources packs weights."""
    engine, digest = Path(__file__).resolve().parent.parent, blake3(b"numoe layout")
    for part in _PACKERS:
        found = engine / part
        for source in sorted(found.glob("*.py")) if found.is_dir() else [found]:
            digest.update(source.read_bytes())
    return digest.hexdigest(length=4)
