"""Which process on which host an actor is."""

from __future__ import annotations

import os
import socket

import msgspec

from numoe.cluster.signals import die_of_sigterm


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """A process."""

    pid: int
    host: str


def identity() -> Identity:
    """Identify the calling process, which from now on is an actor's: whoever ends it, it is replaced."""
    die_of_sigterm()
    return Identity(pid=os.getpid(), host=socket.gethostname())
