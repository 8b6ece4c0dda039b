"""Which process on which host an actor is."""

from __future__ import annotations

import os
import socket

import msgspec


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """A process; numa_node is None where it is bound to none."""

    pid: int
    host: str
    numa_node: int | None = None


def identity(numa_node: int | None = None) -> Identity:
    """Identify the calling process."""
    return Identity(pid=os.getpid(), host=socket.gethostname(), numa_node=numa_node)
