"""Ctrl-C, SIGTERM and the end of the terminal (SIGHUP), from the first import to the last clean-up."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopSignals:
    """Ctrl-C, SIGTERM, and SIGHUP unless `nohup` says otherwise, inside a `with` block.

    While the server starts they raise KeyboardInterrupt, so that whatever has begun is undone;
    after `started` they set the event `stop`. A second signal ends the process at once, after the
    functions in `last_words` have been called.
    """

    last_words: list[Callable[[], None]] = []  # noqa: RUF012 - the process' own, like its signals

    def __init__(self) -> None:
        self.stop = threading.Event()
        self._raising, self._seen = True, False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in STOP_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def started(self) -> None:
        """Set the event from now on."""
        self._raising = False

    def _on_signal(self, number: int, _frame: Any) -> None:
        if self._seen:
            for function in self.last_words:
                function()
            os._exit(128 + number)
        self._seen = True
        self.stop.set()
        if self._raising:
            raise KeyboardInterrupt


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let signals that stop the server and come inside the block take effect behind it.

    For Ray's start: its core aborts the process when an exception cuts it short, and it puts handlers
    of its own in place, which are kept out (or, below Python, replaced again). The processes that it starts
    never see SIGHUP, as Ray has them never see SIGINT: a terminal that is closed tells all of them, and the
    server must have time to drain.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    set_handler = signal.signal
    before = {number: set_handler(number, lambda number, _frame: came.append(number)) for number in STOP_SIGNALS}
    signal.signal = lambda number, _handler: signal.getsignal(number)  # type: ignore[assignment]
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        signal.signal = set_handler
        for number, handler in before.items():
            set_handler(number, handler)
    if came:
        signal.raise_signal(signal.Signals(came[0]))
