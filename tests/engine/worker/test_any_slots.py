"""Whatever is done to slots, in whatever order: every answer is the one that the same tokens get undisturbed.

A real engine over a tiny model with few pages, a real store, and restarts. NUMOE_SLOTS_EXAMPLES says
how many stories are tried, 10 if it is not set.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from numoe.engine.errors import DataLossError, NotFoundError, PreconditionError
from numoe.engine.scheduler.conversation import Conversation
from numoe.engine.store import open_store
from tests.engine.worker.served import CONTEXT, Served, Slow, served
from tests.models import make_model

SLOTS = 3
ANSWER = 4
LENGTHS = st.sampled_from([1, 40, 255, 256, 257, 300, 515, 700])
SLOT = st.integers(0, SLOTS - 1)
NAME = st.sampled_from(["a", "b"])
SALT = st.sampled_from([b"", b"", b"", b"mine"])
_oracle: Served | None = None
_model: Path | None = None
_answers: dict[tuple[int, ...], list[int]] = {}


@pytest.fixture(scope="module", autouse=True)
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """An engine that remembers nothing."""
    global _oracle, _model
    _model = make_model(tmp_path_factory.mktemp("model") / "m.gguf", "qwen3moe")
    with served(_model, None, ram=0) as _oracle:
        yield


def expected(text: Sequence[int]) -> list[int]:
    """What follows the tokens if nothing else ever happened."""
    assert _oracle is not None
    if (key := tuple(text)) not in _answers:
        _answers[key] = _oracle.ask(key, ANSWER, bypass_cache=True)[1]
    return _answers[key]


def prompt(number: int, length: int) -> list[int]:
    return [(number + (7 + number) * i + i // 11) % 250 for i in range(length)]


class AnySlots(RuleBasedStateMachine):
    """Requests with and without slots, saves, restores, forks, erases, evictions, damage and restarts."""

    @initialize(ram=st.sampled_from([0, 1 << 20, 1 << 30]), n_pages=st.integers(6, 12), slow=st.sampled_from([0, 0.04]))
    def start(self, ram: int, n_pages: int, slow: float) -> None:
        self.folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self.store = Slow(open_store(Path(self.folder.name, "store")), slow)
        self.ram, self.n_pages = ram, n_pages
        self.saved: dict[str, list[int]] = {}
        self.lossy = False  # whether something was damaged
        self.stack = ExitStack()
        self.serve(shards=1, resume=False, save=False)

    def serve(self, *, shards: int, resume: bool, save: bool) -> None:
        assert _model is not None
        self.server = self.stack.enter_context(
            served(
                _model, self.store, slots=SLOTS, n_pages=self.n_pages, ram=self.ram, shards=shards, resume=resume,
                save=save,
            )
        )  # fmt: skip
        self.saves = save
        self.reserve = 4 * self.server.engine._caching.pages.shape(256).object_bytes

    def teardown(self) -> None:
        if hasattr(self, "stack"):
            self.stack.close()
            self.folder.cleanup()

    def held(self, slot: int) -> Conversation | None:
        return self.server.engine._scheduler.slots.conversations[slot]

    # --- requests ---------------------------------------------------------------------------------

    @rule(number=st.integers(0, 2), length=LENGTHS, slot=st.none() | SLOT, salt=SALT, bypass=st.sampled_from([0, 0, 1]))
    def ask(self, number: int, length: int, slot: int | None, salt: bytes, bypass: int) -> None:
        text = prompt(number, length)
        cached, answer = self.server.ask(text, ANSWER, slot=slot, cache_salt=salt, bypass_cache=bool(bypass))
        assert answer == expected(text)
        assert cached <= (0 if bypass else len(text) - 1)

    @rule(slot=SLOT, more=st.sampled_from([0, 1, 3, 250]), named=st.booleans())
    def go_on(self, slot: int, more: int, named: bool) -> None:
        """With a slot's conversation: nothing of it is computed again."""
        held = self.held(slot)
        if held is None or len(held.tokens) + more + ANSWER > CONTEXT:
            return
        text = [*held.tokens.tolist(), *prompt(9, more)]
        cached, answer = self.server.ask(text, ANSWER, slot=slot if named else None, cache_salt=held.salt)
        assert answer == expected(text)
        assert self.lossy or cached >= min(held.computed, len(text) - 1)

    @rule(slot=SLOT, at=st.integers(1, 600), number=st.integers(0, 2))
    def go_another_way(self, slot: int, at: int, number: int) -> None:
        """From the middle of a slot's conversation."""
        if (held := self.held(slot)) is not None:
            text = [*held.tokens[:at].tolist(), *prompt(number + 20, 5)]
            assert self.server.ask(text, ANSWER, slot=slot, cache_salt=held.salt)[1] == expected(text)

    @rule(requests=st.lists(st.tuples(st.integers(0, 2), LENGTHS, st.none() | SLOT), min_size=2, max_size=5))
    def a_crowd(self, requests: list[tuple[int, int, int | None]]) -> None:
        running = []
        for number, length, slot in requests:
            text, deadline = prompt(number, length), None if slot is None else 1e12
            running.append((text, self.server.submit(text, ANSWER, slot=slot, slot_deadline=deadline)))
        for text, name in running:
            _, answer, finished = self.server.end(name)
            assert (answer, finished.reason) == (expected(text), "length")

    @rule(start=st.integers(0, 200))
    def others_take_the_pages(self, start: int) -> None:
        self.server.ask([(start + i) % 251 for i in range(1300)], 1, cache_salt=b"others")

    # --- operations -------------------------------------------------------------------------------

    @rule(slot=SLOT, name=NAME)
    def save(self, slot: int, name: str) -> None:
        held = self.held(slot)
        if held is None:
            with pytest.raises(PreconditionError, match="is empty"):
                self.server.engine.slots.save("s", slot, name, None)
            return
        report = self.server.engine.slots.save("s", slot, name, None)
        assert report.tokens == len(held.tokens)
        assert self.lossy or report.computed == held.computed
        self.saved[name] = held.tokens.tolist()

    @rule(slot=SLOT, name=NAME)
    def restore(self, slot: int, name: str) -> None:
        before = self.held(slot)
        try:
            report = self.server.engine.slots.restore("r", slot, name, None)
        except NotFoundError:
            assert name not in self.saved
        except DataLossError:
            assert self.lossy
        else:
            assert report.tokens == len(self.saved[name])
            held = self.held(slot)
            assert held is not None
            assert held.tokens.tolist() == self.saved[name]
            return
        assert self.held(slot) is before

    @rule(slot=SLOT, other=SLOT)
    def fork(self, slot: int, other: int) -> None:
        held = self.held(slot)
        if held is None or slot == other:
            with pytest.raises(PreconditionError):
                self.server.engine.slots.fork("f", slot, other, None)
            return
        self.server.engine.slots.fork("f", slot, other, None)
        copy = self.held(other)
        assert copy is not None
        assert copy.tokens.tolist() == held.tokens.tolist()

    @rule(slot=SLOT)
    def erase(self, slot: int) -> None:
        self.server.engine.slots.erase("e", slot, None)
        assert self.held(slot) is None

    @precondition(lambda self: self.saved)
    @rule(name=NAME)
    def remove(self, name: str) -> None:
        if self.saved.pop(name, None) is not None:
            self.server.engine.slots.remove(name)
        else:
            with pytest.raises(NotFoundError):
                self.server.engine.slots.remove(name)

    # --- the world --------------------------------------------------------------------------------

    @rule(shards=st.sampled_from([1, 2]), resume=st.booleans(), save=st.booleans())
    def restart(self, shards: int, resume: bool, save: bool) -> None:
        held, kept = [self.held(slot) for slot in range(SLOTS)], self.saves
        self.stack.close()
        self.serve(shards=shards, resume=resume, save=save)
        if kept and resume:
            offered = {tuple(c.tokens) for slot in range(SLOTS) if (c := self.held(slot)) is not None}
            assert len(offered) >= len({tuple(c.tokens) for c in held if c is not None})

    @rule(number=st.integers(0, 100), place=st.integers(0, 1 << 20))
    def damage(self, number: int, place: int) -> None:
        if entries := self.store.list("chunks"):
            path = Path(self.store.url, entries[number % len(entries)].key)
            data = bytearray(path.read_bytes())
            data[place % len(data)] ^= 1
            path.write_bytes(data)
            self.lossy = True

    @invariant()
    def all_is_sound(self) -> None:
        if hasattr(self, "server"):
            with self.server.engine._changed:
                self.server.engine._scheduler.check_integrity()
            status = self.server.engine.status().cache
            assert status.ram_bytes <= max(self.ram, self.reserve)
            assert not status.store_error


AnySlots.TestCase.settings = settings(
    max_examples=int(os.environ.get("NUMOE_SLOTS_EXAMPLES", "10")), stateful_step_count=20, deadline=None,
    suppress_health_check=list(HealthCheck), print_blob=True,
)  # fmt: skip
TestAnySlots = AnySlots.TestCase
