"""Events reach the streams in the order the worker sent them, whatever Ray makes of it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from numoe.actors.gateway.order import PushOrder
from numoe.engine.requests import TokenGenerated


@given(st.permutations(range(8)))
def test_any_arrival_is_delivered_in_order(arrival: list[int]) -> None:
    order, delivered = PushOrder(), []
    for position, number in enumerate(arrival):
        for events in order.accept(number, [TokenGenerated("r", number)]):
            delivered += [event.token_id for event in events]
        # As much as can be is delivered at once.
        seen = set(arrival[: position + 1])
        assert delivered == list(range(next(n for n in range(9) if n not in seen)))
