"""Which process on which host an actor is."""

from __future__ import annotations

import os
import socket

import msgspec


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """A process."""

    pid: int
    host: str


def identity() -> Identity:
    """Identify the calling process."""
    return Identity(pid=os.getpid(), host=socket.gethostname())
