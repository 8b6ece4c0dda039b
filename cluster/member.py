"""One of a server's actors, as its supervisor sees it, and what a restarted supervisor has to know."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import msgspec
import psutil
import ray

from numoe.cluster.status import ActorInfo, ActorPlacement, ActorRole, ActorState
from numoe.engine.reserved import make_reserved, read_reserved, rewrite

_EXIT_TIMEOUT_S = 10.0
_STABLE_S = 2.0
_FILE, _FILE_BYTES = "server", 128 << 10
Phase = Literal["launching", "running", "draining", "stopping"]


class MemberRecord(msgspec.Struct, frozen=True):
    """What is remembered of a `Member`; `actor` is its name in Ray."""

    role: ActorRole
    name: str
    actor: str
    state: ActorState
    pid: int
    host: str
    index: int
    numa_node: int | None
    restarts: int
    crashes: int
    since: float


class ServerRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A server in its folder.

    joined: the worker's and the gateway's actor that are connected, `connection` their number. restarts: of the
    supervisor, whose process and host are `pid` and `host`. drain_until: when running requests are cut off that were
    still there when the server was told to stop, seconds since 1970. keep_weights: they stay when it is down.
    """

    phase: Phase = "launching"
    members: tuple[MemberRecord, ...] = ()
    address: str = ""
    connection: int = 0
    joined: tuple[str, str] = ("", "")
    keep_weights: bool = False
    drain_until: float = 0.0
    restarts: int = 0
    pid: int = 0
    host: str = ""

    @classmethod
    def load(cls, folder: Path) -> Self | None:
        """What was saved last; None if nothing was."""
        try:
            found = read_reserved(folder / _FILE)
        except FileNotFoundError:
            return None
        return None if found is None else msgspec.msgpack.decode(found, type=cls)

    @property
    def processes(self) -> list[tuple[int, str]]:
        """Process id and host of everybody, the supervisor first."""
        return [(self.pid, self.host), *((member.pid, member.host) for member in self.members)]

    def save(self, folder: Path) -> None:
        """Write it to the server's folder, also where shared memory is full."""
        rewrite(folder / _FILE, msgspec.msgpack.encode(self))

    @staticmethod
    def reserve(folder: Path) -> None:
        """Make room for it; ResourceError if there is none."""
        make_reserved(folder / _FILE, _FILE_BYTES)


@dataclass(eq=False)
class Member:
    """An actor and its process. index: of a shard. run: its pending call, which ends when it does.

    crashes: how often in a row it has died soon after it came up. since: when it came up, `time.monotonic`.
    """

    role: ActorRole
    name: str
    index: int = 0
    numa_node: int | None = None
    actor: str = ""
    handle: Any = None
    state: ActorState = "starting"
    pid: int = 0
    host: str = ""
    run: Any = None
    restarts: int = 0
    crashes: int = 0
    since: float = field(default_factory=time.monotonic)

    @classmethod
    def of(cls, record: MemberRecord) -> Self:
        """The member that was remembered; its actor is None if there is none any more."""
        fields = msgspec.structs.asdict(record)
        try:
            handle = ray.get_actor(record.actor)
        except ValueError:
            handle = None
        return cls(**fields, handle=handle)

    def record(self) -> MemberRecord:
        """What to remember."""
        return MemberRecord(
            self.role, self.name, self.actor, self.state, self.pid, self.host, self.index, self.numa_node,
            self.restarts, self.crashes, self.since,
        )  # fmt: skip

    def info(self, placement: ActorPlacement | None = None) -> ActorInfo:
        """What users are shown."""
        return ActorInfo(
            role=self.role,
            pid=self.pid,
            host=self.host,
            numa_node=self.numa_node,
            state=self.state,
            restarts=self.restarts,
            placement=placement,
        )

    @property
    def is_local(self) -> bool:
        """Whether its process is on this host, and known."""
        return is_local(self.pid, self.host)

    def is_stopped(self) -> bool:
        """Whether its process has been stopped."""
        return is_stopped(self.pid, self.host)

    def came_up(self) -> None:
        """It serves now."""
        self.state, self.since = "running", time.monotonic()

    def died(self) -> None:
        """It does not any more."""
        if self.state == "running":  # else that was counted before the supervisor died, too
            self.crashes = self.crashes + 1 if time.monotonic() - self.since < _STABLE_S else 0
            self.restarts += 1
        self.state, self.run = "restarting", None

    def kill(self) -> None:
        """End its process, whatever it is doing, and wait until it is gone: port, GPU and weights are free then."""
        if self.handle is not None:
            ray.kill(self.handle)
        if self.is_local:
            end_processes([self.pid])


class Replaced:
    """Which actors other processes have taken the place of, as a server's record is looked at from time to time."""

    def __init__(self) -> None:
        self._pids: dict[str, int] = {}

    def lines(self, record: ServerRecord) -> Iterator[str]:
        """What there is to tell since the last look."""
        running = {member.name: member.pid for member in record.members if member.state == "running"}
        for name, pid in (running | {"supervisor": record.pid}).items():
            before = self._pids.setdefault(name, pid)
            if pid != before:
                yield f"{name} (pid {before}) died or hung; pid {pid} has taken its place"
                self._pids[name] = pid


def end_processes(pids: Iterable[int]) -> None:
    """Kill processes of this host and wait until they are gone: until then they use weights, ports and GPUs."""
    processes = []
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            processes.append(psutil.Process(pid))
            processes[-1].kill()
    psutil.wait_procs(processes, timeout=_EXIT_TIMEOUT_S)


def is_local(pid: int, host: str) -> bool:
    """Whether a process is on this host, and known."""
    return pid > 0 and host == socket.gethostname()


def is_stopped(pid: int, host: str) -> bool:
    """Whether a process of this host has been stopped (SIGSTOP), which Ray does not notice."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return is_local(pid, host) and psutil.Process(pid).status() == psutil.STATUS_STOPPED
    return False
