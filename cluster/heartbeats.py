"""Whether shards show signs of life: each counts in the mailbox, at work and while it waits."""

from __future__ import annotations

import time
from pathlib import Path

from numoe.engine.experts.mailbox import HEARTBEAT, Mailbox, MailboxLayout

_STILL_S = 5.0
"""A shard beats at least ten times a second unless it has no processor."""


class Heartbeats:
    """The heartbeats of a server's shards, as they are looked at from time to time."""

    def __init__(self, folder: Path, layout: MailboxLayout | None) -> None:
        self._beats = None
        if layout is not None:
            self._mailbox = Mailbox.attach(str(folder / "mailbox"), layout)
            self._beats = self._mailbox.shard_words(HEARTBEAT)
        self._seen: dict[int, tuple[int, float]] = {}

    def is_still(self, shard: int, since: float) -> bool:
        """Whether a shard that has been up since then, `time.monotonic`, has not beaten for longer than that takes."""
        if self._beats is None:
            return False
        now, beat = time.monotonic(), int(self._beats[shard])
        seen, when = self._seen.get(shard, (-1, now))
        if beat != seen:
            self._seen[shard] = beat, now
            return False
        return now - max(when, since) > _STILL_S
