"""What a worker computed before it died is not computed again by the next one."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from numoe.engine.errors import BusyError
from numoe.engine.kv import PAGE_TOKENS
from numoe.engine.requests import GenerationRequest, Started, TokenGenerated
from numoe.engine.scheduler import Scheduler
from tests.engine.scheduler.support import journal_memory, make, request, rows, step

SIZES = {"slots": 3, "context": 1000, "n_pages": 12, "chunk_tokens": 200}


@pytest.fixture
def memory() -> np.ndarray:
    return journal_memory(12, 3, 1000)


def successor(memory: np.ndarray, **changes) -> Scheduler:
    return make(memory=memory, **SIZES | changes)


def again(asked: GenerationRequest, *generated: int) -> GenerationRequest:
    """As the gateway asks the next worker."""
    return msgspec.structs.replace(asked, generated=generated, foreign=())


def test_an_answer_goes_on_with_its_next_token(memory: np.ndarray) -> None:
    scheduler, asked = successor(memory), request("a", prompt=500)
    scheduler.submit(asked)
    for _ in range(5):
        step(scheduler)
    told = [e.token_id for e in scheduler.drain_events() if isinstance(e, TokenGenerated)]
    scheduler = successor(memory)
    scheduler.submit(again(asked, *told))
    batch = step(scheduler)
    assert batch is not None
    assert rows(batch) == {"a": 1}
    assert batch.positions.tolist() == [502]
    assert scheduler.drain_events()[0] == Started("a", prompt_tokens=500, cached_tokens=500)


def test_tokens_that_nobody_was_told_of_are_chosen_again(memory: np.ndarray) -> None:
    scheduler, asked = successor(memory), request("a", prompt=50)
    scheduler.submit(asked)
    for _ in range(4):
        step(scheduler)
    scheduler = successor(memory)
    scheduler.submit(again(asked, 7))
    batch = step(scheduler)
    assert batch is not None
    assert batch.positions.tolist() == [50]


def test_a_prompt_goes_on_where_its_last_step_ended(memory: np.ndarray) -> None:
    """In steps of as many rows as without a death: on a GPU the sums of others would be rounded otherwise."""
    scheduler, asked = successor(memory, few_rows=16), request("a", prompt=700)
    scheduler.submit(asked)
    step(scheduler)
    step(scheduler)
    scheduler = successor(memory, few_rows=16)
    scheduler.submit(again(asked))
    found = [step(scheduler) for _ in range(3)]
    assert [(b.positions[0], len(b.positions)) for b in found if b is not None] == [(400, 200), (600, 99), (699, 1)]


def test_a_request_of_the_same_name_with_another_prompt_gets_nothing(memory: np.ndarray) -> None:
    scheduler = successor(memory)
    scheduler.submit(request("a", prompt=range(100)))
    step(scheduler)
    scheduler = successor(memory)
    scheduler.submit(request("a", prompt=[*range(99), 5, 6]))
    batch = step(scheduler)
    assert batch is not None
    assert batch.positions[0] == 0


def another_dies_writing(scheduler: Scheduler, page: int) -> None:
    """A request gets a page that was another's, and the worker dies in its first step."""
    scheduler.submit(request("b", prompt=range(3000, 3100), slot=1))
    batch = scheduler.schedule(0.0)
    assert batch is not None
    assert page == batch.page_tables[1, 0], "this is about a page that is used again"


def test_what_a_request_had_that_gave_way_is_not_taken_for_its(memory: np.ndarray) -> None:
    """Its page is another's now, in whose step the worker dies: keys and values are new, the journal's tokens old."""
    scheduler, first = successor(memory), request("a", prompt=100, bypass_cache=True)
    scheduler.submit(first)
    step(scheduler)
    (page,) = scheduler.slots.running()[0].table.pages
    scheduler.abort("a")
    another_dies_writing(scheduler, page)
    scheduler = successor(memory)
    scheduler.submit(again(first))
    batch = step(scheduler)
    assert batch is not None
    assert batch.positions[0] == 0


def test_pages_that_nobody_came_for_are_not_offered_again(memory: np.ndarray) -> None:
    """Another gets them, in whose step the next worker dies; then the first one comes, under the same name."""
    first = request("a", prompt=100, bypass_cache=True)
    scheduler = successor(memory)
    scheduler.submit(first)
    step(scheduler)
    (page,) = scheduler.slots.running()[0].table.pages
    scheduler = successor(memory)
    scheduler.ledger.kept.forget()
    another_dies_writing(scheduler, page)
    scheduler = successor(memory)
    scheduler.submit(again(first))
    batch = step(scheduler)
    assert batch is not None
    assert batch.positions[0] == 0


def test_a_slot_is_kept_for_who_ran_in_it(memory: np.ndarray) -> None:
    scheduler, asked = successor(memory), request("a", prompt=100)
    scheduler.submit(asked)
    step(scheduler)
    scheduler = successor(memory)
    scheduler.submit(request("new", prompt=10))
    step(scheduler)
    assert scheduler.slots.sequences[0] is None
    with pytest.raises(BusyError):
        scheduler.slots.begin(0, "restoring")
    scheduler.submit(again(asked, 7))
    batch = step(scheduler)
    assert batch is not None
    assert rows(batch)["a"] == 1
    assert scheduler.slots.sequences[0] is not None


def test_all_come_again_through_a_full_queue(memory: np.ndarray) -> None:
    asked = [request(name, prompt=20) for name in "abcde"]
    scheduler = successor(memory, queue_limit=2)
    for one in asked:
        scheduler.submit(one)
    step(scheduler)
    scheduler = successor(memory, queue_limit=2)
    for one in asked:
        scheduler.submit(again(one))
    assert scheduler.status(0, {}).queued == 2


def test_who_does_not_come_again_leaves_the_pages(memory: np.ndarray) -> None:
    scheduler = successor(memory)
    for name in "ab":
        scheduler.submit(request(name, prompt=300, bypass_cache=True))
    for _ in range(4):
        step(scheduler)
    scheduler = successor(memory)
    assert scheduler.status(0, {}).kv_pages_used == 4
    scheduler.ledger.kept.forget()
    assert scheduler.status(0, {}).kv_pages_used == 0
    scheduler.check_integrity()


def test_the_next_prompt_finds_pages_and_slots_find_their_conversations(memory: np.ndarray) -> None:
    scheduler, asked = successor(memory), request("a", prompt=2 * PAGE_TOKENS + 10, max_tokens=2, slot=1)
    scheduler.submit(asked)
    while scheduler.has_work:
        step(scheduler)
    before = scheduler.slots.conversations[1]
    assert before is not None
    scheduler = successor(memory)
    held = scheduler.slots.conversations[1]
    assert held is not None
    for name in ("computed", "root", "keys", "tail", "salt", "sampling", "prompt_tokens", "named", "last_used"):
        assert getattr(held, name) == getattr(before, name), name
    assert held.tokens.tolist() == before.tokens.tolist()
    longer = [*before.tokens.tolist(), 5, 6]
    scheduler.submit(request("b", prompt=longer))
    batch = step(scheduler)
    assert batch is not None
    assert batch.positions[0] == before.computed
    assert batch.slots[0] == 1


def test_an_erased_conversation_does_not_come_back(memory: np.ndarray) -> None:
    scheduler = successor(memory)
    scheduler.submit(request("a", prompt=10, max_tokens=1))
    step(scheduler)
    assert scheduler.slots.conversations[0] is not None
    scheduler.ledger.forget_conversation(0)
    assert successor(memory).slots.conversations == [None] * 3
