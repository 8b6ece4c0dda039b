"""Whether actors show signs of life.

A shard counts in the mailbox, at work and while it waits. The others answer calls. Whoever looks may have been kept
from looking himself, and then finds everything late: so it takes two looks in a row.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from numoe.cluster.member import Member
from numoe.engine.experts.mailbox import HEARTBEAT, Mailbox, MailboxLayout

_STILL_S = 5.0
"""A shard beats at least ten times a second unless it has no processor."""
_ASK_S, _SILENT_S = 2.0, 15.0
"""How often actors are asked, and how long they may take: an answer needs no more than a turn of the event loop."""
_LOOKS = 2


class SignsOfLife:
    """Those of a server's members, as they are looked at from time to time."""

    def __init__(self, folder: Path, layout: MailboxLayout | None) -> None:
        self._beats, self._stopped = Heartbeats(folder, layout), Counter[int]()
        self._pulses: dict[str, Pulse] = {}

    def why_hung(self, member: Member) -> str:
        """Why a member is taken for hung, empty if it is not, or is dead: that is noticed elsewhere.

        Its process may be stopped at any time; of one that is up, more is asked.
        """
        self._stopped[member.pid] = self._stopped[member.pid] + 1 if member.is_stopped() else 0
        if self._stopped[member.pid] >= _LOOKS:
            return "is stopped"
        if member.run is None:
            return ""
        if member.role == "expert":
            return "shows no sign of life" if self._beats.is_still(member.index, member.since) else ""
        if member.actor not in self._pulses:
            self._pulses[member.actor] = Pulse(member.handle)
        return self._pulses[member.actor].why_hung()


class Heartbeats:
    """The heartbeats of a server's shards, as they are looked at from time to time."""

    def __init__(self, folder: Path, layout: MailboxLayout | None) -> None:
        self._beats = None
        if layout is not None:
            self._mailbox = Mailbox.attach(str(folder / "mailbox"), layout)
            self._beats = self._mailbox.shard_words(HEARTBEAT)
        self._seen: dict[int, tuple[int, float]] = {}
        self._late = Counter[int]()

    def is_still(self, shard: int, since: float) -> bool:
        """Whether a shard that has been up since then, `time.monotonic`, has not beaten for longer than that takes."""
        if self._beats is None:
            return False
        now, beat = time.monotonic(), int(self._beats[shard])
        seen, when = self._seen.get(shard, (-1, now))
        if beat != seen:
            self._seen[shard] = beat, now
        is_late = beat == seen and now - max(when, since) > _STILL_S
        self._late[shard] = self._late[shard] + 1 if is_late else 0
        return self._late[shard] >= _LOOKS


class Pulse:
    """Whether an actor answers `pulse`, a Ray call that tells why it hangs although it can answer."""

    def __init__(self, handle: Any) -> None:
        self._handle, self._late = handle, 0
        self._ask()

    def _ask(self) -> None:
        self._call, self._asked, self._answered = self._handle.pulse.remote(), time.monotonic(), False

    def why_hung(self) -> str:
        """Why it is taken for hung, empty if it is not. Of one that has died, others hear."""
        waited, why = time.monotonic() - self._asked, ""
        if self._answered:
            if waited > _ASK_S:
                self._ask()
            return ""
        if ray.wait([self._call], timeout=0)[0]:
            self._answered = True
            with contextlib.suppress(RayError):
                why = str(ray.get(self._call))
        elif waited > _SILENT_S:
            why = f"has not answered for {waited:.0f} s"
        else:
            return ""
        self._late = self._late + 1 if why else 0
        return why if self._late >= _LOOKS else ""
