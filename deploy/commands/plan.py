"""`numoe plan`: what would go where, before anything is loaded."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from numoe.deploy.commands.placement import ANYWHERE, Placement
from numoe.deploy.console import count, one_line_errors, result_console

if TYPE_CHECKING:
    from numoe.cluster.cores import Seats
    from numoe.cluster.plan import Plan

_EMPTY = ("dense_bytes", "expert_bytes", "gpu_expert_bytes")
"""What a token reads without a context."""


def plan(
    model: str,
    /,
    *,
    ctx_size: int | None = None,
    parallel: int | None = None,
    chunk: int | None = None,
    json_output: Annotated[bool, Parameter(name="--json", negative=())] = False,
    placement: Placement = ANYWHERE,
) -> int:
    """Print where `numoe serve` would put a model with the same options, and what to expect of it.

    Milliseconds are bytes over the bandwidth that was measured the first time (`numoe doctor --measure` measures
    again): what a token cannot be faster than.

    Parameters
    ----------
    model
        The GGUF file; of a split model, any part.
    ctx_size
        Tokens that one request may hold, as for `numoe serve`.
    parallel
        Requests that run at once, as for `numoe serve`.
    chunk
        Prompt tokens of one step, as for `numoe serve`.
    json_output
        Print a JSON object.
    placement
        Where the model runs.

    """
    with one_line_errors():
        options = placement.plan_options(context=ctx_size, slots=parallel, chunk=chunk)
        values = _plan(model, options)
        print(json.dumps(values)) if json_output else _print(values)
    return 0


def _plan(model: str, options: Any) -> dict[str, Any]:
    from numoe.cluster.bandwidth import bandwidth
    from numoe.cluster.forecast import forecast
    from numoe.cluster.plan import check_memory
    from numoe.cluster.topology import Topology, available_memory
    from numoe.deploy.launch import place_model
    from numoe.engine.errors import ResourceError

    topology = Topology.read()
    with place_model(model, options) as (config, gguf, found):
        cpu = bandwidth(topology).total(topology)
        gpu = found.gpu.copy_bytes_s if found.gpu else 0.0
        free = available_memory()
        expected = forecast(found, config, gguf, cpu_bytes_s=cpu, gpu_bytes_s=gpu, free_memory=free)
    try:
        check_memory(found)
        refused = None
    except ResourceError as error:
        refused = str(error)
    return {
        "model": found.model,
        "fits": refused is None,
        "refused": refused,
        "where": _places(found),
        "context": found.context,
        "slots": found.slots,
        "chunk": found.chunk,
        "gpu_layers": found.gpu_layers,
        "kv_type": asdict(found.kv_type),
        "bandwidth_gb_s": {"memory": cpu / 1e9, "vram": gpu / 1e9},
        "token": {
            "dense_bytes": expected.dense_bytes,
            "expert_bytes": expected.expert_bytes,
            "gpu_expert_bytes": expected.gpu_expert_bytes,
            "kv_bytes_full_context": expected.kv_bytes,
            "ms_empty": expected.attention_ms + expected.experts_ms,
            "ms_full_context": expected.attention_ms + expected.experts_ms + expected.kv_ms,
        },
        "context_tokens_that_fit": expected.context_tokens,
    }


def _places(plan: Plan) -> list[dict[str, Any]]:
    """What lies where: (place, what, bytes)."""
    from numoe.cluster.plan import GPU_RESERVE

    attention = plan.gpu.name if plan.gpu else "memory"
    rows = [(attention, "attention, head, embedding", plan.dense_bytes), (attention, "KV cache", plan.kv_bytes)]
    if plan.work_bytes:
        rows.append((attention, "buffers", plan.work_bytes))
    if plan.gpu:
        rows.append((attention, "reserve", GPU_RESERVE))
    if plan.gpu_layers:
        rows.append((attention, f"experts of the first {count(plan.gpu_layers, 'layer')}", plan.gpu_expert_bytes))
    rows.extend(
        (_memory_of(shard.seats), f"experts {shard.index} of {len(plan.shards)}", shard.nbytes)
        for shard in plan.shards
    )
    if plan.mailbox:
        rows.append(("shared memory", "mailbox", plan.mailbox.nbytes))
    rows.append(("memory", "processes", plan.process_bytes))
    return [{"place": place, "what": what, "bytes": nbytes} for place, what, nbytes in rows]


def _memory_of(seats: Seats) -> str:
    nodes = seats.memory or seats.nodes
    return f"memory of node {' and '.join(map(str, nodes))}" if nodes else "memory"


def _print(values: dict[str, Any]) -> None:
    from rich.table import Table

    console, table = result_console(), Table(box=None, padding=(0, 2, 0, 0))
    for name in ("where", "what", "GB"):
        table.add_column(name, justify="right" if name == "GB" else "left")
    for row in values["where"]:
        table.add_row(row["place"], row["what"], f"{row['bytes'] / 1e9:.2f}")
    console.print(table)
    token, speed = values["token"], values["bandwidth_gb_s"]
    vram = f", VRAM at {speed['vram']:.0f} GB/s" if speed["vram"] else ""
    requests = count(values["slots"], "request")
    console.print(f"{requests} of up to {values['context']} tokens; steps of {values['chunk']}")
    console.print(
        f"a token reads {sum(token[part] for part in _EMPTY) / 1e9:.2f} GB, and behind a full context "
        f"{token['kv_bytes_full_context'] / 1e9:.2f} GB of KV: at least {token['ms_empty']:.1f} and "
        f"{token['ms_full_context']:.1f} ms (memory at {speed['memory']:.0f} GB/s{vram})"
    )
    fits = ", ".join(f"{kind} {count}" for kind, count in values["context_tokens_that_fit"].items())
    console.print(f"tokens of context that fit, all requests together: {fits}")
    if values["refused"]:
        console.print(f"serve would refuse: {values['refused']}")
