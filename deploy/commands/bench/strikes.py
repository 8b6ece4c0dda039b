"""What `numoe bench chaos` does to a server: signals at random to any of its processes, and what is left then."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

from numoe.cluster.member import ServerRecord, is_local
from numoe.cluster.plan import Plan
from numoe.engine import shm
from numoe.engine.experts.mailbox import REPLY_SLEEPERS, REQUEST_SLEEPERS, Mailbox
from numoe.engine.weights import stored_slices

SIGNALS: Final = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}
_SHORTEST_S, _LONGEST_S = 0.3, 3.0  # between strikes
_ALONE_EVERY = 5
_ALONE_S = 6.0  # without another strike after one that is alone
_PATIENCE_S = 20.0
_LOOK_S = 0.2
_GONE: Final = (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)


@dataclass(frozen=True)
class Strike:
    """A process that was struck: when (`time.monotonic`), its role, and how ("kill" or "stop").

    alone: the server had recovered from all others before, and had time to recover from this one.
    """

    at: float
    role: str
    how: str
    alone: bool = False


class Victims:
    """The processes of a server on this host, as its folder tells them."""

    def __init__(self, instance: str, plan: Plan) -> None:
        self.folder, self._plan = shm.ROOT / instance, plan
        self.seen: dict[int, psutil.Process] = {}

    def look(self) -> dict[str, list[int]]:
        """The process ids by role."""
        found: dict[str, list[int]] = {}
        record = ServerRecord.load(self.folder)
        for role, pid, host in _processes(record) if record is not None else ():
            if is_local(pid, host):
                with suppress(psutil.NoSuchProcess):
                    self.seen.setdefault(pid, psutil.Process(pid))
                    found.setdefault(role, []).append(pid)
        return found

    @property
    def is_whole(self) -> bool:
        """Whether every process of the server is there and runs."""
        record = ServerRecord.load(self.folder)
        return record is not None and all(
            [
                *(member.state == "running" for member in record.members),
                *(_is_running(pid) for _, pid, host in _processes(record) if is_local(pid, host)),
            ]
        )

    def strays(self) -> list[str]:
        """What an idle server that is whole has and should not.

        Processes that were replaced, or that use its shared memory without being of it; files that were being written
        when their writer died; in the mailbox, waiters that do not exist.
        """
        return _patiently(self._strays)

    def left_over(self) -> list[str]:
        """Processes and shared memory that are there although the server is gone."""
        return _patiently(self._left)

    def _strays(self) -> Iterator[str]:
        own = {pid for pids in self.look().values() for pid in pids}
        yield from (f"process {pid}, which was replaced" for pid in self._living() - own)
        yield from (f"process {pid} with the server's memory" for pid in users_of(self.folder) - own)
        yield from map(str, self.folder.glob(".*"))
        yield from self._waiters()

    def _waiters(self) -> Iterator[str]:
        layout = self._plan.mailbox
        if layout is None:
            return
        box = Mailbox.attach(str(self.folder / "mailbox"), layout)
        waiting = box.shard_words(REPLY_SLEEPERS).tolist(), box.shard_words(REQUEST_SLEEPERS).tolist()
        box.close()
        yield from (f"{count} wait for shard {shard}" for shard, count in enumerate(waiting[0]) if count)
        for shard, count in zip(self._plan.shards, waiting[1], strict=True):
            if count > shard.threads:
                yield f"{count} of {shard.threads} threads of shard {shard.index} wait for a request"

    def _left(self) -> Iterator[str]:
        yield from (f"process {pid}" for pid in self._living() | users_of(self.folder))
        yield from map(str, filter(Path.exists, [self.folder]))
        ours = {key.path for key in self._plan.slices}
        yield from (str(found.path) for found in stored_slices() if found.path in ours and not found.in_use)

    def _living(self) -> set[int]:
        """Those that were seen at any time, and still are there."""
        living = set()
        for pid, process in self.seen.items():
            with suppress(psutil.NoSuchProcess):
                if process.is_running() and process.status() not in _GONE:
                    living.add(pid)
        return living


def _patiently(look: Callable[[], Iterator[str]]) -> list[str]:
    """What is found again and again."""
    until = time.monotonic() + _PATIENCE_S
    while (found := [*look()]) and time.monotonic() < until:
        time.sleep(_LOOK_S)
    return found


def users_of(folder: Path) -> set[int]:
    """The processes of this user, but this one, that have mapped a file of a folder, be it removed or not."""
    found = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):  # gone, or another user's
            if f" {folder}/" in maps.read_text():
                found.add(int(maps.parent.name))
    return found - {os.getpid()}


def _is_running(pid: int) -> bool:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() not in (*_GONE, psutil.STATUS_STOPPED)
    return False


def _processes(record: ServerRecord) -> Iterator[tuple[str, int, str]]:
    yield "supervisor", record.pid, record.host
    yield from ((member.role, member.pid, member.host) for member in record.members)


def strike_at_random(
    victims: Victims, strikes: list[Strike], seed: int, until: float, done: threading.Event, *, calm_s: float
) -> None:
    """Strike until then, `time.monotonic`, or until `done`: any process as likely as any other.

    calm_s: without another strike before one that is alone, once all processes run.
    """
    chance = random.Random(seed)  # noqa: S311 - no secret
    while time.monotonic() < until and not done.is_set():
        alone = len(strikes) % _ALONE_EVERY == _ALONE_EVERY - 1
        if alone:
            while not victims.is_whole and time.monotonic() < until:
                done.wait(_LOOK_S)
            alone = victims.is_whole
        done.wait(calm_s if alone else chance.uniform(_SHORTEST_S, _LONGEST_S))
        targets = [(role, pid) for role, pids in victims.look().items() for pid in pids]
        how = chance.choice(list(SIGNALS))
        if targets and not done.is_set():
            role, pid = chance.choice(targets)
            strikes.append(Strike(time.monotonic(), role, how, alone))
            try:
                os.kill(pid, SIGNALS[how])
            except ProcessLookupError:  # it was dead already
                strikes.pop()
                continue
        done.wait(_ALONE_S if alone else 0.0)
