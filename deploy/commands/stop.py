"""`numoe stop`: drain and stop a running server."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from numoe.cluster.status import TAKE_DOWN_S
from numoe.deploy.client import POLL_S, Client
from numoe.deploy.commands.security import DEFAULT, Connection
from numoe.deploy.commands.values import duration
from numoe.deploy.console import INTERRUPTED, count, one_line_errors
from numoe.engine.errors import UnavailableError
from numoe.v1 import admin_pb2


def stop(
    *,
    timeout: float = 30.0,
    keep_weights: Annotated[bool, Parameter(negative=())] = False,
    connection: Connection = DEFAULT,
) -> int:
    """Stop a server: it takes no new requests, finishes the running ones, and ends.

    Parameters
    ----------
    timeout
        Seconds that running requests get; after it they are cut off.
    keep_weights
        Leave the packed weights in shared memory: the next `numoe serve` of the model attaches to them at once.
    connection
        How the server is reached.

    """
    with one_line_errors(), connection.client() as client:
        duration("--timeout", timeout)  # refuses what is none
        status = client.status()
        if reason := status.cache.store_error:
            print(f"numoe: the store is not used, conversations may be lost: {reason}", file=sys.stderr)
        pids = local_pids(status.actors)
        running = client.shutdown(timeout, keep_weights=keep_weights)
        if running:
            print(f"waiting up to {timeout:g} s for {count(running, 'running request')} (Ctrl-C leaves them be)")
        try:
            wait_stopped(client, pids, timeout + TAKE_DOWN_S)
        except KeyboardInterrupt:
            return INTERRUPTED
    print(f"stopped {client.address}")
    return 0


def local_pids(actors: Iterable[admin_pb2.ActorStatus]) -> list[int]:
    """Process ids of the actors that run on this machine."""
    return [actor.pid for actor in actors if actor.host == socket.gethostname() and actor.pid != os.getpid()]


def wait_stopped(client: Client, pids: list[int], timeout_s: float) -> None:
    """Wait until the port is closed and the local processes are gone. Raises UnavailableError."""
    end = time.monotonic() + timeout_s
    closed = client.wait_closed(timeout_s)
    while closed and (pids := [pid for pid in pids if Path(f"/proc/{pid}").exists()]):
        if time.monotonic() > end:
            raise UnavailableError(f"processes {', '.join(map(str, pids))} still run: kill them")
        time.sleep(POLL_S)
    if not closed:
        raise UnavailableError(f"the server at {client.address} still answers after {timeout_s:g} s")
