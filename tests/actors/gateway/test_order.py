"""Events reach the streams in the order the worker sent them, whatever Ray makes of it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from numoe.actors.gateway.order import Connections, PushOrder
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


def test_what_comes_before_its_connection_is_attached_waits_and_what_comes_after_the_next_is_dropped() -> None:
    connections, delivered = Connections(), []

    def push(connection: int, number: int) -> None:
        for events in connections.accept(connection, number, [TokenGenerated(f"c{connection}", number)]):
            delivered.extend((event.request_id, event.token_id) for event in events)

    push(2, 1)
    push(1, 0)
    push(2, 0)
    assert delivered == []
    for events in connections.attach(2):
        delivered.extend((event.request_id, event.token_id) for event in events)
    push(1, 1)
    push(2, 2)
    assert delivered == [("c2", 0), ("c2", 1), ("c2", 2)]
