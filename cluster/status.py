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


class ActorPlacement(msgspec.Struct, frozen=True, kw_only=True):
    """Where an actor's weights lie and its threads run, as measured.

    nodes: the NUMA nodes where they should be, none for anywhere. weight_bytes: in memory of the kind
    `medium`. on_nodes: the part of the pages that lie there, None if nobody can tell. huge: the part in huge
    pages. cpus: of the threads, one each, none if they are not pinned. ran_on: where each of them ran last.
    read_bytes_s: weights read by decode steps, while they were being read, None before the first.
    bandwidth_share: the part of what was measured to be possible, None if nothing was. problem: why the weights do
    not lie where they should, and what helps; empty if they do.
    """

    nodes: tuple[int, ...]
    weight_bytes: int
    medium: str
    on_nodes: float | None
    huge: float
    cpus: tuple[int, ...]
    ran_on: tuple[int, ...]
    read_bytes_s: float | None = None
    bandwidth_share: float | None = None
    problem: str = ""


class ActorInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One process of the server.

    numa_node: None where it is bound to none. placement: None where it computes nothing on CPUs.
    """

    role: ActorRole
    pid: int
    host: str
    numa_node: int | None = None
    state: ActorState = "running"
    restarts: int = 0
    placement: ActorPlacement | None = None


class LoadProgress(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes loaded by one actor ("attention", "experts 0", …) in `seconds`; note: what it does besides."""

    name: str
    done: int
    total: int
    seconds: float
    note: str = ""
