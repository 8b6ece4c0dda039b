"""Conversations without a slot, and idle ones, on their way to the store, and out of it when they are erased."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

from numoe.engine.cache import Snapshots, StoreTier
from numoe.engine.cache.health import OUTAGES
from numoe.engine.errors import NumoeError
from numoe.engine.scheduler.conversation import Parked

logger = logging.getLogger(__name__)
_LATER: Final = 256
"""Jobs at most that wait for others, or for a store which does not work; the oldest are given up."""


class Parking:
    """A thread that writes one conversation after the other; each method may be called from any thread.

    done: takes a conversation when it is written, or cannot be for now: its pages need not hold it any more;
    and whether it is written. lost: how many could not be written, and will not be tried again; failure: why the last.
    """

    def __init__(self, snapshots: Snapshots, tier: StoreTier, done: Callable[[Parked, bool], None]) -> None:
        self._snapshots, self._tier, self._done = snapshots, tier, done
        self._changed = threading.Condition()
        self._queue: deque[Parked | str] = deque()
        self._later: deque[Parked | str] = deque(maxlen=_LATER)
        self._busy = self._closed = False
        self.lost, self.failure = 0, ""
        threading.Thread(target=self._run, name="cache-park", daemon=True).start()

    def park(self, parked: Parked) -> None:
        """Write a conversation, so that it can come back after a restart."""
        self._put(parked)

    def keep(self, idle: Sequence[Parked]) -> None:
        """Write conversations that stay in their slots, when none is left whose pages somebody may wait for."""
        with self._changed:
            for parked in idle:
                self._leave_out({parked.name, *parked.conversation.stored})
                self._later.append(parked)
            self._changed.notify_all()

    def unpark(self, name: str) -> None:
        """Remove one that was erased (`Conversation.stored`)."""
        self._put(name)

    def flush(self, deadline: float) -> int:
        """Wait until all is done or cannot be done, at most until `time.monotonic()` is `deadline`.

        A store that did not work is tried once more. Returns how many conversations are not written yet.
        """
        with self._changed:
            self._tier.writing.try_now()
            self._changed.notify_all()
            self._changed.wait_for(
                lambda: not self._queue and not self._busy and (not self._later or self._tier.writing.seconds_to_wait),
                max(0.0, deadline - time.monotonic()),
            )
            return self._busy + sum(isinstance(job, Parked) for job in (*self._queue, *self._later))

    def close(self) -> None:
        """Stop the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _put(self, job: Parked | str) -> None:
        with self._changed:
            self._queue.append(job)
            self._changed.notify_all()

    def _run(self) -> None:
        while (job := self._next()) is not None:
            written = False
            try:
                written = self._do(job)
            except Exception as error:  # the next one may work
                logger.warning("a conversation could not be kept", exc_info=not isinstance(error, NumoeError))
                self.lost, self.failure = self.lost + isinstance(job, Parked), str(error)
            finally:
                if isinstance(job, Parked):
                    self._done(job, written)
                with self._changed:
                    self._busy = False
                    self._changed.notify_all()

    def _next(self) -> Parked | str | None:
        """Wait for something to do; None after `close`."""
        with self._changed:
            while not self._closed:
                pause = self._tier.writing.seconds_to_wait
                if self._queue or (self._later and not pause):
                    self._busy = True
                    return (self._queue or self._later).popleft()
                self._changed.wait(pause if self._later else None)
        return None

    def _do(self, job: Parked | str) -> bool:
        """Whether it is done; else it was put off."""
        with self._changed:
            self._leave_out({job} if isinstance(job, str) else {job.name, *job.conversation.stored})
            if self._tier.writing.seconds_to_wait:
                self._put_off(job)
                return False
        try:
            with self._tier.writing.watch():
                if isinstance(job, str):
                    self._snapshots.unpark(job)
                else:
                    self._snapshots.park(job)
        except OUTAGES as error:
            logger.info("a conversation is kept later: %s", error)
            with self._changed:
                self._put_off(job)
            return False
        return True

    def _put_off(self, job: Parked | str) -> None:
        self._later.append(job if isinstance(job, str) else replace(job, pages={}))

    def _leave_out(self, names: set[str]) -> None:
        """Write no conversation later that has been erased since, or that another goes on from."""
        for job in list(self._later):
            if isinstance(job, Parked) and job.name in names:
                self._later.remove(job)
