"""A process that saves a snapshot and is killed at its first store operation, another at its second, and so on.

    python killed.py OLD NEW MODE STORE_URL OPTIONS

Prints for each whether it was killed, until one is not. Processes are forks of this one, which has
no thread and no connection yet. Each has a snapshot name and a salt of its own, the number of its
point: so all chunks are new in each.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

from numoe.engine.cache.snapshots import Progress
from numoe.engine.store import Store, open_store
from tests.engine.cache.support import Saver, Talk

OPERATIONS = ("put_new", "put_if", "get", "get_versioned", "head", "exists", "list", "delete")


class Deadly:
    """A store whose user is killed before or after its operation number `at` (counted twice: before, after)."""

    def __init__(self, store: Store, at: int) -> None:
        self._store, self._at, self._count = store, at, itertools.count(1)
        self._lock = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._store, name)
        return self._watched(found) if name in OPERATIONS else found

    def _watched(self, operation: Any) -> Any:
        def call(*arguments: Any) -> Any:
            self._pass()
            result = operation(*arguments)
            self._pass()
            return result

        return call

    def _pass(self) -> None:
        with self._lock:
            if next(self._count) == self._at:
                os.kill(os.getpid(), signal.SIGKILL)


def save(talk: Talk, store: Any, point: int) -> None:
    saver = Saver(store, talk.pages, talk.origin)
    conversation, objects = talk.salted(str(point).encode())
    saver.hold(objects)
    saver.snapshots.save(conversation, f"chat-{point}", Progress())


def child(old: Talk, new: Talk, mode: str, url: str, options: dict[str, str], point: int) -> None:
    store = open_store(url, deadline=60.0, **options)
    if mode == "replaced":
        save(old, store, point)
    save(new, Deadly(store, point), point)


def main() -> None:
    old, new = (Talk.read(Path(path)) for path in sys.argv[1:3])
    mode, url, options = sys.argv[3], sys.argv[4], json.loads(sys.argv[5])
    for point in itertools.count(1):
        if (pid := os.fork()) == 0:
            try:
                child(old, new, mode, url, options, point)
                os._exit(0)
            finally:
                traceback.print_exc()
                os._exit(3)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(status, flush=True)
        if status != -signal.SIGKILL:
            sys.exit(status)


if __name__ == "__main__":
    main()
