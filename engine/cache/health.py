"""Whether a store works. One that fails is left alone for a while, which grows from failure to failure."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from typing import Final

from numoe.engine.errors import AccessError, ResourceError, UnavailableError

logger = logging.getLogger(__name__)
OUTAGES: Final = (UnavailableError, AccessError, ResourceError)
"""What a store raises that may work later."""
_FIRST_PAUSE_S: Final = 1.0
_LONGEST_PAUSE_S: Final = 60.0


class Health:
    """Of reading from a store, or of writing to it: so no request waits for it twice.

    error: why the store is left alone, or empty. unreachable: whether that is because it did not answer.
    """

    def __init__(self, what: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.error, self.unreachable = "", False
        self._what, self._clock = what, clock
        self._pause, self._until = 0.0, 0.0

    @property
    def seconds_to_wait(self) -> float:
        """Until the store is tried again; 0 while it works."""
        return max(0.0, self._until - self._clock())

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Note whether what is done here works."""
        try:
            yield
        except OUTAGES as error:
            if not self.error:
                logger.warning("the prompt cache goes on without %s its store: %s", self._what, error)
            self._pause = min(_LONGEST_PAUSE_S, max(_FIRST_PAUSE_S, 2 * self._pause))
            self.error, self.unreachable = str(error), isinstance(error, UnavailableError)
            self._until = self._clock() + self._pause
            raise
        self.recover()

    def try_now(self) -> None:
        """Let it be tried without waiting any longer."""
        self._until = self._clock()

    def recover(self) -> None:
        """It works again."""
        if self.error:
            logger.warning("%s the store works again", self._what)
            self.error, self.unreachable, self._pause, self._until = "", False, 0.0, 0.0
