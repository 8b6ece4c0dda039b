"""`numoe serve`: bring up a server and stay until it is told to stop."""

from __future__ import annotations

import sys

from numoe.deploy.client import DEFAULT_ADDRESS
from numoe.deploy.console import one_line_errors
from numoe.deploy.signals import StopSignals
from numoe.engine.errors import InputError, UnavailableError

DRAIN_S = 30.0


def serve(
    model: str,
    /,
    *,
    listen: str = DEFAULT_ADDRESS,
    ctx_size: int | None = None,
    parallel: int | None = None,
    threads: int | None = None,
    shards: str = "auto",
    chunk: int | None = None,
    queue: int | None = None,
    cache_type_k: str = "f16",
    cache_type_v: str = "f16",
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
    threads
        Threads that compute; all processors if not given.
    shards
        Expert shards: "auto" is one for each NUMA node.
    chunk
        Prompt tokens that one step takes in; 256 if not given. Running answers wait no longer than that.
    queue
        Requests that may wait for a slot; 64 if not given.
    cache_type_k
        Type of the keys in the KV cache: f16 or q8_0, which takes half the memory.
    cache_type_v
        Type of the values in the KV cache, likewise.

    """
    with one_line_errors(), StopSignals() as signals:
        try:
            _serve(signals, model, listen, {
                "context": ctx_size, "slots": parallel, "threads": threads, "shards": parse_shards(shards),
                "chunk": chunk, "queue": queue,
            }, (cache_type_k, cache_type_v))  # fmt: skip
        except KeyboardInterrupt:
            print("numoe: stopped while starting", file=sys.stderr)
    return 0


def _serve(
    signals: StopSignals, model: str, listen: str, numbers: dict[str, int | None], cache_types: tuple[str, str]
) -> None:
    from numoe.cluster.plan import PlanOptions
    from numoe.deploy.launch import running_server
    from numoe.engine.worker.kv_pool import KvType

    options = PlanOptions(**numbers, kv_type=KvType(*cache_types))
    with running_server(model, options, listen) as server:
        signals.started()
        print(f"numoe serves {server.plan.model} at {server.address} (Ctrl-C stops it)", flush=True)
        why = server.wait(signals.stop)
        if signals.stop.is_set():
            server.close(DRAIN_S)
        if why:
            raise UnavailableError(why)


def parse_shards(text: str) -> int | None:
    """The number of shards, None for "auto"."""
    if text == "auto":
        return None
    if not text.isdigit():
        raise InputError(f"--shards {text} is neither 'auto' nor a number")
    return int(text)
