"""`numoe status`: what a running server is doing."""

from __future__ import annotations

import json
from typing import Annotated, Any

from cyclopts import Parameter

from numoe.deploy.commands.security import DEFAULT, Connection
from numoe.deploy.console import one_line_errors
from numoe.v1 import admin_pb2 as pb


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
        "slots": [
            {
                "slot": slot.slot,
                "state": _name(pb.SlotState.Name(slot.state), "SLOT_STATE_"),
                "request_id": slot.request_id if slot.HasField("request_id") else None,
                "tokens": slot.tokens,
            }
            for slot in response.slots
        ],
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
        "step": (
            {"steps": response.step.steps, "last_ms": dict(response.step.last_ms)}
            if response.HasField("step")
            else None
        ),
    }


def _name(constant: str, prefix: str) -> str:
    return constant.removeprefix(prefix).lower()


def _print_tables(values: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    def table(title: str, rows: list[dict[str, Any]]) -> None:
        if not rows:
            return
        result = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
        for name in rows[0]:
            result.add_column(name, justify="right" if name in {"pid", "restarts", "tokens"} else "left")
        for row in rows:
            result.add_row(*("-" if value is None else str(value) for value in row.values()))
        console.print(result)

    console = Console(highlight=False, markup=False)
    model, queue, kv, step = values["model"], values["queue"], values["kv"], values["step"]
    console.print(f"numoe {values['version']} at {values['address']}: {values['state']}")
    console.print(
        f"{model['name']} ({model['architecture']}, {model['weight_format']}, "
        f"{model['parameters'] / 1e9:.2f} G parameters), context {model['context_tokens']} tokens"
    )
    table("actors", values["actors"])
    table("slots", values["slots"])
    console.print(
        f"queue {queue['queued']} of {queue['limit']}, {queue['streams']} streams; "
        f"KV pages {kv['pages_used']} of {kv['pages_total']}, {kv['pages_cached']} more with cached prompts"
    )
    if step is not None:
        parts = ", ".join(f"{name} {ms:.2f}" for name, ms in sorted(step["last_ms"].items()))
        console.print(f"{step['steps']} steps, the last in ms: {parts}")
