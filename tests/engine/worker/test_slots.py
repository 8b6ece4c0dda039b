"""Conversations survive: in pages, in host memory, in the store, in another process, whatever fails."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from numoe.engine.cache import Snapshots
from numoe.engine.errors import DataLossError, NotFoundError, PreconditionError, ResourceError, UnavailableError
from numoe.engine.kv.pages import PAGE_TOKENS
from numoe.engine.store import Entry, Store, open_store
from numoe.engine.worker import caching, idle
from numoe.engine.worker.kv_pool import KvType
from tests.engine.worker.served import Slow, served
from tests.models import make_model

PROMPT = [(7 * i + i // 11) % 250 for i in range(2 * PAGE_TOKENS + 60)]
OTHER = [(5 * i + 3) % 250 for i in range(2 * PAGE_TOKENS + 10)]

FULL_CHUNK = 262384
"""Bytes of the object of a full chunk of this model."""


class Late:
    """A store that does not list conversations until `answers` is set, and then at first says that it is away."""

    def __init__(self, store: Store) -> None:
        self.answers, self._store, self._times = threading.Event(), store, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def list(self, folder: str) -> Sequence[Entry]:
        if folder.startswith("resumable"):
            assert self.answers.wait(30)
            self._times += 1
            if self._times == 1:
                raise UnavailableError("away")
        return self._store.list(folder)


class Counting:
    """A store that counts the manifests written to it."""

    def __init__(self, store: Store) -> None:
        self._store, self.manifests = store, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def put_if(self, key: str, data: bytes, version: str | None) -> str:
        self.manifests += 1
        return self._store.put_if(key, data, version)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "m.gguf", "qwen3moe")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(tmp_path / "store")


@pytest.mark.parametrize("kv_type", [KvType("f16", "f16"), KvType("q8_0", "q8_0")], ids=["f16", "q8_0"])
def test_a_restored_slot_goes_on_as_if_nothing_had_happened(model: Path, store: Store, kv_type: KvType) -> None:
    with served(model, store, kv_type=kv_type) as server:
        _, answer = server.ask(PROMPT, slot=1)
        text = PROMPT + answer
        expected = server.ask([*text, 5, 6, 7], slot=0)[1]
        report = server.engine.slots.save("save", 1, "chat", None)
        assert (report.tokens, report.computed, report.chunks) == (len(text), len(text) - 1, 3)
        assert server.progress("save")[-1].done_chunks == 3
    with served(model, store, kv_type=kv_type, shards=2) as server:
        report = server.engine.slots.restore("restore", 0, "chat", None)
        assert report.computed == len(text) - 1
        assert report.moved_chunks == report.chunks == 3
        assert server.engine.status().slots[0].cached == len(text) - 1
        cached, again = server.ask(PROMPT, slot=0)
        assert (cached, again) == (len(PROMPT) - 1, answer)
        cached, more = server.ask([*text, 5, 6, 7], slot=0)
        assert (cached, more) == (len(text) - 1, expected)


def test_a_second_save_moves_only_what_is_new(model: Path, store: Store) -> None:
    with served(model, store) as server:
        _, answer = server.ask(PROMPT, slot=0)
        server.engine.slots.save("a", 0, "chat", None)
        server.ask([*PROMPT, *answer, *range(100)], slot=0)
        report = server.engine.slots.save("b", 0, "chat", None)
        assert report.moved_chunks <= 2
        assert report.chunks == 3
        assert server.engine.slots.save("c", 0, "chat", None).moved_bytes == 0


def test_a_prefix_comes_from_memory_and_from_the_store(model: Path, store: Store) -> None:
    with served(model, store) as server:
        answer = server.ask(PROMPT)[1]
        server.settle()
        for start in range(2):  # others take all pages
            server.ask([(start + i) % 250 for i in range(1300)], max_tokens=1)
        cached, again = server.ask(PROMPT)
        assert (cached, again) == (len(PROMPT) - 1, answer)
        assert server.engine.status().cache.hits_ram >= 2
    with served(model, store, ram=0) as server:
        cached, again = server.ask(PROMPT)
        assert (cached, again) == (2 * PAGE_TOKENS, answer)
        assert server.engine.status().cache.hits_store == 2
        assert server.ask(PROMPT, bypass_cache=True) == (0, answer)
        assert server.ask(PROMPT, cache_salt=b"mine") == (0, answer)


def test_host_memory_alone_finds_a_prefix_again(model: Path) -> None:
    with served(model, None, ram=10 * FULL_CHUNK, n_pages=6, slots=1) as server:
        assert server.engine._caching.pages.shape(PAGE_TOKENS).object_bytes == FULL_CHUNK
        for start in range(2):  # fill host memory, and have to leave it again
            server.ask([(start + i) % 250 for i in range(1300)], max_tokens=1)
        answer = server.ask(PROMPT)[1]
        server.ask([(2 + i) % 250 for i in range(1300)], max_tokens=1)  # needs all pages
        assert server.ask(PROMPT) == (len(PROMPT) - 1, answer)
        assert server.engine.status().cache.hits_ram == 3


@pytest.mark.parametrize("ram", [0, FULL_CHUNK // 2])
def test_what_host_memory_cannot_hold_is_stored_all_the_same(model: Path, store: Store, ram: int) -> None:
    with served(model, store, ram=ram) as server:
        server.ask(PROMPT)
        server.settle()
        assert len(store.list("chunks")) == 2
        assert server.engine.status().cache.ram_bytes <= ram


def test_equal_chunks_are_stored_once(model: Path, store: Store) -> None:
    for _ in range(2):
        with served(model, store) as server:
            server.ask(PROMPT)
            server.ask([*PROMPT[:PAGE_TOKENS], *OTHER])
            server.settle()
    chunks = store.list("chunks")
    assert len(chunks) == 2 + 2


def test_a_conversation_that_lost_its_slot_comes_back_whole(model: Path, store: Store) -> None:
    with served(model, store, slots=1, n_pages=7, ram=1 << 20) as server:
        answer = server.ask(PROMPT)[1]
        for start in range(3):
            server.ask([(start + i) % 250 for i in range(1300)], max_tokens=1)
        text = [*PROMPT, *answer]
        assert server.ask([*text, 9])[0] == len(text) - 1


def test_what_was_idle_at_the_stop_is_offered_at_the_start(model: Path, store: Store) -> None:
    with served(model, store, save=True) as server:
        answer = server.ask(PROMPT)[1]
        server.ask(OTHER)
    with served(model, store, resume=True) as server:
        slots = server.engine.status().slots
        assert sorted(slot.tokens for slot in slots) == sorted([len(PROMPT) + 8, len(OTHER) + 8])
        text = [*PROMPT, *answer]
        assert server.ask([*text, 9])[0] == len(text) - 1


def test_slots_keep_their_numbers_and_names(model: Path, store: Store) -> None:
    with served(model, store, slots=4, save=True) as server:
        server.ask(OTHER)
        server.ask(PROMPT, slot=2)
        server.engine.slots.save("s", 2, "chat", None)
        server.engine.slots.fork("f", 2, 3, None)
        held = [c and (c.tokens.tolist(), c.named, c.snapshot) for c in server.engine._scheduler.slots.conversations]
    for slots in (4, 4, 3):
        with served(model, store, slots=slots, resume=True, save=True) as server:
            conversations = server.engine._scheduler.slots.conversations
            found = [c and (c.tokens.tolist(), c.named, c.snapshot) for c in conversations]
            # Where there are fewer slots now, what had none of these takes an empty one.
            assert found == (held if slots == 4 else [held[0], held[3], held[2]])


def test_a_store_that_answers_late_holds_up_no_start(
    model: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it has is offered when it does, but for what has gone on meanwhile."""
    with served(model, store, slots=3, save=True) as server:
        text = [*PROMPT, *server.ask(PROMPT, slot=1)[1]]
        server.ask(OTHER, slot=2)
    monkeypatch.setattr(caching, "RESUMES_WITHIN_S", 0.0)
    late = Late(store)
    with served(model, late, slots=3, resume=True, save=True) as server:  # type: ignore[arg-type]
        told = [*text, 9, *server.ask([*text, 9])[1]]
        assert [slot.tokens for slot in server.engine.status().slots] == [len(told), 0, 0]
        late.answers.set()
        until = time.monotonic() + 30
        while not server.engine.status().slots[2].tokens:
            assert time.monotonic() < until
            time.sleep(0.01)
        assert [slot.tokens for slot in server.engine.status().slots] == [len(told), 0, len(OTHER) + 8]
        monkeypatch.undo()
    with served(model, store, slots=3, resume=True) as server:
        assert [slot.tokens for slot in server.engine.status().slots] == [len(told), 0, len(OTHER) + 8]


def test_who_comes_back_is_parked_once(model: Path, store: Store) -> None:
    """Not as it was before, too: that would be offered as well."""
    with served(model, store, slots=1) as server:

        def parked() -> list[int]:
            """The lengths of the conversations that would come back after a restart."""
            kept = server.engine._caching
            assert kept._parking is not None
            assert kept.snapshots is not None
            kept._parking.flush(time.monotonic() + 30)
            return sorted(len(one.conversation.tokens) for one in kept.snapshots.resumable())

        text = [*PROMPT, *server.ask(PROMPT)[1]]
        other = [*OTHER, *server.ask(OTHER)[1]]  # parks it
        told = [*text, 9, *server.ask([*text, 9])[1]]
        server.engine.slots.save("s", 0, "chat", None)
        server.ask(OTHER)  # the same comes back, and parks what went on
        assert parked() == [len(other), len(told)]
        server.engine.slots.restore("r", 0, "chat", None)
        server.engine.slots.erase("e", 0, None)
        assert parked() == [len(other)]


def test_an_idle_conversation_is_written_once(model: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """While its slot keeps it, under one name, whatever becomes of it; and not where it shall not be resumed."""
    monkeypatch.setattr(idle, "IDLE_S", 0.05)
    monkeypatch.setattr(caching, "LOOKS_S", 0.01)
    counted = Counting(store)
    with served(model, counted, resume=True) as server:  # type: ignore[arg-type]
        snapshots = server.engine._caching.snapshots
        assert snapshots is not None

        def written(*texts: list[int]) -> None:
            """Wait until these would come back, and nothing else; then see that they stay written."""
            wanted, until = sorted((len(text), len(text) - 1) for text in texts), time.monotonic() + 30
            while (found := sorted(_sizes(snapshots))) != wanted:
                assert time.monotonic() < until, (found, wanted)
                time.sleep(0.01)
            before = counted.manifests
            time.sleep(0.3)
            assert (counted.manifests, sorted(_sizes(snapshots))) == (before, wanted)

        text = [*PROMPT, *server.ask(PROMPT, slot=0)[1]]
        written(text)
        text = [*text, 9, *server.ask([*text, 9], slot=0)[1]]
        written(text)
        server.engine.slots.fork("f", 0, 1, None)
        written(text, text)
        assert (counted.manifests, len(store.list("resumable"))) == (3, 2)
        server.engine.slots.erase("e", 1, None)
        written(text)
        before = server.engine._scheduler.slots.conversations[0]
        assert before is not None
        assert len(before.stored) == 1, "what it went on from is not there any more"
        server.ask(OTHER, slot=0)  # parks it
        written(text, [*OTHER, *range(8)])
    counted.manifests = 0
    with served(model, counted, resume=True) as server:  # type: ignore[arg-type]
        time.sleep(0.3)
        assert counted.manifests == 1, "of the two, the one that had no slot has one now"
        assert server.ask([*text, 9])[0] == len(text) - 1
    counted.manifests = 0
    with served(model, counted) as server:  # type: ignore[arg-type]
        server.ask(PROMPT[::-1], slot=0)
        time.sleep(0.3)
        assert counted.manifests == 0


def _sizes(snapshots: Snapshots) -> list[tuple[int, int]]:
    """Of what would come back: the tokens, and those with keys and values."""
    return [(len(one.conversation.tokens), one.conversation.computed) for one in snapshots.resumable()]


def test_a_failed_restore_leaves_the_slot_as_it_was(model: Path, store: Store) -> None:
    with served(model, store) as server:
        server.ask(OTHER, slot=1)
        server.engine.slots.save("a", 1, "chat", None)
    damaged = store.list("chunks")[1].key
    path = Path(store.url) / damaged
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with served(model, store, ram=0) as server:
        answer = server.ask(PROMPT, slot=0)[1]
        before = server.engine.status().slots[0]
        for name, error in (("chat", DataLossError), ("nothing", NotFoundError)):
            with pytest.raises(error, match=damaged.rsplit("/", 1)[-1] if name == "chat" else name):
                server.engine.slots.restore("r", 0, name, None)
            after = server.engine.status().slots[0]
            assert (after.tokens, after.computed, after.state) == (before.tokens, before.computed, "idle")
        assert server.ask(PROMPT, slot=0) == (len(PROMPT) - 1, answer)
        cached, _ = server.ask(OTHER, slot=1)  # the cache computes the damaged chunk again
        assert cached < len(OTHER) - 1
        server.settle()
        assert server.engine.slots.restore("r", 1, "chat", None).computed == len(OTHER) + 7


def test_a_snapshot_of_another_kind_is_refused_by_name(model: Path, store: Store, tmp_path: Path) -> None:
    with served(model, store) as server:
        server.ask(OTHER, slot=1)
        server.engine.slots.save("a", 1, "chat", None)
    with served(model, store, kv_type=KvType("q8_0", "q8_0")) as server:
        with pytest.raises(PreconditionError, match="KV cache type is f16/f16 there and q8_0/q8_0 here"):
            server.engine.slots.restore("r", 0, "chat", None)
        assert "KV cache type" in server.engine.slots.snapshots()[0].mismatch
    other = make_model(tmp_path / "other.gguf", "qwen3moe", experts_type="Q8_0")
    with served(other, store) as server, pytest.raises(PreconditionError, match="tensor types"):
        server.engine.slots.restore("r", 0, "chat", None)


def test_a_busy_slot_is_refused_or_waited_for(model: Path, store: Store) -> None:
    with served(model, store) as server:
        name = server.submit(PROMPT, max_tokens=600, slot=0)
        server.started(name)
        with pytest.raises(PreconditionError, match="slot 0 is in use"):
            server.engine.slots.save("s", 0, "chat", None)
        with pytest.raises(PreconditionError, match="slot 0 is in use"):
            server.submit(OTHER, slot=0)
        late = server.submit(OTHER, slot=0, slot_deadline=time.time() + 0.01)
        assert server.end(late)[2].reason == "slot_busy"
        patient = server.submit(OTHER, slot=0, slot_deadline=time.time() + 100)
        report = server.engine.slots.save("s", 0, "chat", time.time() + 100)
        assert server.end(name)[2].reason == "length"
        assert report.tokens in (len(PROMPT) + 600, len(OTHER) + 8)
        assert server.end(patient)[2].reason == "length"


def test_fork_and_erase(model: Path, store: Store) -> None:
    with served(model, store) as server:
        answer = server.ask(PROMPT, slot=0)[1]
        server.engine.slots.fork("f", 0, 1, None)
        text = [*PROMPT, *answer]
        assert server.ask([*text, 1], slot=1)[0] == len(text) - 1
        assert server.ask([*text, 2], slot=0)[0] >= len(text) - 1
        server.engine.slots.erase("e", 0, None)
        assert server.engine.status().slots[0].tokens == 0
        with pytest.raises(PreconditionError, match="slot 0 is empty"):
            server.engine.slots.save("s", 0, "chat", None)


def test_a_snapshot_that_does_not_fit_into_the_pages_is_refused(model: Path, store: Store) -> None:
    with served(model, store) as server:
        server.ask([i % 250 for i in range(1300)], slot=0)
        server.engine.slots.save("a", 0, "chat", None)
    with served(model, store, n_pages=6, slots=2) as server:
        name = server.submit([(3 * i) % 250 for i in range(100)], max_tokens=500, slot=1)
        server.started(name)
        with pytest.raises(ResourceError):
            server.engine.slots.restore("r", 0, "chat", None)
        assert server.end(name)[2].reason == "length"


def test_the_middle_makes_room_when_the_beginning_is_to_be_kept(model: Path, store: Store) -> None:
    with served(model, store, context=600, keep=-1, n_pages=6) as server:
        _, answer = server.ask(PROMPT[:500], max_tokens=400)
        assert len(answer) == 400
    with served(model, store, context=600, n_pages=6) as server:
        assert server.ask(PROMPT[:500], max_tokens=400)[1] == answer[:100]


def test_a_prompt_cache_in_a_file(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "file"
    with served(model, None, ram=0) as server:
        assert server.engine.slots.load_file(path) is None
        answer = server.ask(PROMPT, slot=0)[1]
        server.engine.slots.save_file(path, all_tokens=False)
        server.engine.slots.save_file(tmp_path / "all", all_tokens=True)
    with served(model, None, ram=0) as server:
        report = server.engine.slots.load_file(path)
        assert report is not None
        assert report.tokens == len(PROMPT)
        assert server.ask(PROMPT, slot=0) == (len(PROMPT) - 1, answer)
        report = server.engine.slots.load_file(tmp_path / "all", slot=1)
        assert report is not None
        assert report.tokens == len(PROMPT) + len(answer)
        path.write_bytes(path.read_bytes()[:-10])
        with pytest.raises(DataLossError, match="in the middle"):
            server.engine.slots.load_file(path)


def test_a_prompt_cache_file_is_not_replaced_by_less(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "file"
    with served(model, None, ram=0, n_pages=7) as server:
        text = [*PROMPT, *server.ask(PROMPT, slot=0)[1]]
        server.engine.slots.save_file(path, all_tokens=True)
        whole = path.read_bytes()
        server.ask([i % 250 for i in range(1300)], max_tokens=1, slot=1)  # only the beginning of it is there now
        left = server.engine.status().slots[0].cached
        assert left < len(text) - 1
        server.engine.slots.save_file(path, all_tokens=True)
        assert path.read_bytes() == whole
        server.engine.slots.save_file(tmp_path / "other", all_tokens=True)
        report = server.engine.slots.load_file(tmp_path / "other", slot=1)
        assert report is not None
        assert (report.tokens, report.computed) == (len(text), left)
        assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "other"]
        server.ask([*text, 9], slot=0)  # goes on, and is there again
        server.engine.slots.save_file(path, all_tokens=True)
        report = server.engine.slots.load_file(path, slot=1)
        assert report is not None
        assert report.tokens > len(text)
        server.ask(OTHER, slot=0)  # another conversation is not less of this one
        server.engine.slots.save_file(path, all_tokens=True)
        report = server.engine.slots.load_file(path, slot=1)
        assert report is not None
        assert report.tokens == len(OTHER) + 8


class Stuck:
    """A store that writes nothing until `goes_on` is set."""

    def __init__(self, store: Store) -> None:
        self.goes_on, self._store = threading.Event(), store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def put_new(self, key: str, data: bytes) -> bool:
        assert self.goes_on.wait(30)
        return self._store.put_new(key, data)


def test_nobody_waits_for_the_store_where_host_memory_has_room(model: Path, store: Store) -> None:
    stuck = Stuck(store)
    with served(model, stuck, slots=1, n_pages=6) as server:  # type: ignore[arg-type]
        text = [*PROMPT, *server.ask(PROMPT)[1]]
        server.ask([i % 250 for i in range(1300)], max_tokens=1)  # takes the slot and all pages
        assert server.ask([*text, 9])[0] == len(text) - 1
        stuck.goes_on.set()


@pytest.mark.parametrize("slots", [1, 2], ids=["slot lost", "slot kept"])
def test_a_conversation_waits_for_a_slow_store_rather_than_being_lost(model: Path, store: Store, slots: int) -> None:
    """Its pages are needed, and host memory has no room for them: they are written before they go."""
    with served(model, Slow(store, 0.2), slots=slots, n_pages=7, ram=0) as server:  # type: ignore[arg-type]
        server.ask([(i + 1) % 250 for i in range(1300)], max_tokens=1)  # fills what waits for the store
        answer = server.ask(PROMPT, slot=0)[1]
        server.ask([i % 250 for i in range(1300)], max_tokens=1)
        text = [*PROMPT, *answer]
        assert server.ask([*text, 9], slot=0)[0] == len(text) - 1
