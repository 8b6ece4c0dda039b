"""What the gateway keeps of each stream, and what its client sees of a second worker."""

import math

import pytest

from numoe.actors.gateway import RequestStreams
from numoe.actors.gateway.replies import Replies
from numoe.actors.gateway.streams import MAX_FRUITLESS
from numoe.engine.errors import UnavailableError
from numoe.engine.requests import (
    Finished,
    GenerationRequest,
    PrefillProgress,
    Started,
    Timings,
    TokenGenerated,
)
from tests.actors.gateway.harness import TIMINGS, ByteTokenizer, in_loop

REQUEST = GenerationRequest(request_id="r", token_ids=(1, 2, 3), max_tokens=9)


@in_loop
async def test_what_is_left_is_the_request_behind_the_tokens_that_came() -> None:
    streams = RequestStreams()
    with streams.open("r", lambda _: None) as stream:
        assert stream.remainder() is None, "it was not submitted"
        stream.submitted(REQUEST)
        assert REQUEST.foreign is None, "who has not begun takes any chunk"
        streams.deliver([Started("r", 3, 0, (0, 4)), TokenGenerated("r", 65), TokenGenerated("r", 66)])
        await stream.next_events()
        streams.deliver([TokenGenerated("r", 67)])
        left = stream.remainder()
        assert left is not None
        assert (left.generated, left.foreign) == ((65, 66, 67), (0, 4))
        assert (left.token_ids, left.max_tokens) == (REQUEST.token_ids, REQUEST.max_tokens)
        streams.deliver([Finished("r", "length", 3, TIMINGS)])
        assert stream.remainder() is None
    assert [stream.remainder() for stream in streams] == []
    assert stream.remainder() is None


@in_loop
async def test_streams_are_handed_on_in_the_order_they_came() -> None:
    streams = RequestStreams()
    with streams.open("b", lambda _: None), streams.open("a", lambda _: None), streams.open("c", lambda _: None):
        assert [stream.request_id for stream in streams] == ["b", "a", "c"]


@pytest.mark.parametrize(
    ("started", "deadline", "want"), [(True, None, math.inf), (True, 5.0, math.inf), (False, 5.0, 5.0)]
)
def test_a_slot_that_was_had_is_not_lost_to_a_deadline(started: bool, deadline: float | None, want: float) -> None:
    @in_loop
    async def check() -> None:
        streams = RequestStreams()
        with streams.open("r", lambda _: None) as stream:
            stream.submitted(GenerationRequest(
                request_id="r", token_ids=(1,), max_tokens=9, slot=3, slot_deadline=deadline
            ))  # fmt: skip
            if started:
                streams.deliver([Started("r", 1, 0)])
            left = stream.remainder()
            assert left is not None
            assert left.slot_deadline == want

    check()


@in_loop
async def test_a_request_that_kills_every_worker_comes_to_an_end() -> None:
    streams = RequestStreams()
    with streams.open("r", lambda _: None) as stream:
        stream.submitted(REQUEST)
        for token in range(3):
            for _ in range(MAX_FRUITLESS):
                assert stream.remainder() is not None
            streams.deliver([TokenGenerated("r", token)])
            assert stream.remainder() is not None
        for _ in range(MAX_FRUITLESS):
            stream.remainder()
        assert stream.remainder() is None
        await stream.next_events()
        with pytest.raises(UnavailableError, match="have died over this request"):
            await stream.next_events()


def test_a_second_start_is_not_told_and_times_are_those_of_the_whole() -> None:
    now = iter(range(100))
    replies = Replies(REQUEST, ByteTokenizer(), (), 0.0, clock=lambda: float(next(now)))
    first = [Started("r", 3, 0), PrefillProgress("r", 2, 3), PrefillProgress("r", 3, 3), TokenGenerated("r", 65)]
    again = [Started("r", 3, 3), PrefillProgress("r", 2, 3), TokenGenerated("r", 66)]
    messages = list(replies.translate(first)) + list(replies.translate(again))
    messages += replies.translate([Finished("r", "length", 2, Timings(prefill_ms=7.0))])
    assert [message.WhichOneof("event") for message in messages] == [
        "started", "prefill", "prefill", "tokens", "tokens", "finished",
    ]  # fmt: skip
    finished = messages[-1].finished
    assert finished.timings.prefill_ms == 1000.0
    assert (finished.usage.cached_tokens, finished.usage.completion_tokens) == (0, 2)
