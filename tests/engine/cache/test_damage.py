"""A flipped byte or a missing end, in any object: a restore says which, the slot stays, and a prompt does without."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from numoe.engine.cache import claims
from numoe.engine.cache.claims import Claims
from numoe.engine.cache.snapshots import Progress
from numoe.engine.errors import DataLossError, NotFoundError
from numoe.engine.store import Store, open_store
from tests.engine.cache.conftest import Story
from tests.engine.cache.support import Saver, Talk
from tests.engine.worker.served import Served, served

LIVE = [(11 * i + 1) % 250 for i in range(300)]
HEADER = 96  # of a chunk, before its checksums


def replace(store: Store, key: str, data: bytes | None) -> None:
    """Put anything in the place of an object."""
    store.delete(key)
    if data is not None:
        store.put_new(key, data)


def damaged(data: bytes, places: list[int]) -> Iterator[bytes | None]:
    """The same with a byte flipped at each place, cut at each, with a byte more, empty, and gone."""
    for place in places:
        place %= len(data)
        yield data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :]
        yield data[:place]
    yield data + b"\0"
    yield b""
    yield None


def chunk_places(data: bytes) -> list[int]:
    """In each field of the header, in the table of checksums, in its own, and in the layers."""
    layers = len(data) - HEADER
    return [0, 8, 12, 16, 20, 24, 32, 70, HEADER, HEADER + 40, HEADER + 70, HEADER + 96, HEADER + layers // 2, -1]


@pytest.fixture
def there(story: Story, store: Store) -> Store:
    """A store with a snapshot "chat", of two full chunks and a tail."""
    with served(story.model, store) as server:
        report = server.engine.slots.load_file(story.files[1], slot=0)
        assert report is not None
        server.engine.slots.save("s", 0, "chat", None)
    return store


def keys_of(store: Store) -> list[str]:
    """The snapshot's chunks: two full ones and the tail, which is smaller."""
    return [entry.key for entry in sorted(store.list("chunks"), key=lambda entry: -entry.size)]


def live_slot(server: Served) -> tuple[int, list[int]]:
    """Give slot 0 a conversation; what a request gets that goes on with it."""
    text = [*LIVE, *server.ask(LIVE, slot=0)[1]]
    return len(text) - 1, server.ask([*text, 9], slot=1)[1]


def check_live(server: Served, cached: int, answer: list[int]) -> None:
    """The slot's conversation is where it was."""
    slot = server.engine.status().slots[0]
    assert (slot.tokens, slot.computed, slot.cached, slot.state) == (cached + 1, cached, cached, "idle")


def test_a_restore_names_the_damage_and_leaves_the_slot(story: Story, there: Store) -> None:
    full, _, tail = keys_of(there)
    with served(story.model, there, ram=0) as server:
        live = live_slot(server)
        for key in (full, tail, "snapshots/chat"):
            good = bytes(there.get(key))
            places = [0, 8, 41, len(good) // 2, -1] if key.startswith("snap") else chunk_places(good)
            name = key.rsplit("/", 1)[-1]
            for bad in damaged(good, places):
                if bad is None and key.startswith("snap"):
                    continue  # then there is no such snapshot
                replace(there, key, bad)
                with pytest.raises(DataLossError, match=name):
                    server.engine.slots.restore("r", 0, "chat", None)
                check_live(server, *live)
            replace(there, key, good)
        server.engine.slots.restore("r", 1, "chat", None)
        text = story.texts[1]
        assert server.ask([*text, 5, 6, 7], slot=1) == (len(text) - 1, story.answers[1])
        live_text = [*LIVE, *server.ask(LIVE, slot=0)[1]]
        assert server.ask([*live_text, 9], slot=0)[1] == live[1]


def test_a_prompt_computes_again_what_is_damaged_and_repairs_it(story: Story, there: Store) -> None:
    first, _, tail = keys_of(there)
    text, good = story.texts[1], {key: bytes(there.get(key)) for key in keys_of(there)}
    for bad in (good[first][:-1] + b"x", good[first][:1000], b"", None):
        replace(there, first, bad)
        with served(story.model, there, ram=0) as server:
            cached, answer = server.ask([*text, 5, 6, 7])
            assert cached in (0, 256)
            assert answer == story.answers[1]
            server.settle()
        assert bytes(there.get(first)) == good[first]
    replace(there, tail, good[tail][:-1] + b"x")
    with served(story.model, there, ram=0) as server:
        with pytest.raises(DataLossError, match=tail.rsplit("/", 1)[-1]):
            server.engine.slots.restore("r", 0, "chat", None)
        server.engine.slots.load_file(story.files[1], slot=0)
        server.engine.slots.save("s", 0, "chat", None)  # writes the tail again
    assert bytes(there.get(tail)) == good[tail]
    with served(story.model, there, ram=0) as server:
        assert server.engine.slots.restore("r", 0, "chat", None).computed == len(text) - 1


def test_a_save_writes_a_truncated_chunk_again(story: Story, there: Store) -> None:
    key = keys_of(there)[0]
    good = bytes(there.get(key))
    replace(there, key, good[: len(good) // 2])
    with served(story.model, there) as server:
        server.engine.slots.load_file(story.files[1], slot=0)
        assert server.engine.slots.save("s", 0, "chat", None).moved_chunks == 1
    assert bytes(there.get(key)) == good


def test_a_save_of_what_nobody_has_any_more_is_an_error(story: Story, tmp_path: Path) -> None:
    store, talk = open_store(tmp_path / "store"), Talk.read(story.files[1])
    conversation, objects = talk.salted(b"")
    saver = Saver(store, talk.pages, talk.origin)
    lost = conversation.all_keys[1]
    saver.hold({key: data for key, data in objects.items() if key != lost})
    with pytest.raises(DataLossError, match=lost.hex()):
        saver.snapshots.save(conversation, "chat", Progress())
    with pytest.raises(NotFoundError):
        saver.snapshots.manifest("chat")
    saver.hold(objects)
    saver.snapshots.save(conversation, "chat", Progress())
    assert saver.snapshots.manifest("chat").keys == conversation.all_keys
    saver.close()


def test_a_damaged_claim_claims_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose it was and what it named cannot be told: what it may have protected stays."""
    store = open_store(tmp_path / "store")
    mine, other, third = {b"1" * 32}, {b"2" * 32}, {b"3" * 32}
    with Claims(store).needing(mine | other):
        (claim,) = store.list(claims.NEEDS)
        with Claims(store).removing(mine | third) as needed:
            assert needed == mine
        good = bytes(store.get(claim.key))
        for bad in damaged(good, [0, 31, 32, len(good) - 1]):
            if bad is None:
                continue
            replace(store, claim.key, bad)
            with Claims(store).removing(third) as needed:
                assert needed == third
    monkeypatch.setattr(claims, "_WAITS_S", 0.0)
    with Claims(store).removing(other):
        (claim,) = store.list(claims.REMOVALS)
        with Claims(store).needing(mine):
            assert store.exists(claim.key), "somebody else's removal was waited for"
        replace(store, claim.key, b"")
        with Claims(store).needing(mine):
            assert not store.exists(claim.key), "it is removed when it was waited for long enough"


def test_one_damaged_conversation_does_not_keep_others_from_coming_back(
    story: Story, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(tmp_path / "store")
    with served(story.model, store, save=True) as server:
        server.ask(LIVE)
        answer = server.ask(story.texts[0])[1]
    one, other = (entry.key for entry in store.list("resumable"))
    for key in (one, other):
        good = bytes(store.get(key))
        for bad in damaged(good, [0, 20, len(good) // 2, -1]):
            replace(store, key, bad)
            with caplog.at_level(logging.WARNING), served(story.model, store, resume=True, ram=0) as server:
                assert sum(slot.tokens > 0 for slot in server.engine.status().slots) == 1
                assert server.ask(story.texts[0])[1] == answer
            assert bad is None or key.rsplit("/", 1)[-1] in caplog.text
            caplog.clear()
        replace(store, key, good)


def test_a_prompt_cache_file_names_the_damage_and_leaves_the_slot(story: Story, tmp_path: Path) -> None:
    good = story.files[1].read_bytes()
    manifest = int.from_bytes(good[8:16], "little")
    chunk = 16 + manifest
    path = tmp_path / "cache"
    with served(story.model, None, ram=0) as server:
        live = live_slot(server)
        in_chunk = [chunk + 8 + place for place in chunk_places(b"1" * 9000)]
        places = [0, 8, 15, 20, 60, chunk - 1, chunk, chunk + 7, *in_chunk, -1]
        for bad in damaged(good, places):
            if bad is None or bad == good + b"\0":
                continue
            path.write_bytes(bad)
            with pytest.raises(DataLossError, match=str(path)):
                server.engine.slots.load_file(path, slot=0)
            check_live(server, *live)
        path.write_bytes(good)
        assert server.engine.slots.load_file(path, slot=0) is not None
        text = story.texts[1]
        assert server.ask([*text, 5, 6, 7], slot=0) == (len(text) - 1, story.answers[1])
