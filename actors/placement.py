"""What an actor tells about where it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from numoe.cluster.cores import Seats
from numoe.cluster.status import ActorPlacement

if TYPE_CHECKING:
    from numoe.engine.weights import SliceReporter


def describe(
    seats: Seats, reporter: SliceReporter, ran_on: Sequence[int], *, read_bytes_s: float | None = None
) -> ActorPlacement:
    """The placement of an actor: its weights as they lie now, and the processor that each thread ran on last."""
    weights = reporter.report()
    return ActorPlacement(
        nodes=seats.nodes,
        weight_bytes=weights.nbytes,
        medium=weights.medium,
        on_nodes=weights.on_nodes,
        huge=weights.huge,
        cpus=seats.cpus,
        ran_on=tuple(ran_on),
        read_bytes_s=read_bytes_s,
    )
