"""`numoe status`: what a running server is doing."""

from __future__ import annotations

import json
from typing import Annotated, Any

from cyclopts import Parameter
from rich.filesize import decimal

from numoe.deploy.commands.security import DEFAULT, Connection
from numoe.deploy.commands.slots import slot_json, slot_row
from numoe.deploy.console import count, one_line_errors, result_console
from numoe.deploy.placements import placement_json, placement_text
from numoe.v1 import admin_pb2 as pb

_NUMBERS = {"pid", "restarts", "tokens", "computed", "cached"}


def status(
    *,
    connection: Connection = DEFAULT,
    json_output: Annotated[bool, Parameter(name="--json", negative=())] = False,
) -> int:
    """Show a server's processes, slots, queue and step times.

    Parameters
    ----------
    json_output
        Print one JSON object instead of tables.
    connection
        How the server is reached.

    """
    with one_line_errors(), connection.client() as client:
        values = status_json(client.status(), client.address)
    if json_output:
        print(json.dumps(values))
    else:
        _print_tables(values)
    return 0


def status_json(response: pb.GetStatusResponse, address: str) -> dict[str, Any]:
    """Make the object that `numoe status --json` prints."""
    return {
        "address": address,
        "version": response.version,
        "state": _name(pb.ServerState.Name(response.state), "SERVER_STATE_"),
        "uptime_seconds": round(response.uptime_seconds, 1),
        "actors": [
            {
                "role": _name(pb.ActorRole.Name(actor.role), "ACTOR_ROLE_"),
                "pid": actor.pid,
                "host": actor.host,
                "numa_node": actor.numa_node if actor.HasField("numa_node") else None,
                "state": _name(pb.ActorState.Name(actor.state), "ACTOR_STATE_"),
                "restarts": actor.restarts,
                "placement": placement_json(actor),
            }
            for actor in response.actors
        ],
        "model": {
            "name": response.model.name,
            "architecture": response.model.architecture,
            "parameters": response.model.parameters,
            "weight_format": response.model.weight_format,
            "file_bytes": response.model.file_bytes,
            "layers": response.model.layers,
            "experts": response.model.experts,
            "experts_used": response.model.experts_used,
            "context_tokens": response.model.context_tokens,
            "vocab_size": response.model.vocab_size,
            "fingerprint": response.model.fingerprint if response.model.HasField("fingerprint") else None,
        },
        "slots": [slot_json(slot) for slot in response.slots],
        "queue": {
            "queued": response.queue.queued,
            "limit": response.queue.limit,
            "streams": response.queue.streams,
        },
        "kv": {
            "pages_used": response.kv.pages_used,
            "pages_cached": response.kv.pages_cached,
            "pages_total": response.kv.pages_total,
        },
        "cache": _cache_json(response.cache) if response.HasField("cache") else None,
        "step": (
            {"steps": response.step.steps, "last_ms": dict(response.step.last_ms)}
            if response.HasField("step")
            else None
        ),
    }


def _cache_json(cache: pb.CacheStatus) -> dict[str, Any]:
    return {
        "ram_bytes": cache.ram_bytes,
        "ram_limit_bytes": cache.ram_limit_bytes,
        "store_url": cache.store_url if cache.HasField("store_url") else None,
        "store_bytes": cache.store_bytes,
        "store_limit_bytes": cache.store_limit_bytes if cache.HasField("store_limit_bytes") else None,
        "pending_chunks": cache.pending_chunks,
        "dropped_chunks": cache.dropped_chunks,
        "hits": {"pages": cache.hits_pages, "ram": cache.hits_ram, "store": cache.hits_store},
        "misses": cache.misses,
        "store_error": cache.store_error if cache.HasField("store_error") else None,
    }


def _cache_text(cache: dict[str, Any]) -> str:
    """The prompt cache in a line or two."""
    hits, limit = cache["hits"], cache["store_limit_bytes"]
    ram = f"{decimal(cache['ram_bytes'])} of {decimal(cache['ram_limit_bytes'])} in memory"
    store = "no store"
    if cache["store_url"]:
        store = f"{decimal(cache['store_bytes'])}{f' of {decimal(limit)}' if limit else ''} in {cache['store_url']}"
        store += f", {count(cache['pending_chunks'], 'chunk')} to write"
        if cache["dropped_chunks"]:
            store += f", {cache['dropped_chunks']} given up"
    found = ", ".join(f"{number} in {place}" for place, number in hits.items())
    text = f"prompt cache {ram}, {store}; chunks found: {found}; not found: {cache['misses']}"
    return f"{text}\nthe store is not used: {cache['store_error']}" if cache["store_error"] else text


def _name(constant: str, prefix: str) -> str:
    return constant.removeprefix(prefix).lower()


def _print_tables(values: dict[str, Any]) -> None:
    from rich.table import Table

    def table(title: str, rows: list[dict[str, Any]]) -> None:
        if not rows:
            return
        result = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
        for name in rows[0]:
            result.add_column(name, justify="right" if name in _NUMBERS else "left")
        for row in rows:
            result.add_row(*("-" if value is None else str(value) for value in row.values()))
        console.print(result)

    console = result_console()
    model, queue, kv, step = values["model"], values["queue"], values["kv"], values["step"]
    console.print(f"numoe {values['version']} at {values['address']}: {values['state']}")
    console.print(
        f"{model['name']} ({model['architecture']}, {model['weight_format']}, "
        f"{model['parameters'] / 1e9:.2f} G parameters), context {model['context_tokens']} tokens"
    )
    table("actors", [{name: actor[name] for name in actor if name != "placement"} for actor in values["actors"]])
    for actor in values["actors"]:
        if actor["placement"]:
            console.print(placement_text(actor))
    table("slots", [slot_row(slot) for slot in values["slots"]])
    console.print(
        f"queue {queue['queued']} of {queue['limit']}, {count(queue['streams'], 'stream')}; "
        f"KV pages {kv['pages_used']} of {kv['pages_total']}, {kv['pages_cached']} more with cached prompts"
    )
    if values["cache"] is not None:
        console.print(_cache_text(values["cache"]))
    if step is not None:
        parts = ", ".join(f"{name} {ms:.2f}" for name, ms in sorted(step["last_ms"].items()))
        console.print(f"{count(step['steps'], 'step')}, the last in ms: {parts}")
