"""Another worker goes on with a request: the answer is the one that the first would have given."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from numoe.engine.errors import PreconditionError
from numoe.engine.requests import Finished, GenerationRequest, Started, TokenGenerated
from numoe.engine.sampling import SampledToken
from numoe.engine.scheduler import Batch, Scheduler
from tests.engine.scheduler.support import Cache, make, names, request, rows, step

CONTEXT = 40
FEW = 3


class RoundingCache(Cache):
    """What a row leaves in it depends on whether it was one of few."""

    def run(self, batch: Batch) -> None:
        short = len(batch.token_ids) <= FEW
        super().run(dataclasses.replace(batch, token_ids=batch.token_ids + 1000 * short))


def answer(wanted: GenerationRequest, steps: int, **config: object) -> tuple[list[int], Finished | None]:
    """What a scheduler makes of a request in so many steps; each token depends on all that attention reads."""
    scheduler = make(slots=1, context=CONTEXT, chunk_tokens=8, **config)
    cache = RoundingCache(8) if "few_rows" in config else Cache(8)
    tokens, end = [], None
    scheduler.submit(wanted)
    for _ in range(steps):
        batch = scheduler.schedule(0.0)
        if batch is not None:
            cache.run(batch)
            chosen = [SampledToken(sum(cache.read(batch, row)) % 97) for row in batch.logit_rows]
            scheduler.postprocess(batch, chosen)
        scheduler.check_integrity()
        for event in scheduler.drain_events():
            if isinstance(event, TokenGenerated):
                tokens.append(event.token_id)
            elif isinstance(event, Finished):
                end = event
    return tokens, end


@settings(max_examples=150, deadline=None)
@given(
    prompt=st.integers(1, 30), most=st.integers(1, 90), died=st.integers(0, 100),
    keep=st.sampled_from([None, 0, 5, -1]), apart=st.booleans(),
)  # fmt: skip
def test_the_rest_is_what_it_would_have_been(prompt: int, most: int, died: int, keep: int | None, apart: bool) -> None:
    config = {"keep": keep} | ({"few_rows": FEW} if apart else {})
    whole = request(prompt=range(prompt), max_tokens=most, stop_ids=frozenset({13}))
    want, end = answer(whole, 200, **config)
    begun, _ = answer(whole, died, **config)
    rest, last = answer(request(
        prompt=range(prompt), max_tokens=most, stop_ids=frozenset({13}), generated=tuple(begun)
    ), 200, **config)  # fmt: skip
    assert begun + rest == want
    assert end is not None
    assert last is not None
    assert (last.reason, last.completion_tokens) == (end.reason, end.completion_tokens)


def test_a_prompt_stays_a_prompt() -> None:
    """Its length, which usage and progress tell, does not count what has been generated."""
    scheduler = make()
    scheduler.submit(request(prompt=3, generated=(7, 8)))
    step(scheduler)
    events = scheduler.drain_events()
    assert [event for event in events if isinstance(event, Started)] == [Started("a", 3, 0)]
    assert [type(event) for event in events] == [Started, TokenGenerated]


def test_who_had_his_slot_gets_it_again_whoever_asks_meanwhile() -> None:
    scheduler: Scheduler = make()
    scheduler.submit(request("other", slot=1))
    with pytest.raises(PreconditionError):
        scheduler.submit(request("a", slot=1))
    scheduler.submit(request("a", slot=1, slot_deadline=float("inf"), generated=(7,)))
    step(scheduler)
    scheduler.abort("other")
    step(scheduler, now=1e12)
    assert scheduler.status(0, {}).slots[1].request_id == "a"


def test_answers_and_prompts_take_turns_where_steps_of_few_rows_round_otherwise() -> None:
    scheduler = make(slots=6, chunk_tokens=64, few_rows=4, queue_limit=9)
    for number, name in enumerate("abcde"):
        scheduler.submit(request(name, prompt=range(10 * number, 10 * number + 10)))
    turns = [rows(step(scheduler)) for _ in range(10)]  # type: ignore[arg-type]
    assert turns[::2] == [{name: 9} for name in "abcde"]
    assert turns[1::2] == [
        {"a": 1}, {"b": 1, "a": 1}, {"c": 1, "a": 1, "b": 1}, {"d": 1, "c": 1, "a": 1, "b": 1},
        {"e": 1, "d": 1, "c": 1, "b": 1},
    ]  # fmt: skip
    scheduler.submit(request("f", prompt=100))
    scheduler.submit(request("g", prompt=range(200, 205), generated=(7, 7, 7, 7, 7, 7)))
    turns = [names(step(scheduler)) for _ in range(4)]
    assert turns == [["f"], ["a", "e", "d", "c"], ["f"], ["f", "b", "a", "e"]]
    turns = [names(step(scheduler)) for _ in range(4)]
    assert turns == [["d", "c", "f", "b"], ["a", "e", "d", "c"], ["f", "b", "a", "e"], ["d", "c", "f", "b"]]
    for name in "abcdef":
        scheduler.abort(name)
    again = [rows(step(scheduler)) for _ in range(4)]  # type: ignore[arg-type]
    assert again == [{"g": 4}, {"g": 4}, {"g": 3}, {"g": 1}]


def test_answers_go_on_while_a_prompt_finds_no_room() -> None:
    scheduler = make(slots=2, n_pages=3, chunk_tokens=1000, few_rows=4)
    scheduler.submit(request("a", prompt=10))
    scheduler.submit(request("b", prompt=range(590)))
    assert [names(step(scheduler)) for _ in range(6)] == [["a"]] * 6
