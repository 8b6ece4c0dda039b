"""The signals that stop a server."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from numoe.deploy.signals import STOP_SIGNALS, StopSignals, uninterrupted

MASK = "import signal; print(signal.SIGHUP in signal.pthread_sigmask(signal.SIG_BLOCK, ()))"


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_each_of_them_asks_a_running_server_to_stop(number: int) -> None:
    with StopSignals() as signals:
        signals.started()
        signal.raise_signal(number)
        assert signals.stop.is_set()


def test_nohup_is_heeded() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopSignals() as signals:
        signal.raise_signal(signal.SIGHUP)
        assert not signals.stop.is_set()


def test_what_starts_without_interruption_does_not_see_the_end_of_the_terminal() -> None:
    """Nor does one that ends while Ray starts go unnoticed."""
    with StopSignals() as signals:
        signals.started()
        with uninterrupted():
            child = subprocess.run([sys.executable, "-c", MASK], capture_output=True, text=True, check=True)
            signal.raise_signal(signal.SIGHUP)
            assert not signals.stop.is_set()
        assert child.stdout.split() == ["True"]
        assert signals.stop.is_set()
    later = subprocess.run([sys.executable, "-c", MASK], capture_output=True, text=True, check=True)
    assert later.stdout.split() == ["False"]
