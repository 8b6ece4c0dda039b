"""What a client may rely on, one promise at a time."""

from __future__ import annotations

import numpy as np
import pytest

from numoe.engine.errors import InputError, ResourceError, UnavailableError
from numoe.engine.kv import PAGE_TOKENS
from numoe.engine.requests import Finished, PrefillProgress, SamplingParams, Started, TokenGenerated
from numoe.engine.sampling import HostLogits, SampledToken
from numoe.engine.scheduler import SchedulerConfig
from tests.engine.scheduler.support import Cache, Clock, make, names, request, rows, step


def ends(events):
    """How each request ended: {id: (reason, completion tokens)}."""
    return {e.request_id: (e.reason, e.completion_tokens) for e in events if isinstance(e, Finished)}


def generated(events):
    return [e.token_id for e in events if isinstance(e, TokenGenerated)]


# --- from prompt to answer ------------------------------------------------------------------------


def test_the_events_of_a_request_from_start_to_finish():
    scheduler = make(chunk_tokens=2)
    scheduler.submit(request("a", prompt=3, max_tokens=2))
    for token_id in (0, 11, 12):
        step(scheduler, token_id)
    *events, finished = scheduler.drain_events()
    assert events == [
        Started("a", prompt_tokens=3, cached_tokens=0),
        PrefillProgress("a", done_tokens=2, prompt_tokens=3),
        PrefillProgress("a", done_tokens=3, prompt_tokens=3),
        TokenGenerated("a", 11),
        TokenGenerated("a", 12),
    ]
    assert (finished.reason, finished.completion_tokens) == ("length", 2)
    assert not scheduler.has_work
    assert scheduler.schedule(0.0) is None
    assert scheduler.drain_events() == []


def test_logprobs_travel_with_their_token():
    scheduler = make()
    scheduler.submit(request("a", max_tokens=1, logprobs=1))
    batch = scheduler.schedule(0.0)
    sampled = scheduler.sample(batch, HostLogits(np.array([[0.0, np.log(3.0)]], np.float32)))
    scheduler.postprocess(batch, sampled)
    (token,) = [e for e in scheduler.drain_events() if isinstance(e, TokenGenerated)]
    assert token.logprob == pytest.approx(np.log(0.75))
    assert [top.token_id for top in token.top_logprobs] == [1]


def test_a_long_prompt_is_cut_into_chunks_beside_running_answers():
    scheduler = make(slots=3, chunk_tokens=10)
    scheduler.submit(request("short", prompt=4))
    step(scheduler)
    scheduler.submit(request("long", prompt=25))
    scheduler.submit(request("next", prompt=5))
    assert rows(step(scheduler)) == {"short": 1, "long": 10}
    assert rows(step(scheduler)) == {"short": 1, "long": 10}
    assert rows(step(scheduler)) == {"short": 1, "long": 5, "next": 5}
    assert rows(step(scheduler)) == {"short": 1, "long": 1, "next": 1}


def test_logit_rows_belong_to_the_parts_that_want_them():
    scheduler = make(slots=3, chunk_tokens=8)
    scheduler.submit(request("decode", prompt=[1, 2]))
    step(scheduler, token_id=3)
    scheduler.submit(request("ends", prompt=[4, 5, 6]))
    scheduler.submit(request("goes on", prompt=range(20)))
    batch = scheduler.schedule(0.0)
    assert names(batch) == ["decode", "ends", "goes on"]
    assert [part.logit_row for part in batch.parts] == [0, 1, None]
    assert batch.logit_rows.tolist() == [0, 3]
    assert batch.token_ids[batch.logit_rows].tolist() == [3, 6]
    assert batch.token_ids.tolist() == [3, 4, 5, 6, 0, 1, 2, 3, 4]
    assert batch.positions.tolist() == [2, 0, 1, 2, 0, 1, 2, 3, 4]
    assert batch.slots.tolist() == [0, 1, 1, 1, 2, 2, 2, 2, 2]
    for array in (batch.token_ids, batch.positions, batch.slots, batch.logit_rows, batch.page_tables):
        assert array.dtype == np.int32
        assert array.flags.c_contiguous

    logits = np.zeros((2, 9), np.float32)
    logits[0, 7] = logits[1, 8] = 1.0
    scheduler.drain_events()
    scheduler.postprocess(batch, scheduler.sample(batch, HostLogits(logits)))
    tokens = {e.request_id: e.token_id for e in scheduler.drain_events() if isinstance(e, TokenGenerated)}
    assert tokens == {"decode": 7, "ends": 8}


def test_requests_start_in_the_order_of_their_arrival():
    scheduler = make(slots=2, queue_limit=10)
    for name in "abcd":
        scheduler.submit(request(name, max_tokens=1))
    assert [names(step(scheduler)), names(step(scheduler))] == [["a", "b"], ["c", "d"]]
    assert [e.request_id for e in scheduler.drain_events() if isinstance(e, Started)] == list("abcd")


# --- endings --------------------------------------------------------------------------------------


def test_max_tokens_ends_with_length():
    scheduler = make()
    scheduler.submit(request("a", max_tokens=3))
    for _ in range(3):
        step(scheduler)
    assert ends(scheduler.drain_events()) == {"a": ("length", 3)}


def test_a_full_context_ends_with_length():
    scheduler = make(context=10)
    scheduler.submit(request("a", prompt=7))
    for _ in range(3):
        step(scheduler)
    assert ends(scheduler.drain_events()) == {"a": ("length", 3)}


def test_a_stop_id_ends_the_answer_and_is_not_sent():
    scheduler = make()
    scheduler.submit(request("a", stop_ids=frozenset({13, 14})))
    for token_id in (11, 12, 13):
        step(scheduler, token_id)
    events = scheduler.drain_events()
    assert generated(events) == [11, 12]
    assert ends(events) == {"a": ("stop", 2)}


def test_a_stop_id_as_the_first_token_gives_an_empty_answer():
    scheduler = make()
    scheduler.submit(request("a", stop_ids=frozenset({13})))
    step(scheduler, 13)
    assert ends(scheduler.drain_events()) == {"a": ("stop", 0)}


def test_a_stop_id_in_the_prompt_stops_nothing():
    scheduler = make()
    scheduler.submit(request("a", prompt=[13, 13], stop_ids=frozenset({13})))
    step(scheduler, 11)
    assert generated(scheduler.drain_events()) == [11]


def test_a_deadline_ends_running_and_waiting_requests_alike():
    scheduler = make(slots=1)
    scheduler.submit(request("running", deadline=5.0))
    scheduler.submit(request("waiting", deadline=5.0))
    scheduler.submit(request("patient", deadline=6.0))
    assert names(step(scheduler, now=4.9)) == ["running"]
    assert names(step(scheduler, now=5.0)) == ["patient"]
    assert ends(scheduler.drain_events()) == {"running": ("deadline", 1), "waiting": ("deadline", 0)}


def test_a_deadline_that_is_past_at_arrival_costs_no_step():
    scheduler = make()
    scheduler.submit(request("late", deadline=1.0))
    assert scheduler.schedule(2.0) is None
    assert [type(e) for e in scheduler.drain_events()] == [Finished]


def test_a_sampling_error_ends_its_request_and_no_other():
    scheduler = make()
    scheduler.submit(request("broken", sampling=SamplingParams(logit_bias=((99, 1.0),))))
    scheduler.submit(request("sound"))
    batch = scheduler.schedule(0.0)
    sampled = scheduler.sample(batch, HostLogits(np.eye(2, 5, dtype=np.float32)))
    scheduler.postprocess(batch, sampled)
    events = scheduler.drain_events()
    assert ends(events) == {"broken": ("error", 0)}
    assert [e.error for e in events if isinstance(e, Finished)] == ["logit_bias names token 99; ids are from 0 to 4"]
    assert [(e.request_id, e.token_id) for e in events if isinstance(e, TokenGenerated)] == [("sound", 1)]
    assert names(step(scheduler)) == ["sound"]


def test_fail_all_ends_everything_with_the_reason():
    scheduler = make(slots=1)
    for name in "ab":
        scheduler.submit(request(name))
    step(scheduler)
    scheduler.drain_events()
    scheduler.fail_all("shard 1 died")
    events = scheduler.drain_events()
    assert ends(events) == {"a": ("error", 1), "b": ("error", 0)}
    assert {e.error for e in events} == {"shard 1 died"}
    assert not scheduler.has_work


# --- abort ----------------------------------------------------------------------------------------


def test_abort_while_waiting():
    scheduler = make(slots=1)
    scheduler.submit(request("first"))
    scheduler.submit(request("waiting"))
    assert scheduler.abort("waiting")
    assert ends(scheduler.drain_events()) == {"waiting": ("cancelled", 0)}
    assert names(step(scheduler)) == ["first"]


def test_abort_while_running_frees_slot_and_pages_at_once():
    scheduler = make(slots=1)
    scheduler.submit(request("running"))
    scheduler.submit(request("waiting"))
    step(scheduler)
    assert scheduler.abort("running")
    assert scheduler.status(0, {}).kv_pages_used == 0
    assert names(step(scheduler)) == ["waiting"]
    assert ends(scheduler.drain_events()) == {"running": ("cancelled", 1)}


def test_abort_during_a_step_is_final():
    scheduler = make(slots=1)
    scheduler.submit(request("leaves"))
    scheduler.submit(request("waiting"))
    batch = scheduler.schedule(0.0)
    scheduler.abort("leaves")
    scheduler.drain_events()
    scheduler.postprocess(batch, [SampledToken(5)])
    assert scheduler.drain_events() == []
    scheduler.check_integrity()
    assert names(step(scheduler)) == ["waiting"]


def test_the_id_of_a_request_that_left_during_a_step_can_be_used_again_at_once():
    scheduler = make(slots=1)
    scheduler.submit(request("a", prompt=3))
    batch = scheduler.schedule(0.0)
    scheduler.abort("a")
    scheduler.submit(request("a", prompt=5))
    scheduler.drain_events()
    scheduler.postprocess(batch, [SampledToken(5)])
    assert scheduler.drain_events() == [], "the old step's token is not the new request's"
    assert rows(step(scheduler)) == {"a": 5}


def test_abort_of_nobody_says_so():
    scheduler = make()
    assert not scheduler.abort("nobody")
    assert scheduler.drain_events() == []


# --- refusals -------------------------------------------------------------------------------------


def test_a_full_queue_refuses_until_there_is_room():
    scheduler = make(slots=2, queue_limit=1)
    for name in "abc":  # two slots and a place to wait
        scheduler.submit(request(name))
    with pytest.raises(ResourceError, match="wait already"):
        scheduler.submit(request("d"))
    step(scheduler)
    with pytest.raises(ResourceError, match="wait already"):
        scheduler.submit(request("d"))
    scheduler.abort("a")
    scheduler.submit(request("d"))
    assert names(step(scheduler)) == ["b", "c"], "d waits"


def test_a_prompt_that_is_too_long_is_refused_with_both_numbers():
    scheduler = make(context=600)
    with pytest.raises(InputError, match=r"600 tokens and the context holds 600"):
        scheduler.submit(request(prompt=600))
    scheduler.submit(request(prompt=599))
    assert step(scheduler) is not None


@pytest.mark.parametrize("wrong", [{"prompt": 0}, {"max_tokens": 0}])
def test_a_request_without_anything_to_do_is_refused(wrong):
    with pytest.raises(InputError, match="at least"):
        make().submit(request(**wrong))


def test_an_id_in_use_is_refused_whether_it_waits_or_runs():
    scheduler = make(slots=1)
    for name in "ab":
        scheduler.submit(request(name))
    step(scheduler)
    for name in "ab":
        with pytest.raises(InputError, match=f"'{name}' is in use"):
            scheduler.submit(request(name))


def test_senseless_sampling_is_refused_before_it_takes_a_place():
    scheduler = make()
    with pytest.raises(InputError, match="temperature is -1"):
        scheduler.submit(request(sampling=SamplingParams(temperature=-1)))
    assert not scheduler.has_work


def test_a_cache_too_small_for_one_request_is_refused():
    with pytest.raises(InputError, match="2 KV pages cannot hold one request of 600 tokens"):
        SchedulerConfig(slots=1, context=600, chunk_tokens=1, queue_limit=1, n_pages=2)


# --- too few pages --------------------------------------------------------------------------------


def test_the_youngest_gives_way_and_continues_with_the_same_tokens():
    scheduler = make(slots=2, n_pages=3, chunk_tokens=1000)
    cache, seen, recomputed = Cache(3), [], False
    scheduler.submit(request("old", prompt=range(PAGE_TOKENS), max_tokens=400))
    scheduler.submit(request("young", prompt=range(1000, 1000 + PAGE_TOKENS - 2), max_tokens=4))
    sent = {"old": [], "young": []}
    for number in range(4 * PAGE_TOKENS):
        batch = scheduler.schedule(0.0)
        cache.run(batch)
        last = -1
        for part in batch.parts:
            last += part.rows
            name, prompt = part.sequence.request.request_id, part.sequence.request.token_ids
            assert cache.read(batch, last) == [*prompt, *sent[name]], "attention reads what the client has"
            recomputed |= name == "young" and len(sent["young"]) > 0 and part.rows > 1
        scheduler.postprocess(batch, [SampledToken(number)] * len(batch.logit_rows))
        for event in scheduler.drain_events():
            if isinstance(event, TokenGenerated):
                sent[event.request_id].append(event.token_id)
            elif isinstance(event, Finished):
                seen.append((event.request_id, event.reason, event.completion_tokens))
        if not scheduler.has_work:
            break
    assert recomputed, "old needed its second page at its first token, so young found none at its third"
    assert seen == [("old", "length", 600 - PAGE_TOKENS), ("young", "length", 4)]
    assert len(sent["young"]) == 4


def test_a_preempted_request_starts_only_once_and_keeps_its_place_in_line():
    scheduler = make(slots=2, n_pages=3, chunk_tokens=1000)
    scheduler.submit(request("old", prompt=2 * PAGE_TOKENS - 1))
    scheduler.submit(request("young", prompt=[1, 2, 3]))
    scheduler.submit(request("later", prompt=[4, 5, 6]))
    assert names(step(scheduler)) == ["old", "young"]
    assert names(step(scheduler)) == ["old", "young"]
    assert names(step(scheduler)) == ["old"], "the third page is for the oldest"
    assert scheduler.abort("old")
    assert rows(step(scheduler)) == {"young": 3 + 2, "later": 3}
    events = scheduler.drain_events()
    assert [e.request_id for e in events if isinstance(e, Started)] == ["old", "young", "later"]
    assert [e.done_tokens for e in events if isinstance(e, PrefillProgress) and e.request_id == "young"] == [3]


def test_a_preempted_request_can_be_aborted():
    scheduler = make(slots=2, n_pages=3, chunk_tokens=1000)
    scheduler.submit(request("old", prompt=2 * PAGE_TOKENS - 1))
    scheduler.submit(request("young", prompt=3))
    for _ in range(3):
        step(scheduler)
    assert scheduler.abort("young")
    assert ends(scheduler.drain_events()) == {"young": ("cancelled", 2)}
    scheduler.check_integrity()


def test_age_decides_who_gives_way_even_if_the_clock_stands_still():
    scheduler = make(slots=2, n_pages=3, chunk_tokens=1000, clock=lambda: 0.0)
    scheduler.submit(request("gone", prompt=3))
    scheduler.submit(request("old", prompt=2 * PAGE_TOKENS - 1))
    step(scheduler)
    scheduler.abort("gone")
    scheduler.submit(request("young", prompt=3))  # takes the lower slot
    step(scheduler)
    assert names(step(scheduler)) == ["old"]


# --- steps that fail ------------------------------------------------------------------------------


def test_a_step_that_is_given_up_is_scheduled_again_unchanged():
    scheduler = make(chunk_tokens=5)
    scheduler.submit(request("a", prompt=9))
    step(scheduler)
    first, again = scheduler.schedule(0.0), scheduler.schedule(0.0)
    for field in ("token_ids", "positions", "slots", "logit_rows", "page_tables"):
        assert np.array_equal(getattr(first, field), getattr(again, field))


def test_logits_that_are_not_numbers_end_only_their_request():
    scheduler = make()
    for name in "ab":
        scheduler.submit(request(name))
    batch = scheduler.schedule(0.0)
    sampled = scheduler.sample(batch, HostLogits(np.array([[np.nan, 0.0], [0.0, 1.0]], np.float32)))
    assert isinstance(sampled[0], UnavailableError)
    scheduler.postprocess(batch, sampled)
    assert ends(scheduler.drain_events()) == {"a": ("error", 0)}


# --- looking --------------------------------------------------------------------------------------


def test_timings_are_the_clocks():
    clock = Clock()
    scheduler = make(slots=1, chunk_tokens=2, clock=clock)
    scheduler.submit(request("a", prompt=4, max_tokens=3))
    clock.now = 1.0
    step(scheduler)  # leaves the queue
    clock.now = 3.0
    step(scheduler)  # the first token
    clock.now = 7.0
    step(scheduler)
    clock.now = 11.0
    step(scheduler)  # the third and last
    (timings,) = [e.timings for e in scheduler.drain_events() if isinstance(e, Finished)]
    assert (timings.queued_ms, timings.prefill_ms, timings.decode_ms) == (1000.0, 2000.0, 8000.0)


def test_timings_of_a_request_that_never_ran():
    clock = Clock()
    scheduler = make(clock=clock)
    scheduler.submit(request("a"))
    clock.now = 2.5
    scheduler.abort("a")
    (finished,) = scheduler.drain_events()
    assert (finished.timings.queued_ms, finished.timings.prefill_ms, finished.timings.decode_ms) == (2500.0, 0.0, 0.0)


def test_status_tells_slots_queue_and_pages():
    scheduler = make(slots=3, chunk_tokens=10, queue_limit=5)
    scheduler.submit(request("decodes", prompt=4))
    step(scheduler)
    scheduler.submit(request("prefills", prompt=300))
    step(scheduler)
    scheduler.submit(request("waits"))
    status = scheduler.status(steps=2, step_ms={"total": 1.5})
    assert [(s.state, s.request_id, s.tokens) for s in status.slots] == [
        ("decode", "decodes", 6),
        ("prefill", "prefills", 300),
        ("idle", "", 0),
    ]
    assert (status.queued, status.queue_limit) == (1, 5)
    assert (status.kv_pages_used, status.kv_pages_total) == (2, 9)
    assert (status.steps, status.step_ms) == (2, {"total": 1.5})


def test_integrity_check_finds_a_lost_page():
    scheduler = make()
    scheduler.submit(request("a"))
    step(scheduler)
    scheduler.slots.sequences[0].table.pages.clear()
    with pytest.raises(RuntimeError, match="sequences hold 0 KV pages, the allocator gave out 1"):
        scheduler.check_integrity()
