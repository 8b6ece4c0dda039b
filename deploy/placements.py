"""How `numoe status` shows where weights lie and threads run."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from numoe.deploy.console import count
from numoe.v1 import admin_pb2 as pb


def placement_json(actor: pb.ActorStatus) -> dict[str, Any] | None:
    """What `numoe status --json` has about it; None for an actor that computes nothing on CPUs."""
    if not actor.HasField("placement"):
        return None
    placement = actor.placement
    return {
        "nodes": list(placement.nodes),
        "weight_bytes": placement.weight_bytes,
        "memory": placement.memory,
        "on_nodes": placement.on_nodes if placement.HasField("on_nodes") else None,
        "huge_pages": placement.huge_pages,
        "cpus": list(placement.cpus),
        "ran_on": list(placement.ran_on),
        "read_bytes_per_second": (
            placement.read_bytes_per_second if placement.HasField("read_bytes_per_second") else None
        ),
        "bandwidth_share": placement.bandwidth_share if placement.HasField("bandwidth_share") else None,
        "problem": placement.problem if placement.HasField("problem") else None,
    }


def placement_text(actor: dict[str, Any]) -> str:
    """A line about an actor as `status_json` makes it, with a placement."""
    placement = actor["placement"]
    nodes, cpus, read = placement["nodes"], placement["cpus"], placement["read_bytes_per_second"]
    text = f"{actor['role']} {actor['pid']}: {placement['weight_bytes'] / 1e9:.2f} GB in {placement['memory']} memory"
    text += f", {_percent(placement['huge_pages'])} huge pages"
    if placement["on_nodes"] is not None:
        text += f", {_percent(placement['on_nodes'])} on node {' '.join(map(str, nodes))}"
    text += f"; {count(len(placement['ran_on']), 'thread')}"
    text += f" pinned to {cpu_list(cpus)}" if cpus else " not pinned"
    text += f", ran on {cpu_list(placement['ran_on'])}"
    if read is not None:
        text += f"; reads {read / 1e9:.1f} GB/s"
        if placement["bandwidth_share"] is not None:
            text += f", {_percent(placement['bandwidth_share'])} of what was measured"
    return f"{text}\n  {placement['problem']}" if placement["problem"] else text


def cpu_list(cpus: Sequence[int]) -> str:
    """Processors as the kernel writes them: 0-3,8."""
    runs = [
        [cpu for _, cpu in run] for _, run in groupby(enumerate(sorted(set(cpus))), key=lambda pair: pair[1] - pair[0])
    ]
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
