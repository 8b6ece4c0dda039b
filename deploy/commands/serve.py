"""`numoe serve`: bring up a server and stay until it is told to stop."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from numoe.deploy.commands.caching import NO_FLAGS, Caching
from numoe.deploy.commands.placement import ANYWHERE, Placement
from numoe.deploy.commands.security import LOOPBACK, Listening
from numoe.deploy.commands.weights import stale_slices
from numoe.deploy.console import one_line_errors
from numoe.deploy.signals import StopSignals
from numoe.engine.errors import UnavailableError

if TYPE_CHECKING:
    from numoe.cluster.endpoint import Endpoint
    from numoe.cluster.plan import PlanOptions

DRAIN_S = 30.0


def serve(
    model: str,
    /,
    *,
    ctx_size: int | None = None,
    parallel: int | None = None,
    chunk: int | None = None,
    queue: int | None = None,
    keep_weights: Annotated[bool, Parameter(negative=())] = False,
    placement: Placement = ANYWHERE,
    caching: Caching = NO_FLAGS,
    listening: Listening = LOOPBACK,
) -> int:
    """Serve a GGUF model over gRPC until Ctrl-C, SIGTERM, `numoe stop` or the end of the terminal.

    Parameters
    ----------
    model
        The GGUF file; of a split model, any part.
    ctx_size
        Tokens that one request may hold, prompt and answer together; if not given, what the model
        was trained for, but at most 8192.
    parallel
        Requests that run at once; 4 if not given. Each has room for --ctx-size tokens.
    chunk
        Prompt tokens that one step takes in; if not given, 256, or 2048 on a GPU. Running answers wait no longer.
    queue
        Requests that may wait for a slot; 64 if not given.
    keep_weights
        Leave the packed weights in shared memory when the server ends, for the next one; see `numoe weights`.
    placement
        Where the model runs.
    caching
        What outlives a request.
    listening
        Where the server listens, and whom it answers.

    """
    with one_line_errors(), StopSignals() as signals:
        try:
            options = placement.plan_options(
                context=ctx_size, slots=parallel, chunk=chunk, queue=queue, cache=caching.options()
            )
            _serve(signals, model, listening.endpoint(), options, keep_weights=keep_weights)
        except KeyboardInterrupt:
            print("numoe: stopped while starting", file=sys.stderr)
    return 0


def _serve(signals: StopSignals, model: str, endpoint: Endpoint, options: PlanOptions, *, keep_weights: bool) -> None:
    from numoe.deploy.launch import running_server

    with running_server(model, options, endpoint, keep_weights=keep_weights) as server:
        signals.started()
        print(f"numoe serves {server.plan.model} at {server.address} (Ctrl-C stops it)", flush=True)
        if endpoint.insecure and not endpoint.is_protected:
            print(f"numoe: whoever reaches {server.address} may use and stop this server", file=sys.stderr)
        if stale := stale_slices():
            size = sum(found.nbytes for found in stale) / 1e9
            print(
                f"numoe: {size:.2f} GB of weights in shared memory can serve nobody any more, as their files or numoe "
                "have changed: `numoe weights rm --stale` removes them",
                file=sys.stderr,
            )
        with suppress(UnavailableError):  # it is seen to below
            for problem in server.problems():
                print(f"numoe: {problem}", file=sys.stderr)
        why = server.wait(signals.stop)
        if signals.stop.is_set():
            print(
                f"numoe: stopping; running requests get up to {DRAIN_S:g} s (Ctrl-C again ends the server at once)",
                file=sys.stderr,
            )
            why = server.close(DRAIN_S) or why
        if why:
            raise UnavailableError(why)

