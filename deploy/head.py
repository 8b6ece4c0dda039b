"""Ray's head and its node here: whether they are there. Without them nobody can be replaced, and Ray ends everybody."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import psutil
import ray

from numoe.deploy.raylets import find_raylets, head_answers

_TIMEOUT_VARIABLE = "RAY_gcs_rpc_server_reconnect_timeout_s"
_TIMEOUT_S = 60.0
_SHARE = 0.75
_MISSED_S = 4.0
_LOOK_S, _LONGEST_LOOK_S = 2.0, 10.0


class Head:
    """The head of the cluster that this process has joined, and the cluster's node on this host.

    A head that is restarted in time with its state (Ray keeps that in a Redis, if it has been given one) is none the
    worse for it. Any other has forgotten all actors, and Ray ends them, and this process, on the spot: so `why_lost`
    says it before Ray does, while there is time to clean up.
    """

    def __init__(self) -> None:
        self._address = ray.get_runtime_context().gcs_address
        self._patience_s = _SHARE * float(os.environ.get(_TIMEOUT_VARIABLE, _TIMEOUT_S))
        self._nodes = [raylet.pid for raylet in find_raylets() if raylet.gcs_address == self._address]
        self._answered = self._looked = time.monotonic()
        self._is_missed = False

    def why_lost(self, patience_s: float | None = None) -> str:
        """What is gone, empty if nothing is. patience_s: of a head that is silent, if not almost as long as Ray has."""
        now = time.monotonic()
        if now - self._looked > _LONGEST_LOOK_S:  # nobody has asked for long: that says nothing about the head
            self._answered = now
        if now - self._looked >= _LOOK_S:
            self._looked = now
            if head_answers(self._address):
                self._answered = now
            if self._nodes and not any(_lives(pid) for pid in self._nodes):
                return "Ray's node on this host has ended"
        patience_s = self._patience_s if patience_s is None else patience_s
        if now - self._answered > patience_s:
            return f"Ray's head at {self._address} has not answered for {patience_s:.0f} s"
        return ""


    def news(self) -> Iterator[str]:
        """What there is to tell of the head since the last time, as `why_lost` has found it."""
        is_missed = self._looked - self._answered >= _MISSED_S
        if is_missed != self._is_missed:
            self._is_missed = is_missed
            yield (
                f"Ray's head at {self._address} does not answer: streams go on, but nobody who dies is replaced, and "
                f"the server ends if that stays so for {self._patience_s:.0f} s"
                if is_missed
                else f"Ray's head at {self._address} answers again"
            )


def _lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
