"""Whatever comes, in whatever order: every request gets its own tokens and exactly one end.

The forward pass is played by a cache of token ids, so that each step shows what attention would
read: if pages were shared, lost, stale or filled twice, a request would see another's tokens. The
prompt cache beyond the pages is played as well: it answers late, loses chunks, and writes to pages
of requests that are gone.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import msgspec
import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from numoe.engine.errors import NumoeError, ResourceError, UnavailableError
from numoe.engine.kv import PAGE_TOKENS, pages_for
from numoe.engine.requests import Finished, GenerationRequest, PrefillProgress, Started, TokenGenerated
from numoe.engine.sampling import SampledToken
from numoe.engine.scheduler import Batch, Scheduler, Sequence
from numoe.engine.scheduler.conversation import Parked
from numoe.engine.scheduler.load import Load
from tests.engine.scheduler.support import Cache, Clock, journal_memory, make, request

CONTEXT = 3 * PAGE_TOKENS - 100
STOP = 9
PATIENCE = 12  # tokens that a request must get once it is the oldest and only steps happen
# Short, around the end of a page, and close to the context: where pages run out while others decode.
PROMPT_LENGTHS = (
    st.integers(1, 8)
    | st.integers(PAGE_TOKENS - 6, PAGE_TOKENS + 2)
    | st.integers(2 * PAGE_TOKENS - 6, 2 * PAGE_TOKENS + 2)
    | st.integers(CONTEXT - 6, CONTEXT - 1)
)
TOKENS = st.lists(st.integers(0, STOP), min_size=4, max_size=4)


@dataclass
class Expected:
    """What a client knows of its request, and how it must end (None: it still runs)."""

    request: GenerationRequest
    sent: list[int] = field(default_factory=list)
    prefilled: int = 0
    started: bool = False
    goes_on: bool = False
    untold: list[int] = field(default_factory=list)  # tokens that a worker that died has chosen: so does the next
    ending: str | None = None
    finished: bool = False

    @property
    def history(self) -> list[int]:
        return [*self.request.token_ids, *self.sent]


class AnyTraffic(RuleBasedStateMachine):
    """Submits, aborts, deadlines and steps that work, fail, are run again or are given up."""

    @initialize(
        slots=st.integers(2, 4), n_pages=st.integers(3, 5), chunk_tokens=st.sampled_from([40, PAGE_TOKENS, 1000]),
        caches=st.booleans(), few_rows=st.sampled_from([0, 3, 16]),
    )  # fmt: skip
    def start(self, slots: int, n_pages: int, chunk_tokens: int, caches: bool, few_rows: int = 0) -> None:
        self.clock, self.wall = Clock(), 0.0
        self.options = {
            "slots": slots, "context": CONTEXT, "chunk_tokens": chunk_tokens, "queue_limit": 3, "n_pages": n_pages,
            "clock": self.clock, "caches": caches, "few_rows": few_rows,
            "memory": journal_memory(n_pages, slots, CONTEXT),
        }  # fmt: skip
        self.scheduler: Scheduler = make(**self.options)
        self.stored: dict[bytes, np.ndarray] = {}
        self.unsaved: list[bytes] = []
        self.lookups: list[tuple[Sequence, list[bytes]]] = []
        self.loads: list[Load] = []
        self.cache = Cache(n_pages)
        self.parked: list[Parked] = []
        self.requests: dict[str, Expected] = {}

    # --- what may happen --------------------------------------------------------------------------

    @rule(lengths=st.lists(st.integers(PAGE_TOKENS - 4, PAGE_TOKENS), min_size=2, max_size=4))
    def a_crowd_that_needs_more_pages_soon(self, lengths: list[int]) -> None:
        for length in lengths:
            self.submit(length, max_tokens=1000, stops=False, lifetime=None)

    @rule(
        length=PROMPT_LENGTHS,
        max_tokens=st.integers(1, 12) | st.just(1000),
        stops=st.booleans(),
        lifetime=st.none() | st.integers(0, 8),
        family=st.none() | st.integers(1, 2),
        common=PROMPT_LENGTHS,
        salt=st.sampled_from([b"", b"", b"a"]),
        bypass=st.sampled_from([False, False, True]),
        slot=st.none() | st.none() | st.integers(0, 1),
    )
    def submit(
        self, length: int, max_tokens: int, stops: bool, lifetime: int | None,
        family: int | None = None, common: int = 0, salt: bytes = b"", bypass: bool = False, slot: int | None = None,
    ) -> None:  # fmt: skip
        """A request whose ids are nobody else's, or begin with as many as it has in common with its family."""
        number = len(self.requests)
        shared = [] if family is None else list(range(-1000 * family, -1000 * family + min(common, length)))
        own = range(1000 * (number + 1) + len(shared), 1000 * (number + 1) + length)
        new = request(
            str(number),
            [*shared, *own],
            max_tokens,
            cache_salt=salt,
            bypass_cache=bypass,
            slot=slot,
            slot_deadline=None if slot is None else self.wall + 1e6,
            stop_ids=frozenset({STOP} if stops else ()),
            deadline=None if lifetime is None else self.wall + lifetime,
        )
        try:
            self.scheduler.submit(new)
        except ResourceError:
            assert self.scheduler.status(0, {}).queued >= 3, "refused although the queue has room"
        else:
            self.requests[new.request_id] = Expected(new)

    @precondition(lambda self: self.requests)
    @rule(number=st.integers(0, 100))
    def abort(self, number: int) -> None:
        expected = self.requests[str(number % len(self.requests))]
        assert self.scheduler.abort(expected.request.request_id) == (expected.ending is None)
        expected.ending = expected.ending or "cancelled"
        self.take_events()

    @rule(seconds=st.sampled_from([0.5, 3.0]))
    def time_passes(self, seconds: float) -> None:
        self.wall += seconds
        self.clock.now += seconds

    @rule(tokens=TOKENS, failures=st.sampled_from([0, 0, 0, 1, 2]))
    def a_step(self, tokens: list[int], failures: int) -> None:
        if (batch := self.schedule()) is not None:
            for _ in range(1 + failures):
                self.cache.run(batch)
            self.check_attention(batch)
            self.finish_step(batch, self.choose(batch, tokens))

    @rule(tokens=TOKENS, times=st.integers(4, 12))
    def some_steps(self, tokens: list[int], times: int) -> None:
        for _ in range(times):
            self.a_step(tokens, failures=0)

    @rule(tokens=TOKENS, number=st.integers(0, 100), retried=st.booleans())
    def a_step_during_which_somebody_leaves(self, tokens: list[int], number: int, retried: bool) -> None:
        if (batch := self.schedule()) is not None:
            self.cache.run(batch)
            self.check_attention(batch)
            self.abort(number)
            if retried:
                self.cache.run(batch)
            self.finish_step(batch, self.choose(batch, tokens))

    @rule(tokens=TOKENS, broken=st.integers(0, 3))
    def a_step_with_a_sampling_error(self, tokens: list[int], broken: int) -> None:
        if (batch := self.schedule()) is not None:
            self.cache.run(batch)
            sampled: list[SampledToken | NumoeError] = [*self.choose(batch, tokens)]
            if broken < len(sampled):
                sampled[broken] = UnavailableError("not finite")
            self.finish_step(batch, sampled)

    @rule()
    def a_step_that_is_given_up(self) -> None:
        if (batch := self.schedule()) is not None:
            self.cache.run(batch)

    @rule(
        tokens=TOKENS, when=st.sampled_from(["between steps", "in a step", "before it was told"]),
        one_left=st.booleans(), early=st.integers(0, 3),
    )  # fmt: skip
    def the_worker_dies(self, tokens: list[int], when: str, one_left: bool, early: int = 0) -> None:
        """Its successor has pages and journal, and gets the requests that have not ended, perhaps all but one.

        early: so many that a worker in between got, which died before it had all of them.
        """
        if when != "between steps" and (batch := self.schedule()) is not None:
            self.cache.run(batch)
            if when == "before it was told":
                sampled = self.choose(batch, tokens)
                self.scheduler.postprocess(batch, sampled)
                for part in batch.parts:
                    if part.logit_row is not None:
                        token = sampled[part.logit_row].token_id
                        self.requests[part.sequence.request.request_id].untold.insert(0, token)
        if early:
            self.scheduler = make(**self.options)
            for expected in [e for e in self.requests.values() if e.ending is None][:early]:
                self.scheduler.submit(msgspec.structs.replace(expected.request, generated=tuple(expected.sent)))
            self.scheduler.schedule(self.wall)
        self.scheduler = make(**self.options)
        self.lookups, self.loads, self.unsaved, self.parked = [], [], [], []
        for expected in self.requests.values():
            if expected.ending is None and one_left:
                expected.ending, expected.finished = "cancelled", True
                one_left = False
            elif expected.ending is None:
                left = msgspec.structs.replace(
                    expected.request, generated=tuple(expected.sent), foreign=() if expected.started else None
                )
                expected.started, expected.goes_on = False, True
                self.scheduler.submit(left)
        self.scheduler.ledger.kept.forget()
        self.take_events()

    def teardown(self) -> None:
        """Nothing starves: once all is quiet, each request ends within the steps that it needs."""
        if not hasattr(self, "scheduler"):
            return
        steps = -(-CONTEXT // self.scheduler.config.chunk_tokens) + PATIENCE
        if self.scheduler.config.few_rows:  # others have their turns
            steps *= 4
        for name, expected in self.requests.items():  # each the oldest when its turn comes
            for younger, other in self.requests.items():  # it may have waited for its slot, or for the cache
                if int(younger) > int(name) and other.started and not expected.started:
                    self.abort(int(younger))
            for _ in range(steps):
                if expected.ending is None:
                    self.catch_up()
                    self.a_step([1, 2, 3, 4], failures=0)
            if expected.ending is None:
                assert len(expected.sent) >= PATIENCE, f"request {name} starves"
                self.abort(int(name))
        assert all(expected.finished for expected in self.requests.values())
        self.catch_up()
        assert not self.scheduler.has_work
        assert self.scheduler.schedule(self.wall) is None
        assert self.scheduler.status(0, {}).kv_pages_used == 0

    # --- the prompt cache -------------------------------------------------------------------------

    @rule(
        lookups=st.integers(0, 3), loads=st.integers(0, 3), saves=st.integers(0, 3), parks=st.integers(0, 3),
        fails=st.booleans(),
    )  # fmt: skip
    def the_cache_gets_on(self, lookups: int, loads: int, saves: int, parks: int, fails: bool) -> None:
        self.collect()
        for _ in range(min(parks, len(self.parked))):
            park = self.parked.pop(0)
            held = [i for page in park.pages.values() for i in self.cache.page(page).tolist()]
            if len(park.pages) == len(park.conversation.all_keys):  # nobody wrote there meanwhile
                computed = park.conversation.computed
                assert held[:computed] == park.conversation.tokens[:computed].tolist()
            self.scheduler.ledger.end_read(park.pages.values())
        for _ in range(min(lookups, len(self.lookups))):
            sequence, keys = self.lookups.pop(0)
            had = next((i for i, key in enumerate(keys) if key not in self.stored), len(keys))
            self.scheduler.ledger.looked_up(sequence, had)
        for _ in range(min(loads, len(self.loads))):
            self.load(self.loads.pop(0), fails)
        for _ in range(min(saves, len(self.unsaved))):
            key = self.unsaved.pop(0)
            if (page := self.scheduler.ledger.begin_read(key)) is not None:
                if not fails:
                    self.stored[key] = self.cache.page(page).copy()
                self.scheduler.ledger.end_read([page])
                self.scheduler.ledger.saved(key)
        self.take_events()

    @precondition(lambda self: self.stored)
    @rule(number=st.integers(0, 100))
    def the_cache_forgets(self, number: int) -> None:
        del self.stored[list(self.stored)[number % len(self.stored)]]

    def collect(self) -> None:
        self.lookups += self.scheduler.ledger.drain_lookups()
        self.loads += self.scheduler.ledger.drain_loads()
        for keys, chain in self.scheduler.ledger.drain_published():
            assert not keys or chain[-len(keys) :] == keys
            self.unsaved += [key for key in keys if key not in self.unsaved]
        self.parked += self.scheduler.ledger.drain_parked()

    def load(self, load: Load, fails: bool) -> None:
        done = 0
        for key, page in zip(load.keys, load.pages, strict=True):
            if key not in self.stored or fails:
                break
            self.cache.page(page)[:] = self.stored[key]
            done += 1
        tail, read = load.tail, False
        if tail is not None and tail.source is not None:
            self.cache.copy(tail.source, tail.page)
            read = True
        elif tail is not None and tail.key in self.stored and not fails:
            self.cache.page(tail.page)[:] = self.stored[tail.key]
            read = True
        self.scheduler.loaded(load, done, tail=read)

    def catch_up(self) -> None:
        """Everything that the cache was asked for is done."""
        self.collect()
        self.unsaved += [key for key in self.scheduler.ledger.unsaved_keys() if key not in self.unsaved]
        self.the_cache_gets_on(len(self.lookups), len(self.loads), len(self.unsaved), len(self.parked), fails=False)

    # --- what must be true then -------------------------------------------------------------------

    def schedule(self) -> Batch | None:
        for expected in self.requests.values():
            deadline = expected.request.deadline
            if expected.ending is None and deadline is not None and deadline <= self.wall:
                expected.ending = "deadline"
        batch = self.scheduler.schedule(self.wall)
        self.take_events()
        live = [e for e in self.requests.values() if e.ending is None]
        for _ in range(4):  # a lookup, a load, and pages that come free: each may have to be waited for
            if batch is None and live:
                self.catch_up()
                batch = self.scheduler.schedule(self.wall)
        self.take_events()
        assert (batch is not None) == bool(live), "a step without work, or work without a step"
        if batch is not None:
            self.check_rows(batch)
            self.check_pages(batch)
            if not self.scheduler.config.caches and not self.scheduler.config.few_rows:
                oldest = next(e for e in live if e.started).request.request_id
                loading = {slot.request_id for slot in self.scheduler.status(0, {}).slots if slot.state == "loading"}
                assert oldest in loading | {part.sequence.request.request_id for part in batch.parts}
        return batch

    def choose(self, batch: Batch, tokens: list[int]) -> list[SampledToken]:
        """A token for each that is wanted."""
        wanted = [self.requests[p.sequence.request.request_id] for p in batch.parts if p.logit_row is not None]
        pairs = zip(wanted, tokens, strict=False)
        return [SampledToken(expected.untold.pop(0) if expected.untold else token) for expected, token in pairs]

    def check_rows(self, batch: Batch) -> None:
        decoding, prefill_rows, row, logit_row = True, 0, 0, 0
        for part in batch.parts:
            expected = self.requests[part.sequence.request.request_id]
            history, end = expected.history, part.start + part.rows
            is_decode = bool(expected.sent) and part.start == len(history) - 1
            if few := self.scheduler.config.few_rows:
                is_read = end <= part.sequence.read
                assert len(batch.parts) == 1 if is_read else len(batch.token_ids) <= few
            else:
                assert decoding or not is_decode, "a decode row after prefill rows"
            decoding = is_decode
            prefill_rows += 0 if is_decode else part.rows
            here = slice(row, row + part.rows)
            assert batch.positions[here].tolist() == list(range(part.start, end))
            assert batch.token_ids[here].tolist() == history[part.start : end]
            assert set(batch.slots[here].tolist()) == {part.sequence.slot}
            row += part.rows
            assert (part.logit_row is not None) == (end == len(history)), "logits only after the last token"
            if part.logit_row is not None:
                assert part.logit_row == logit_row
                assert batch.logit_rows[logit_row] == row - 1
                logit_row += 1
        assert (row, logit_row) == (len(batch.token_ids), len(batch.logit_rows))
        assert prefill_rows <= self.scheduler.config.chunk_tokens
        assert len({part.sequence.slot for part in batch.parts}) == len(batch.parts)

    def check_pages(self, batch: Batch) -> None:
        """No page that is written is anybody else's."""
        read = Counter[int]()
        for part in batch.parts:
            pages = batch.page_tables[part.sequence.slot, : pages_for(part.start + part.rows)].tolist()
            assert len(set(pages)) == len(pages)
            read.update(pages)
        assert read.keys() <= set(range(self.scheduler.config.n_pages))
        for part in batch.parts:
            written = slice(part.start // PAGE_TOKENS, pages_for(part.start + part.rows))
            assert all(read[page] == 1 for page in batch.page_tables[part.sequence.slot, written].tolist())

    def check_attention(self, batch: Batch) -> None:
        row = -1
        for part in batch.parts:
            row += part.rows
            history = self.requests[part.sequence.request.request_id].history
            assert self.cache.read(batch, row) == history[: part.start + part.rows]

    def finish_step(self, batch: Batch, sampled: list[SampledToken | NumoeError]) -> None:
        for part in batch.parts:
            expected = self.requests[part.sequence.request.request_id]
            if part.logit_row is not None and expected.ending is None:
                token, asked = sampled[part.logit_row], expected.request
                if isinstance(token, NumoeError):
                    expected.ending = "error"
                elif token.token_id in asked.stop_ids:
                    expected.ending = "stop"
                elif len(expected.sent) + 1 == asked.max_tokens or len(expected.history) + 1 == CONTEXT:
                    expected.ending = "length"
        self.scheduler.postprocess(batch, sampled)
        before = {name: list(expected.sent) for name, expected in self.requests.items()}
        self.take_events()
        for part in batch.parts:
            expected = self.requests[part.sequence.request.request_id]
            token = None if part.logit_row is None else sampled[part.logit_row]
            new = [token.token_id] if isinstance(token, SampledToken) and expected.ending in (None, "length") else []
            assert expected.sent == before[expected.request.request_id] + new

    def take_events(self) -> None:
        for event in self.scheduler.drain_events():
            expected = self.requests[event.request_id]
            prompt = len(expected.request.token_ids)
            assert not expected.finished, "an event after the last"
            assert expected.started != isinstance(event, Started) or isinstance(event, Finished)
            match event:
                case Started():
                    assert event.prompt_tokens == prompt
                    assert event.cached_tokens < prompt + expected.goes_on
                    assert not (expected.request.bypass_cache and event.cached_tokens and not expected.goes_on)
                    expected.started = True
                case PrefillProgress():
                    assert not expected.sent
                    assert 0 < event.done_tokens <= event.prompt_tokens == prompt
                    expected.prefilled = event.done_tokens
                case TokenGenerated():
                    assert expected.prefilled == prompt
                    expected.sent.append(event.token_id)
                case Finished():
                    expected.finished = True
                    assert event.reason == expected.ending
                    assert event.completion_tokens == len(expected.sent)
                    assert bool(event.error) == (event.reason == "error")
                    times = event.timings
                    assert min(times.queued_ms, times.prefill_ms, times.decode_ms) >= 0

    @invariant()
    def the_scheduler_is_sound(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        self.scheduler.check_integrity()
        live = {name for name, expected in self.requests.items() if expected.ending is None}
        status = self.scheduler.status(0, {})
        assert {slot.request_id for slot in status.slots if slot.state != "idle"} <= live
        assert status.queued + sum(slot.state != "idle" for slot in status.slots) == len(live)
        assert self.scheduler.has_work == bool(live)


AnyTraffic.TestCase.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
TestAnyTraffic = AnyTraffic.TestCase


def test_nobody_waits_behind_younger_ones() -> None:
    """Who gave way first is older than those who gave way after him, and is the first to join again."""
    state = AnyTraffic()
    state.start(slots=4, n_pages=3, chunk_tokens=1000, caches=True)
    state.submit(250, max_tokens=1, stops=False, lifetime=None)
    state.a_crowd_that_needs_more_pages_soon([252, 252, 252, 256])
    state.a_step([0, 0, 0, 0], failures=0)
    state.a_step_with_a_sampling_error([0, 0, 0, 0], broken=0)
    state.submit(662, max_tokens=6, stops=False, lifetime=None)
    state.a_crowd_that_needs_more_pages_soon([252, 252])
    state.a_step_with_a_sampling_error([0, 0, 0, 0], broken=0)
    state.teardown()


def test_nobody_younger_takes_the_slot_that_somebody_gave_up_for_others_pages() -> None:
    state = AnyTraffic()
    state.start(slots=2, n_pages=3, chunk_tokens=1000, caches=True)
    state.submit(1, max_tokens=1000, stops=False, lifetime=None)
    state.a_step([0, 0, 0, 0], failures=0)
    state.submit(1, max_tokens=1, stops=False, lifetime=None)
    state.a_crowd_that_needs_more_pages_soon([252, 252])
    for number in (2, 3, 0):
        state.abort(number)
    state.a_step([0, 0, 0, 0], failures=0)
    state.a_crowd_that_needs_more_pages_soon([252, 252])
    state.a_crowd_that_needs_more_pages_soon([252, 252, 252])
    for number in (24, 58):
        state.abort(number)
    state.submit(253, max_tokens=1000, stops=False, lifetime=None, slot=1)
    state.a_crowd_that_needs_more_pages_soon([252, 252])
    state.teardown()


def test_nobody_joins_with_the_page_that_an_older_request_needs() -> None:
    """He would have to give way before the page is his, and join again, forever."""
    state = AnyTraffic()
    state.start(slots=2, n_pages=3, chunk_tokens=40, caches=True)
    for length, family in ((1, 1), (1, None), (506, None), (2, 1)):
        state.submit(length, max_tokens=1000, stops=False, lifetime=None, family=family, common=1)
    state.teardown()
