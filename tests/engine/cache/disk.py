"""A server whose store is on a small file system of its own, mounted at the argument: what it does when that is full.

    unshare -Urm sh -c 'mount -t tmpfs -o size=4m tmpfs FOLDER && python disk.py FOLDER'
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from numoe.engine.errors import AccessError, NotFoundError, NumoeError, ResourceError
from numoe.engine.store import open_store
from tests.engine.worker.served import PATIENCE_S, Served, served
from tests.models import make_model


def prompt(number: int) -> list[int]:
    return [(number + 7 * i) % 250 for i in range(300)]


def fails(server: Served, number: int, expected: type[NumoeError]) -> None:
    """A new prompt is answered as without a cache; its save fails as expected, and the old one stays."""
    answer = server.ask(prompt(number), slot=0)[1]
    assert answer == server.ask(prompt(number), bypass_cache=True)[1]
    for name in ("chat", "new"):
        try:
            server.engine.slots.save("s", 0, name, None)
        except expected:
            continue
        raise AssertionError(f"{name} was saved")
    try:
        server.engine.slots.restore("r", 1, "new", None)
    except NotFoundError:
        return
    raise AssertionError("a snapshot that was not saved is there")


def works(server: Served, number: int) -> None:
    """It catches up, and saves."""
    until = time.monotonic() + 4 * PATIENCE_S
    while (status := server.engine.status().cache).pending or status.store_error:
        assert time.monotonic() < until, status
        time.sleep(0.05)
    server.ask(prompt(number), slot=0)
    report = server.engine.slots.save("s", 0, "chat", None)
    assert server.engine.slots.restore("r", 1, "chat", None).computed == report.computed
    print("room", flush=True)


def main() -> None:
    disk = Path(sys.argv[1])
    model = make_model(Path(tempfile.mkdtemp()) / "m.gguf")
    store = open_store(disk / "store")
    with served(model, store) as server:
        works(server, 0)
        filler = disk / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        fails(server, 1, ResourceError)
        print("full", flush=True)
        filler.unlink()
        works(server, 2)
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        fails(server, 3, AccessError)
        assert server.engine.slots.restore("r", 1, "chat", None).computed, "reading works as before"
        print("read-only", flush=True)
        subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
        works(server, 4)
        answer = server.ask([*prompt(4), 1], slot=0)[1]
    with served(model, store, ram=0) as server:
        server.engine.slots.restore("r", 0, "chat", None)
        assert server.ask([*prompt(4), 1], slot=0) == (len(prompt(4)), answer)
        print("restored", flush=True)


if __name__ == "__main__":
    main()
