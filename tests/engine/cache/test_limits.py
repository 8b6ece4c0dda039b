"""Bounds are kept: of host memory and of the store; what snapshots need stays, and ends go before beginnings."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from numoe.engine.cache import RamTier, StoreTier, store_tier
from numoe.engine.cache.lineage import Lineage, beginnings_last
from numoe.engine.cache.manifests import Manifests
from numoe.engine.cache.snapshots import Progress
from numoe.engine.errors import NotFoundError, ResourceError, UnavailableError
from numoe.engine.kv.pages import PAGE_TOKENS
from numoe.engine.scheduler.conversation import Parked
from numoe.engine.scheduler.load import Load, Tail
from numoe.engine.store import Store, open_store
from numoe.engine.store.chunks import ChunkShape, Provenance, build_chunk
from numoe.engine.store.keys import chain_keys, chunk_path
from tests.engine.cache.conftest import Story
from tests.engine.cache.support import Interrupted, Saver, Talk

KEYS = [bytes([number]) * 32 for number in range(12)]
PUTS = st.tuples(st.just("put"), st.integers(0, 11), st.integers(1, 40), st.booleans())
OTHERS = st.tuples(st.sampled_from(["written", "get", "touch"]), st.integers(0, 11), st.just(0), st.just(False))


@settings(max_examples=300, deadline=None)
@given(limit=st.integers(0, 100), reserve=st.integers(0, 60), steps=st.lists(PUTS | OTHERS, max_size=40))
def test_host_memory_never_holds_more_than_its_limit(
    limit: int, reserve: int, steps: list[tuple[str, int, int, bool]]
) -> None:
    ram, waiting, held = RamTier(limit, reserve), dict[int, int](), dict[int, int]()
    for what, number, size, waits in steps:
        key = KEYS[number]
        if what == "put":
            there = key in ram
            kept = ram.put(key, bytes(size), waits=waits)
            assert kept == (key in ram)
            if kept and not there:
                held[number] = size
            if kept and waits:
                waiting[number] = held[number]
            if not kept:
                assert sum(waiting.values()) + size > (max(limit, reserve) if waits else limit), "there was room"
        elif what == "written":
            ram.written(key)
            waiting.pop(number, None)
        elif what == "get":
            assert (ram.get(key) is not None) == (key in ram)
        else:
            ram.touch([key])
        there_now = [n for n in range(12) if KEYS[n] in ram]
        assert ram.nbytes == sum(held[n] for n in there_now)
        assert waiting.keys() <= set(there_now), "what waits was dropped"
        assert ram.nbytes <= max(limit, reserve if waiting else 0)


def test_the_end_of_a_prompt_goes_before_its_beginning() -> None:
    """Whatever is used: chunks are dropped one by one, never one before those behind it."""
    ram, lineage = RamTier(6), Lineage()
    one, other = KEYS[:4], KEYS[4:8]
    for keys in (one, other, one):
        lineage.note(keys)
        for key in keys:
            ram.put(key, b"1", waits=False)
            ram.touch(lineage.chain(key))
        here = [[key in ram for key in prompt] for prompt in (one, other)]
        assert here == [sorted(prompt, reverse=True) for prompt in here]
        assert all(here[keys is other])


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 3)), min_size=12, max_size=12))
def test_beginnings_count_as_used_after_their_ends(told: list[tuple[int, int]]) -> None:
    """What objects tell may be wrong, too: chunks that go round in a ring end nothing, and nothing waits for them."""
    used = {key: float(at) for key, (_, at) in zip(KEYS, told, strict=True)}
    before = {key: bytes([front]) * 32 for key, (front, _) in zip(KEYS, told, strict=True)}
    later = used | beginnings_last(used, before)
    chains = {key: [key] for key in KEYS}
    for chain in chains.values():
        while (front := before[chain[-1]]) in chains and front not in chain:
            chain.append(front)
    rings = {key for key, chain in chains.items() if before[chain[-1]] == key}
    for key in KEYS:
        behind = max(used[other] for other in KEYS if key in chains[other])
        assert used[key] <= later[key] < behind + 1.0, "nobody behind was used so late"
        if key not in rings:
            assert all(later[key] > later[other] for other in KEYS if before[other] == key)


@contextmanager
def saver_of(talk: Talk, store: Store, limit: int | None = None) -> Iterator[Saver]:
    saver = Saver(store, talk.pages, talk.origin, limit)
    yield saver
    saver.close()


def stored_bytes(store: Store) -> int:
    return sum(entry.size for entry in store.list("chunks"))


def test_the_store_keeps_its_limit_and_what_snapshots_need(story: Story, open_again: Callable[[], Store]) -> None:
    talk = Talk.read(story.files[1])
    total = talk.manifest.chunk_bytes
    with saver_of(talk, open_again(), 4 * total) as saver:
        kept, objects = talk.salted(b"kept")
        saver.hold(objects)
        saver.snapshots.save(kept, "chat", Progress())
        for number in range(8):
            conversation, objects = talk.salted(str(number).encode())
            saver.hold(objects)
            saver.cache.use(conversation.all_keys)
            for key, data in objects.items():
                saver.cache.store_now(key, data.nbytes)
                assert stored_bytes(open_again()) <= 4 * total
                assert stored_bytes(open_again()) == saver.tier.nbytes
            here = [open_again().exists(chunk_path(key)) for key in conversation.all_keys]
            assert all(here)
        assert all(open_again().exists(chunk_path(key)) for key in kept.all_keys)
        # Two more snapshots fit; one more does not, and says so.
        for number in range(8, 10):
            conversation, objects = talk.salted(str(number).encode())
            saver.hold(objects)
            saver.snapshots.save(conversation, f"chat-{number}", Progress())
        conversation, objects = talk.salted(b"too much")
        saver.hold(objects)
        with pytest.raises(ResourceError, match=r"snapshots take up the .* raise --cache-store-limit"):
            saver.snapshots.save(conversation, "too-much", Progress())
        with pytest.raises(NotFoundError):
            saver.snapshots.manifest("too-much")
        saver.snapshots.remove("chat")
        saver.snapshots.save(conversation, "too-much", Progress())
        assert stored_bytes(open_again()) <= 4 * total


@pytest.mark.parametrize("use", ["load", "load behind pages", "save"])
def test_the_tail_of_what_was_used_makes_room_first(story: Story, tmp_path: Path, use: str) -> None:
    talk, store = Talk.read(story.files[1]), open_store(tmp_path)
    tail_tokens = talk.manifest.computed % 256
    full = talk.pages.shape(256).object_bytes
    with saver_of(talk, store, int(3.4 * full)) as saver:
        conversation, objects = talk.salted(b"used")
        keys = conversation.all_keys
        if use == "save":
            saver.hold(objects)
            saver.snapshots.save(conversation, "chat", Progress())
            saver.snapshots.remove("chat")
        else:
            for key, data in objects.items():
                saver.tier.write(key, data)
            saver.cache.find(keys[:2])
            behind = int(use != "load")
            tail = Tail(keys[2], tail_tokens, 1, None, 3)
            load = Load(keys[:behind], keys[behind:2], (1, 2)[behind:], tail)
            assert saver.cache.load(load)[:2] == (2 - behind, True)
        saver.tier.write(b"x" * 32, bytes(full))  # needs the room of one
        assert [store.exists(chunk_path(key)) for key in keys] == [True, True, False]


@pytest.mark.parametrize("there", [0, 1, 2, 77, 349, 350])
def test_the_store_is_asked_about_few_chunks_of_a_long_prompt(story: Story, tmp_path: Path, there: int) -> None:
    keys = [number.to_bytes(32) for number in range(350)]
    asked: list[int] = []
    store = Interrupted(open_store(tmp_path), "head", each=lambda: asked.append(1))
    with saver_of(Talk.read(story.files[0]), store) as saver:  # type: ignore[arg-type]
        saver.tier.list_chunks()
        for key in keys[:there]:  # by another server
            open_store(tmp_path).put_new(chunk_path(key), b"1")
        assert saver.cache.find(keys) == there
        assert 1 <= len(asked) <= 12


def test_what_was_only_listed_goes_end_first_too(story: Story, open_again: Callable[[], Store]) -> None:
    """A restarted server has not used a chunk itself; what it finds was written beginning first."""
    talk = Talk.read(story.files[1])
    full = talk.pages.shape(256).object_bytes
    conversation, objects = talk.salted(b"")
    with saver_of(talk, open_again()) as before:
        before.hold(objects)
        for key, data in objects.items():
            before.tier.write(key, data)
        before.snapshots.park(Parked(conversation))
    with saver_of(talk, open_again(), int(3.4 * full)) as saver:
        saver.tier.write(b"x" * 32, bytes(full))
    there = [open_again().exists(chunk_path(key)) for key in conversation.all_keys]
    assert there == [True, True, False]


def test_what_nobody_names_goes_end_first_too(story: Story, open_again: Callable[[], Store]) -> None:
    """Other servers wrote two conversations by turns, beginning first, and were killed before they parked any."""
    talk = Talk.read(story.files[1])
    full = talk.pages.shape(256).object_bytes
    (one, mine), (other, theirs) = (talk.salted(salt) for salt in (b"one", b"other"))
    with saver_of(talk, open_again()) as before:
        for pair in zip(mine.items(), theirs.items(), strict=True):
            for key, data in pair:
                before.tier.write(key, data)
    with saver_of(talk, open_again(), 6 * full) as saver:
        for number in range(4):
            saver.tier.write(bytes([number]) * 32, bytes(full))
            there = [[open_again().exists(chunk_path(key)) for key in keys] for keys in (one.all_keys, other.all_keys)]
            assert there == [sorted(chain, reverse=True) for chain in there], "a beginning went before its end"
    assert 0 < sum(map(sum, there)) < 3


def test_objects_are_asked_once_what_is_in_front_of_theirs_and_not_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape, count, root = ChunkShape("f16/f16", 1, 1000), 120, bytes(32)
    keys = chain_keys(root, [7] * PAGE_TOKENS * count)
    for key, before in zip(keys, (root, *keys), strict=False):
        data = build_chunk(key, shape, lambda out: out.fill(0), Provenance(before))
        open_store(tmp_path).put_new(chunk_path(key), data)
    store, asked = open_store(tmp_path), list[str]()
    get_first = store.get_first
    monkeypatch.setattr(store, "get_first", lambda key, size: (asked.append(key), get_first(key, size))[1])
    monkeypatch.setattr(store_tier, "_BATCH", 30)
    tier = StoreTier(store, count * shape.object_bytes)
    with monkeypatch.context() as patch:
        patch.setattr(store_tier, "_PEEKS_FOR_S", 0.0)
        tier.write(b"0" * 32, bytes(shape.object_bytes))
    assert not asked
    for number in range(1, 4):
        tier.write(bytes([number]) * 32, bytes(9 * shape.object_bytes))
        there = [store.exists(chunk_path(key)) for key in keys]
        there = there[there.index(True) :]  # the first ones went before it was known what is behind them
        assert there == sorted(there, reverse=True)
        assert 100 < len(asked) == len(set(asked)) < count


def test_making_room_in_a_store_that_is_too_slow_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = StoreTier(open_store(tmp_path), 300)
    for key in KEYS[:2]:
        tier.write(key, bytes(120))
    with monkeypatch.context() as patch:
        patch.setattr(store_tier, "REMOVES_WITHIN_S", 0.0)
        with pytest.raises(UnavailableError, match="no room is made"):
            tier.write(KEYS[2], bytes(120))
    assert tier.writing.seconds_to_wait > 0
    tier.write(KEYS[2], bytes(120))


def test_manifests_are_read_once(story: Story, open_again: Callable[[], Store]) -> None:
    """Those of hundreds of snapshots could not be read again whenever room is made."""
    talk, read = Talk.read(story.files[0]), list[int]()
    store = Interrupted(open_again(), "get", each=lambda: read.append(1))
    manifests = Manifests(store)  # type: ignore[arg-type]
    with saver_of(talk, open_again()) as saver:
        keys = set[bytes]()
        for number in range(3):
            conversation, objects = talk.salted(bytes([number % 2]))
            saver.hold(objects)
            saver.snapshots.save(conversation, f"chat-{number % 2}", Progress())
            keys.update(conversation.all_keys)
            assert {key for chain in manifests.chains("snapshots") for key in chain.keys} == keys
            assert len(read) == number + 1
        saver.snapshots.remove("chat-0")
        assert {key for chain in manifests.chains("snapshots") for key in chain.keys} < keys


def test_two_servers_keep_one_limit(story: Story, open_again: Callable[[], Store]) -> None:
    talk = Talk.read(story.files[1])
    limit = 4 * talk.manifest.chunk_bytes
    with saver_of(talk, open_again(), limit) as one, saver_of(talk, open_again(), limit) as other:
        for number, saver in zip(range(12), itertools.cycle((one, other))):
            conversation, objects = talk.salted(str(number).encode())
            saver.hold(objects)
            saver.snapshots.save(conversation, "chat", Progress())
            assert stored_bytes(open_again()) <= limit
    with saver_of(talk, open_again()) as fresh:
        for number, key in enumerate(fresh.snapshots.manifest("chat").keys):
            fresh.cache.read(key, min(256, talk.manifest.computed - 256 * number))


def test_equal_chunks_of_two_servers_are_stored_once(story: Story, open_again: Callable[[], Store]) -> None:
    talk = Talk.read(story.files[1])
    conversation, objects = talk.salted(b"")
    with saver_of(talk, open_again()) as one, saver_of(talk, open_again()) as other:
        for saver in (one, other):
            saver.hold(objects)
        first, second = Progress(), Progress()
        one.snapshots.save(conversation, "chat", first)
        other.snapshots.save(conversation, "other", second)
        assert (first.moved_chunks, second.moved_chunks) == (3, 0)
        assert len(open_again().list("chunks")) == 3


@pytest.mark.parametrize("operation", ["put_new", "put_if", "head", "list", "get_versioned", "delete"])
def test_a_save_lacks_nothing_that_another_server_removes_meanwhile(
    story: Story, tmp_path: Path, operation: str
) -> None:
    """Another server makes room, as thoroughly as it may, before any operation of the save."""
    talk = Talk.read(story.files[1])
    limit = 2 * talk.manifest.chunk_bytes
    for number in itertools.count(1):
        folder, happened = tmp_path / f"{operation}-{number}", []

        def make_room(folder: Path = folder, happened: list[int] = happened) -> None:
            happened.append(1)
            with saver_of(talk, open_store(folder), limit) as other:
                for salt in (b"x", b"y"):
                    _, objects = talk.salted(salt)
                    for key, data in objects.items():
                        try:
                            other.tier.write(key, data)
                        except ResourceError:
                            return

        store = Interrupted(open_store(folder), operation, number, make_room)
        with saver_of(talk, store) as saver:  # type: ignore[arg-type]
            conversation, objects = talk.salted(b"mine")
            saver.hold(objects)
            for key, data in objects.items():  # they are there when the save begins
                open_store(folder).put_new(chunk_path(key), data)
            saver.snapshots.save(conversation, "chat", Progress())
        with saver_of(talk, open_store(folder)) as fresh:
            for at, key in enumerate(fresh.snapshots.manifest("chat").keys):
                fresh.cache.read(key, min(256, talk.manifest.computed - 256 * at))
        if not happened:
            return


@pytest.mark.parametrize("operation", ["put_new", "get", "delete"])
def test_a_removal_takes_nothing_that_another_server_saves_meanwhile(
    story: Story, tmp_path: Path, operation: str
) -> None:
    """Another server saves, as far as it gets, before any operation of who makes room."""
    talk = Talk.read(story.files[1])
    conversation, mine = talk.salted(b"mine")
    for number in itertools.count(1):
        folder = tmp_path / f"{operation}-{number}"
        for key, data in mine.items():
            open_store(folder).put_new(chunk_path(key), data)
        savers: list[threading.Thread] = []

        def save(folder: Path = folder) -> None:
            with saver_of(talk, open_store(folder)) as saver:
                saver.hold(mine)
                saver.snapshots.save(conversation, "chat", Progress())

        def begin(savers: list[threading.Thread] = savers, save: Callable[[], None] = save) -> None:
            savers.append(threading.Thread(target=save))
            savers[0].start()
            savers[0].join(0.1)  # unless it waits for the removal

        store = Interrupted(open_store(folder), operation, number, begin)
        with saver_of(talk, store, 2 * talk.manifest.chunk_bytes) as other:  # type: ignore[arg-type]
            for salt in (b"x", b"y"):
                for key, data in talk.salted(salt)[1].items():
                    with contextlib.suppress(ResourceError):
                        other.tier.write(key, data)
        if not savers:
            return
        savers[0].join()
        with saver_of(talk, open_store(folder)) as fresh:
            for at, key in enumerate(fresh.snapshots.manifest("chat").keys):
                fresh.cache.read(key, min(256, talk.manifest.computed - 256 * at))


def test_store_tier_counts_what_is_there(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    rng = np.random.default_rng(0)
    sizes = {key: int(rng.integers(1, 100)) for key in KEYS}
    one, other = StoreTier(store, 300), StoreTier(store, 300)
    for key in KEYS:
        one.write(key, bytes(sizes[key]))
        assert stored_bytes(store) <= 300
    other.list_chunks()
    assert other.nbytes == one.nbytes == stored_bytes(store)
    for key in KEYS:
        assert other.has(key) == store.exists(chunk_path(key))
