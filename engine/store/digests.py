"""Digests of tensors, remembered between runs: reading a model of 250 GB again takes a minute."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import time
from pathlib import Path
from typing import Final

import msgspec
from blake3 import blake3

from numoe.engine.cpu.isa import cache_root

logger = logging.getLogger(__name__)

_FORMAT: Final = "sums of units"  # see engine/weights/contents.py: what is remembered of another kind is not found
_SETTLED_SECONDS: Final = 2.0
"""A file that was written less long ago may change again without its time changing."""


class DigestCache:
    """A folder of files, one for each file of a model as it was at some time.

    A missing, damaged or unwritable cache costs time and nothing else.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = cache_root() / "digests" if folder is None else folder

    def load(self, status: os.stat_result) -> dict[str, bytes] | None:
        """The digests by tensor of the file with this status, if they are known."""
        try:
            data = self._path(status).read_bytes()
            if blake3(data[32:]).digest() != data[:32]:
                return None
            return msgspec.msgpack.decode(data[32:], type=dict[str, bytes])
        except (OSError, msgspec.DecodeError):
            return None

    def save(self, before: os.stat_result, after: os.stat_result, digests: dict[str, bytes]) -> None:
        """Remember what was computed between two looks at the file, unless it changed or still may."""
        if _identity(before) != _identity(after) or time.time() - before.st_mtime < _SETTLED_SECONDS:
            return
        data = msgspec.msgpack.encode(digests)
        path = self._path(before)
        staged = path.with_suffix(f".{secrets.token_hex(8)}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                staged.write_bytes(blake3(data).digest() + data)
                staged.rename(path)
            finally:
                with contextlib.suppress(FileNotFoundError):
                    staged.unlink()
        except OSError as error:
            logger.warning("the digests of the model's tensors cannot be kept in %s: %s", path.parent, error)

    def _path(self, status: os.stat_result) -> Path:
        return self._folder / blake3(_identity(status).encode()).hexdigest()


def _identity(status: os.stat_result) -> str:
    return f"{_FORMAT} {status.st_dev} {status.st_ino} {status.st_size} {status.st_mtime_ns}"
