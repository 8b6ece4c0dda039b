"""`numoe serve`: bring up a server and stay until it is told to stop."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from numoe.deploy.client import DEFAULT_ADDRESS
from numoe.deploy.commands.placement import ANYWHERE, Placement
from numoe.deploy.console import one_line_errors
from numoe.deploy.signals import StopSignals
from numoe.engine.errors import UnavailableError

if TYPE_CHECKING:
    from numoe.cluster.plan import PlanOptions

DRAIN_S = 30.0


def serve(
    model: str,
    /,
    *,
    listen: str = DEFAULT_ADDRESS,
    ctx_size: int | None = None,
    parallel: int | None = None,
    chunk: int | None = None,
    queue: int | None = None,
    placement: Placement = ANYWHERE,
) -> int:
    """Serve a GGUF model over gRPC until Ctrl-C, SIGTERM or `numoe stop`.

    Parameters
    ----------
    model
        The GGUF file; of a split model, any part.
    listen
        HOST:PORT, or unix:PATH.
    ctx_size
        Tokens that one request may hold, prompt and answer together; if not given, what the model
        was trained for, but at most 8192.
    parallel
        Requests that run at once; 4 if not given. Each has room for --ctx-size tokens.
    chunk
        Prompt tokens that one step takes in; if not given, 256, or 2048 on a GPU. Running answers wait no longer.
    queue
        Requests that may wait for a slot; 64 if not given.
    placement
        Where the model runs.

    """
    with one_line_errors(), StopSignals() as signals:
        try:
            options = placement.plan_options(context=ctx_size, slots=parallel, chunk=chunk, queue=queue)
            _serve(signals, model, listen, options)
        except KeyboardInterrupt:
            print("numoe: stopped while starting", file=sys.stderr)
    return 0


def _serve(signals: StopSignals, model: str, listen: str, options: PlanOptions) -> None:
    from numoe.deploy.launch import running_server

    with running_server(model, options, listen) as server:
        signals.started()
        print(f"numoe serves {server.plan.model} at {server.address} (Ctrl-C stops it)", flush=True)
        why = server.wait(signals.stop)
        if signals.stop.is_set():
            server.close(DRAIN_S)
        if why:
            raise UnavailableError(why)

