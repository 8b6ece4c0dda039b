"""The step loop: every request's events come out in order and once, whatever happens beside it."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest

from numoe.engine.errors import InputError, ResourceError, UnavailableError
from numoe.engine.experts.mailbox import LateShardError
from numoe.engine.requests import Finished, GenerationRequest, PrefillProgress, Started, TokenGenerated
from numoe.engine.sampling import HostLogits
from numoe.engine.scheduler import Scheduler, SchedulerConfig
from numoe.engine.worker import pulse
from numoe.engine.worker.engine import Engine
from numoe.engine.worker.options import nothing

VOCAB, CONTEXT, PATIENCE_S = 50, 40, 10.0


@dataclass
class Sizes:
    """What the engine asks a forward pass about itself."""

    context: int = CONTEXT
    vocab: int = VOCAB


class CopiedPages:
    """Pages that hold nothing."""

    def copy_page(self, source, target):
        pass


class CountingForward:
    """A model that answers n with n + 1. A step can be held, and made to fail."""

    options = config = Sizes()
    pages = CopiedPages()

    def __init__(self):
        self.steps, self.errors = 0, []
        self.entered, self.gate = threading.Semaphore(0), threading.Event()
        self.gate.set()

    def run(self, batch, meanwhile=nothing):
        self.steps += 1
        self.entered.release()
        meanwhile()
        assert self.gate.wait(PATIENCE_S)
        if self.errors:
            raise self.errors.pop()
        logits = np.zeros((len(batch.logit_rows), VOCAB), np.float32)
        logits[np.arange(len(logits)), (batch.token_ids[batch.logit_rows] + 1) % VOCAB] = 1.0
        return HostLogits(logits)

    def times_ms(self):
        return {"attention": 0.5, "experts": 0.25, "wait": 0.125}


class Outbox:
    """Receives the events; `wait_for` waits for the end of some requests."""

    def __init__(self):
        self.batches, self._arrived = [], threading.Condition()

    def __call__(self, events):
        with self._arrived:
            self.batches.append(list(events))
            self._arrived.notify_all()

    def of(self, name):
        return [event for events in self.batches for event in events if event.request_id == name]

    def tokens(self, name):
        return [event.token_id for event in self.of(name) if isinstance(event, TokenGenerated)]

    def ends(self):
        return {e.request_id: e.reason for events in self.batches for e in events if isinstance(e, Finished)}

    def wait_for(self, *names):
        with self._arrived:
            assert self._arrived.wait_for(lambda: set(names) <= set(self.ends()), PATIENCE_S), self.batches


class Loop:
    """An engine, its loop in a thread, and what came out."""

    def __init__(self, slots=2, queue_limit=100):
        sizes = {"context": CONTEXT, "chunk_tokens": 4, "n_pages": slots}
        scheduler = Scheduler(SchedulerConfig(slots=slots, queue_limit=queue_limit, **sizes))
        self.forward, self.out = CountingForward(), Outbox()
        self.engine = Engine(scheduler, self.forward, self.out)
        self.error = None
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _run(self):
        try:
            self.engine.run()
        except Exception as error:  # noqa: BLE001 (looked at by the test)
            self.error = error

    def start(self):
        self.thread.start()
        return self

    def hold(self):
        """The next step waits in the forward pass until `release`."""
        self.forward.gate.clear()

    def wait_until_held(self):
        assert self.forward.entered.acquire(timeout=PATIENCE_S)

    def release(self):
        self.forward.gate.set()

    def join(self):
        self.thread.join(PATIENCE_S)
        assert not self.thread.is_alive(), "the loop did not end"


@pytest.fixture
def make():
    loops = []

    def _make(**sizes):
        loops.append(Loop(**sizes))
        return loops[-1]

    yield _make
    for loop in loops:
        loop.release()
        loop.engine.stop()
        if loop.thread.ident:
            loop.join()


@pytest.fixture
def loop(make):
    return make().start()


def request(name="a", prompt=(1, 2, 3), max_tokens=3, **rest):
    return GenerationRequest(request_id=name, token_ids=tuple(prompt), max_tokens=max_tokens, **rest)


# --- answering ------------------------------------------------------------------------------------


def test_events_come_out_in_order_and_once(loop):
    loop.engine.submit(request(prompt=range(6), max_tokens=3))
    loop.out.wait_for("a")
    *events, finished = loop.out.of("a")
    assert events == [
        Started("a", prompt_tokens=6, cached_tokens=0),
        PrefillProgress("a", done_tokens=4, prompt_tokens=6),
        PrefillProgress("a", done_tokens=6, prompt_tokens=6),
        TokenGenerated("a", 6),
        TokenGenerated("a", 7),
        TokenGenerated("a", 8),
    ]
    assert (finished.reason, finished.completion_tokens) == ("length", 3)


def test_a_token_is_sent_while_the_next_step_is_under_way(make):
    """Not between the two, where a device would wait for it."""
    loop, seen = make(), []
    run = loop.forward.run

    def counted(batch, meanwhile):
        seen.append(len(loop.out.tokens("a")))
        logits = run(batch, meanwhile)
        seen.append(len(loop.out.tokens("a")))
        return logits

    loop.forward.run = counted
    loop.engine.submit(request(prompt=[1], max_tokens=3))
    loop.start()
    loop.out.wait_for("a")
    assert seen == [0, 0, 0, 1, 1, 2]


def test_a_step_is_one_message_for_all_requests(make):
    loop = make()
    for name in "ab":
        loop.engine.submit(request(name, prompt=[1], max_tokens=2))
    loop.start()
    loop.out.wait_for("a", "b")
    assert [[type(event).__name__ for event in events] for events in loop.out.batches] == [
        ["Started"] * 2,
        ["PrefillProgress", "TokenGenerated"] * 2,
        ["TokenGenerated", "Finished"] * 2,
    ]


def test_an_idle_loop_wakes_for_each_request(loop):
    for name in "abc":
        loop.engine.submit(request(name))
        loop.out.wait_for(name)
    assert loop.out.ends() == dict.fromkeys("abc", "length")


def test_an_idle_loop_uses_no_processor(loop):
    loop.engine.submit(request())
    loop.out.wait_for("a")
    time.sleep(0.05)
    clock, steps = time.pthread_getcpuclockid(loop.thread.ident), loop.forward.steps
    before = time.clock_gettime(clock)
    time.sleep(0.5)
    assert time.clock_gettime(clock) - before < 0.005, "1 % of a core"
    assert loop.forward.steps == steps


def test_many_callers_at_once_get_each_their_own(loop):
    def call(caller):
        for number in range(10):
            name = f"{caller}-{number}"
            loop.engine.submit(request(name, prompt=[caller, number], max_tokens=4))
            if number % 3 == 2:
                loop.engine.abort(name)

    callers = [threading.Thread(target=call, args=(caller,)) for caller in range(6)]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join()
    names = [f"{caller}-{number}" for caller in range(6) for number in range(10)]
    loop.out.wait_for(*names)
    for name in names:
        number, events = int(name.split("-")[1]), loop.out.of(name)
        assert sum(isinstance(event, Finished) for event in events) == 1
        assert isinstance(events[-1], Finished)
        tokens = loop.out.tokens(name)
        assert tokens == [number + 1, number + 2, number + 3, number + 4][: len(tokens)]
        assert events[-1].completion_tokens == len(tokens)
        assert events[-1].reason == ("length" if len(tokens) == 4 else "cancelled")


def test_refusals_reach_the_caller_and_leave_no_event(make):
    loop = make(slots=1, queue_limit=1)
    loop.engine.submit(request("a"))
    loop.engine.submit(request("b"))
    with pytest.raises(ResourceError, match="wait already"):
        loop.engine.submit(request("c"))
    loop.engine.abort("b")
    with pytest.raises(InputError, match="context holds 40"):
        loop.engine.submit(request("d", prompt=range(CONTEXT)))
    loop.start()
    loop.out.wait_for("a")
    assert loop.out.ends() == {"a": "length", "b": "cancelled"}


def test_a_deadline_is_wall_clock_time(loop):
    loop.engine.submit(request("past", deadline=time.time() - 1))
    loop.engine.submit(request("future", deadline=time.time() + 60))
    loop.out.wait_for("past", "future")
    assert loop.out.ends() == {"past": "deadline", "future": "length"}


def test_status_tells_of_steps_and_where_their_time_went(loop):
    assert loop.engine.status().steps == 0
    loop.engine.submit(request(max_tokens=3))
    loop.out.wait_for("a")
    status = loop.engine.status()
    assert status.steps == 3
    assert set(status.step_ms) == {"attention", "experts", "wait", "sampling", "total"}
    assert status.step_ms["attention"] == 0.5
    assert status.step_ms["total"] >= status.step_ms["sampling"] > 0


def test_status_answers_during_a_step(loop):
    loop.hold()
    loop.engine.submit(request())
    loop.wait_until_held()
    assert [slot.state for slot in loop.engine.status().slots] == ["prefill", "idle"]


# --- abort ----------------------------------------------------------------------------------------


def test_an_abort_during_a_step_frees_the_slot_and_is_the_last_event(loop):
    loop.hold()
    loop.engine.submit(request("a"))
    loop.wait_until_held()
    loop.engine.abort("a")
    assert [slot.state for slot in loop.engine.status().slots] == ["idle", "idle"]
    loop.release()
    loop.out.wait_for("a")
    loop.engine.submit(request("b"))
    loop.out.wait_for("b")
    assert [type(event) for event in loop.out.of("a")] == [Started, Finished]
    assert loop.out.ends()["a"] == "cancelled"


def test_what_a_step_writes_is_nobody_elses_before_its_end(loop):
    """Not even when its request has left: a restore, say, would have its pages written over."""
    loop.hold()
    loop.engine.submit(request("a"))
    loop.wait_until_held()
    loop.engine.abort("a")
    ledger = loop.engine._scheduler.ledger
    with pytest.raises(ResourceError, match="1 of 2 pages free and 2 are needed"):
        ledger.spare_pages([b"1", b"2"])
    loop.release()
    loop.engine.stop()
    spare = ledger.spare_pages([b"1", b"2"])
    ledger.give_back([page for _, page, _ in spare])


def test_an_abort_that_overtakes_its_request_wins(loop):
    loop.engine.abort("a")
    loop.engine.submit(request("a"))
    loop.out.wait_for("a")
    assert [type(event) for event in loop.out.of("a")] == [Finished]
    assert loop.out.ends() == {"a": "cancelled"}
    assert loop.forward.steps == 0


def test_an_abort_counts_for_one_request_only(loop):
    loop.engine.abort("a")
    loop.engine.submit(request("a"))
    loop.out.wait_for("a")
    loop.engine.submit(request("a"))
    loop.engine.submit(request("b", max_tokens=10))
    loop.out.wait_for("b")
    assert loop.out.ends()["a"] == "length"


def test_an_abort_after_the_end_does_not_hit_the_next_request_of_that_id(loop):
    loop.engine.submit(request("a"))
    loop.out.wait_for("a")
    loop.engine.abort("a")
    loop.out.batches.clear()
    loop.engine.submit(request("a"))
    loop.out.wait_for("a")
    assert loop.out.ends() == {"a": "length"}


def test_aborts_of_nobody_are_not_remembered_forever(loop):
    for number in range(5000):
        loop.engine.abort(f"nobody {number}")
    loop.engine.submit(request("nobody 0"))
    loop.engine.submit(request("nobody 4999"))
    loop.out.wait_for("nobody 0", "nobody 4999")
    assert loop.out.ends() == {"nobody 0": "length", "nobody 4999": "cancelled"}


# --- failure --------------------------------------------------------------------------------------


def test_a_failed_step_ends_its_requests_and_the_loop_goes_on(loop):
    loop.forward.errors.append(UnavailableError("expert shard 1 did not answer"))
    loop.engine.submit(request("a"))
    loop.out.wait_for("a")
    finished = loop.out.of("a")[-1]
    assert (finished.reason, finished.error) == ("unavailable", "expert shard 1 did not answer")
    loop.engine.submit(request("b"))
    loop.out.wait_for("b")
    assert loop.out.tokens("b") == [4, 5, 6]


def test_a_failed_step_of_a_request_that_left_is_no_news(loop):
    loop.hold()
    loop.engine.submit(request("a"))
    loop.wait_until_held()
    loop.engine.abort("a")
    loop.forward.errors.append(UnavailableError("expert shard 1 did not answer"))
    loop.release()
    loop.out.wait_for("a")
    loop.engine.submit(request("b"))
    loop.out.wait_for("b")
    assert [type(event) for event in loop.out.of("a")] == [Started, Finished]
    assert loop.out.ends() == {"a": "cancelled", "b": "length"}


def test_a_step_is_run_again_until_the_late_shard_is_back(loop):
    loop.forward.errors = [LateShardError(1), LateShardError(0)]
    loop.engine.submit(request("a", [3], 4))
    loop.out.wait_for("a")
    assert loop.out.tokens("a") == [4, 5, 6, 7]
    assert loop.forward.steps == 4 + 2


def test_requests_that_end_while_a_shard_is_late_are_left_out_of_the_next_attempt(make):
    loop = make(slots=3)
    loop.hold()
    for name, deadline in (("gone", None), ("late", time.time() + 0.05), ("stays", None)):
        loop.engine.submit(request(name, [3, 4], 2, deadline=deadline))
    loop.forward.errors = [LateShardError(1)]
    loop.start()
    loop.wait_until_held()
    loop.engine.abort("gone")
    time.sleep(0.1)
    loop.release()
    loop.out.wait_for("gone", "late", "stays")
    assert loop.out.ends() == {"gone": "cancelled", "late": "deadline", "stays": "length"}
    assert loop.out.tokens("stays") == [5, 6]
    assert loop.out.tokens("gone") == loop.out.tokens("late") == []


def test_nobody_fails_where_all_of_a_late_step_have_left(make):
    loop = make(slots=1).start()
    loop.hold()
    loop.forward.errors = [LateShardError(1)]
    loop.engine.submit(request("gone", [3], 4))
    loop.wait_until_held()
    loop.engine.submit(request("waits", [7], 2))
    loop.engine.abort("gone")
    loop.release()
    loop.out.wait_for("waits")
    assert loop.out.tokens("waits") == [8, 9]


def test_stop_does_not_wait_for_a_late_shard(make):
    loop = make().start()
    loop.forward.errors = [LateShardError(1)] * 1000
    loop.engine.submit(request("a", [3], 4))
    loop.wait_until_held()
    loop.engine.stop()
    loop.join()
    assert loop.out.ends() == {"a": "unavailable"}


def test_a_bug_ends_the_loop_aloud_and_stop_still_returns(loop):
    loop.forward.errors.append(ZeroDivisionError("a bug"))
    loop.engine.submit(request("a"))
    loop.join()
    assert isinstance(loop.error, ZeroDivisionError)
    loop.engine.stop()


# --- stopping -------------------------------------------------------------------------------------


def test_stop_while_idle_ends_the_loop(loop):
    loop.engine.stop()
    loop.join()
    assert loop.out.batches == []


def test_stop_before_the_start_ends_the_loop_at_once(make):
    loop = make()
    loop.engine.submit(request("a"))
    loop.engine.stop()
    loop.start().join()
    assert loop.out.ends() == {"a": "unavailable"}
    assert loop.forward.steps == 0


def test_stop_waits_for_the_step_under_way_and_tells_everybody(loop):
    loop.hold()
    for name in "abc":
        loop.engine.submit(request(name))
    loop.wait_until_held()
    stopping = threading.Thread(target=loop.engine.stop)
    stopping.start()
    stopping.join(0.1)
    assert stopping.is_alive(), "stop returned in the middle of a step"
    loop.release()
    stopping.join(PATIENCE_S)
    loop.join()
    assert loop.out.ends() == dict.fromkeys("abc", "unavailable")
    assert {loop.out.of(name)[-1].error for name in "abc"} == {"the server is stopping"}
    assert loop.forward.steps == 1


def test_a_stopped_engine_takes_no_requests(loop):
    loop.engine.stop()
    with pytest.raises(UnavailableError, match="stopping"):
        loop.engine.submit(request())


# --- logits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_logits_of_every_position_come_in_chunks(make, chunk):
    parts = list(make().engine.logits([5, 6, 7, 1, 2, 3, 4], chunk))
    assert [len(part) for part in parts[:-1]] == [chunk] * (len(parts) - 1)
    assert np.concatenate(parts).argmax(axis=1).tolist() == [6, 7, 8, 2, 3, 4, 5]


@pytest.mark.parametrize("ids", [[], [0] * (CONTEXT + 1), [VOCAB], [-1]])
def test_logits_of_what_the_model_cannot_take_are_refused(make, ids):
    with pytest.raises(InputError):
        next(make().engine.logits(ids, 4))


def test_a_step_that_does_not_end_is_told(loop, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(pulse, "time", SimpleNamespace(monotonic=lambda: now[0]))
    loop.hold()
    loop.engine.submit(request())
    loop.wait_until_held()
    now[0] = 61.0
    assert loop.engine.why_stuck() == "", "three rows may take a little more"
    now[0] = 62.0
    assert loop.engine.why_stuck() == "has not come to the end of a step of 3 rows for 62 s"
    loop.release()
    loop.out.wait_for("a")
    with loop.engine._changed:  # the step's end is not the loop's
        now[0] = 1000.0
    assert loop.engine.why_stuck() == ""


def test_a_step_that_is_tried_again_does_not_hang(loop, monkeypatch):
    now, told, run = [0.0], [], loop.forward.run

    def slow(batch, meanwhile):
        now[0] += 50.0
        told.append(loop.engine.why_stuck())
        return run(batch, meanwhile)

    monkeypatch.setattr(pulse, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(loop.forward, "run", slow)
    loop.forward.errors += [LateShardError(0)] * 3
    loop.engine.submit(request(max_tokens=1))
    loop.out.wait_for("a")
    assert told == [""] * 4
