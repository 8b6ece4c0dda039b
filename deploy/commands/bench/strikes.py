"""What `numoe bench chaos` does to a server: signals at random to any of its processes, and what is left then."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
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
_PATIENCE_S = 20.0


@dataclass(frozen=True)
class Strike:
    """A process that was struck: when (`time.monotonic`), its role, and how ("kill" or "stop")."""

    at: float
    role: str
    how: str


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

    def waiters(self) -> list[str]:
        """Waiters that the mailbox of an idle server counts, but who do not exist."""
        layout = self._plan.mailbox
        if layout is None:
            return []
        box, until = Mailbox.attach(str(self.folder / "mailbox"), layout), time.monotonic() + _PATIENCE_S
        while True:
            wrong = [f"{count} wait for shard {n}" for n, count in enumerate(box.shard_words(REPLY_SLEEPERS)) if count]
            for shard, count in zip(self._plan.shards, box.shard_words(REQUEST_SLEEPERS), strict=True):
                if count > shard.threads:
                    wrong.append(f"{count} of {shard.threads} threads of shard {shard.index} wait for a request")
            if not wrong or time.monotonic() > until:
                return wrong
            time.sleep(0.1)

    def left_over(self) -> list[str]:
        """Processes and shared memory that are there although the server is gone."""
        until = time.monotonic() + _PATIENCE_S
        while (left := [*self._left()]) and time.monotonic() < until:
            time.sleep(0.2)
        return left

    def _left(self) -> Iterator[str]:
        for pid, process in self.seen.items():
            with suppress(psutil.NoSuchProcess):
                if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                    yield f"process {pid}"
        yield from map(str, filter(Path.exists, [self.folder]))
        ours = {key.path for key in self._plan.slices}
        yield from (str(found.path) for found in stored_slices() if found.path in ours and not found.in_use)


def _processes(record: ServerRecord) -> Iterator[tuple[str, int, str]]:
    yield "supervisor", record.pid, record.host
    yield from ((member.role, member.pid, member.host) for member in record.members)


def strike_at_random(victims: Victims, strikes: list[Strike], seed: int, until: float, done: threading.Event) -> None:
    """Strike until then, `time.monotonic`, or until `done`: any process as likely as any other."""
    chance = random.Random(seed)  # noqa: S311 - no secret
    while time.monotonic() < until and not done.wait(chance.uniform(_SHORTEST_S, _LONGEST_S)):
        targets = [(role, pid) for role, pids in victims.look().items() for pid in pids]
        how = chance.choice(list(SIGNALS))
        if targets:
            role, pid = chance.choice(targets)
            with suppress(ProcessLookupError):  # it is dead already
                strikes.append(Strike(time.monotonic(), role, how))
                os.kill(pid, SIGNALS[how])
