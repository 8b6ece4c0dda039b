"""A prefix that was computed before is not computed again, unless somebody asks for that."""

from __future__ import annotations

import pytest

from numoe.engine.kv import PAGE_TOKENS
from numoe.engine.requests import Started
from numoe.engine.scheduler import Scheduler
from tests.engine.scheduler.support import make, names, request, rows, step

LONG = 2 * PAGE_TOKENS + 40


def run(scheduler: Scheduler, name: str, prompt: object, **rest: object) -> int:
    """Run a request of one token to its end; its cached tokens."""
    scheduler.submit(request(name, prompt, max_tokens=1, **rest))
    while scheduler.has_work:
        step(scheduler)
    (started,) = [e for e in scheduler.drain_events() if isinstance(e, Started)]
    return started.cached_tokens


def test_full_pages_of_the_same_prompt_are_found_again() -> None:
    scheduler = make(context=3 * PAGE_TOKENS)
    assert [run(scheduler, name, LONG) for name in "ab"] == [0, LONG - 1]
    assert scheduler.status(0, {}).kv_pages_used == 0
    assert scheduler.status(0, {}).kv_pages_cached == 3


@pytest.mark.parametrize("length", [2, PAGE_TOKENS, PAGE_TOKENS + 1, 2 * PAGE_TOKENS, 2 * PAGE_TOKENS + 100])
def test_the_last_token_is_computed_for_its_logits(length: int) -> None:
    scheduler = make(context=3 * PAGE_TOKENS)
    assert [run(scheduler, name, length) for name in "ab"] == [0, length - 1]


def test_only_the_common_beginning_is_shared() -> None:
    scheduler = make(context=3 * PAGE_TOKENS, n_pages=9)
    run(scheduler, "a", range(LONG))
    other = [*range(PAGE_TOKENS), -1, *range(PAGE_TOKENS + 1, LONG)]
    assert run(scheduler, "b", other) == PAGE_TOKENS
    assert run(scheduler, "c", [-1, *range(1, LONG)]) == 0


@pytest.mark.parametrize("n_pages", [2, 3])
def test_what_was_generated_is_found_by_the_next_turn(n_pages: int) -> None:
    scheduler = make(slots=1, context=2 * PAGE_TOKENS, n_pages=n_pages)  # with 2, none is free for a copy of the tail
    scheduler.submit(request("a", PAGE_TOKENS - 10, max_tokens=20))
    while scheduler.has_work:
        step(scheduler, token_id=5)
    scheduler.drain_events()
    assert run(scheduler, "b", [*range(1000, 1000 + PAGE_TOKENS - 10), *[5] * 20, 6]) == PAGE_TOKENS + 9


def test_requests_that_run_at_once_share_pages() -> None:
    scheduler = make(context=3 * PAGE_TOKENS, chunk_tokens=LONG, n_pages=6)
    scheduler.submit(request("a", LONG))
    step(scheduler)
    scheduler.submit(request("b", LONG))
    batch = step(scheduler)
    assert rows(batch) == {"a": 1, "b": 40}
    assert scheduler.status(0, {}).kv_pages_used == 4
    scheduler.abort("a")
    scheduler.check_integrity()
    assert names(step(scheduler)) == ["b"]


def test_salts_are_worlds_of_their_own() -> None:
    scheduler = make(context=3 * PAGE_TOKENS, n_pages=9)
    assert [run(scheduler, str(i), LONG, cache_salt=salt) for i, salt in enumerate([b"", b"x", b"y", b"x"])] == [
        0, 0, 0, LONG - 1,
    ]  # fmt: skip


def test_a_request_that_bypasses_neither_uses_nor_leaves_pages() -> None:
    scheduler = make(context=3 * PAGE_TOKENS)
    run(scheduler, "a", LONG, bypass_cache=True)
    assert scheduler.status(0, {}).kv_pages_cached == 0
    run(scheduler, "b", LONG)
    assert run(scheduler, "c", LONG, bypass_cache=True) == 0


def test_the_tail_that_was_used_least_recently_makes_room() -> None:
    scheduler = make(slots=1, context=3 * PAGE_TOKENS, n_pages=4)
    run(scheduler, "a", range(LONG))  # leaves two pages
    run(scheduler, "b", range(-LONG, 0))  # needs three of four: the end of a's goes
    assert run(scheduler, "c", range(LONG)) == PAGE_TOKENS


def test_a_preempted_answer_finds_its_pages_again() -> None:
    scheduler = make(slots=2, context=2 * PAGE_TOKENS, chunk_tokens=1000, n_pages=3)
    scheduler.submit(request("old", PAGE_TOKENS - 1))
    step(scheduler)
    scheduler.submit(request("young", PAGE_TOKENS + 8))
    step(scheduler)
    while len(names(step(scheduler))) == 2:
        pass  # until the older one needs a second page
    scheduler.abort("old")
    batch = step(scheduler)
    assert names(batch) == ["young"]
    assert batch.positions[0] >= PAGE_TOKENS, "the first page is still there"
