"""What an actor tells about where it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from numoe.cluster.cores import Seats
from numoe.cluster.status import ActorPlacement

if TYPE_CHECKING:
    from numoe.engine.weights import SliceReporter, WeightSlice


def reporter_of(weights: WeightSlice, seats: Seats) -> SliceReporter:
    """What tells where an actor's weights are. They have been looked at already."""
    from numoe.engine.weights import SliceReporter

    reporter = SliceReporter(weights, seats.memory or seats.nodes, bound=bool(seats.memory))
    reporter.check()
    return reporter


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
        problem=weights.problem,
    )
