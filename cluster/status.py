"""What the supervisor tells about the actors."""

from __future__ import annotations

from typing import Literal

import msgspec

SAVE_S = 60.0
"""Seconds in which a worker that stops may write its conversations to the store."""
TAKE_DOWN_S = SAVE_S + 30.0
"""Seconds that a server may take to end, after those of its running requests."""

ActorRole = Literal["gateway", "attention", "expert", "supervisor"]
ActorState = Literal["starting", "running", "restarting", "draining", "dead"]


class ActorInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One process of the server; `numa_node` is None where it is bound to none."""

    role: ActorRole
    pid: int
    host: str
    numa_node: int | None = None
    state: ActorState = "running"
    restarts: int = 0


class LoadProgress(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes loaded by one actor ("attention", "experts 0", …) in `seconds`."""

    name: str
    done: int
    total: int
    seconds: float
