"""Servers that round sums otherwise share chunks; but who has begun to answer goes on with the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest

from numoe.engine.kv.pages import PAGE_TOKENS
from numoe.engine.requests import Started
from numoe.engine.store import Store, open_store
from numoe.engine.store.chunks import FIXED_BYTES, UNKNOWN_ROUNDING, Provenance, rounding_of
from numoe.engine.store.keys import CHUNKS
from tests.engine.worker.served import Served, served
from tests.models import make_model

PROMPT = [(7 * i + i // 11) % 250 for i in range(2 * PAGE_TOKENS + 60)]
ONE, TWO = rounding_of("one shard"), rounding_of("two shards")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "m.gguf", "qwen3moe")


@pytest.fixture(scope="module")
def answer(model: Path) -> list[int]:
    """What one shard says."""
    with served(model, None, ram=0) as server:
        return server.ask(PROMPT)[1]


@pytest.fixture
def foreign(model: Path, tmp_path: Path) -> Store:
    """A store with the prompt's chunks, computed by two shards."""
    store = open_store(tmp_path / "store")
    with served(model, store, shards=2, rounding=TWO) as server:
        server.ask(PROMPT, 1)
        server.settle()
    return store


def heads(store: Store) -> dict[bytes, Provenance]:
    """What the objects in a store say of themselves."""
    found = {}
    for entry in store.list(CHUNKS):
        head = Provenance.peek(store.get_first(entry.key, FIXED_BYTES))
        assert head is not None
        found[bytes.fromhex(entry.key.rsplit("/", 1)[-1])] = head
    return found


def test_a_chunk_tells_where_it_comes_from(foreign: Store) -> None:
    found = heads(foreign)
    assert {head.rounding for head in found.values()} == {TWO}
    assert sum(head.before in found for head in found.values()) == len(found) - 1  # all but the first one


def test_who_saves_what_others_computed_does_not_say_it_was_he(model: Path, foreign: Store) -> None:
    with served(model, foreign, ram=0, rounding=ONE) as server:
        server.ask(PROMPT, 1, slot=0)
        server.settle()
        for entry in foreign.list(CHUNKS):
            foreign.delete(entry.key)
        server.engine.slots.save("save", 0, "chat", None)
        assert sorted(head.rounding for head in heads(foreign).values()) == sorted([UNKNOWN_ROUNDING] * 2 + [ONE])


def test_who_ends_a_chunk_that_others_began_does_not_say_it_was_he(model: Path, tmp_path: Path) -> None:
    store = open_store(tmp_path / "store")
    with served(model, store, shards=2, rounding=TWO) as server:
        text = [*PROMPT, *server.ask(PROMPT, slot=0)[1]]
        server.engine.slots.save("save", 0, "chat", None)
    before = heads(store)
    with served(model, store, rounding=ONE) as server:
        server.engine.slots.restore("restore", 0, "chat", None)
        server.ask([*text, *range(240)], 1, slot=0)
        server.settle()
    assert [head.rounding for key, head in heads(store).items() if key not in before] == [UNKNOWN_ROUNDING]


def test_what_came_from_a_file_is_not_called_ones_own(model: Path, tmp_path: Path) -> None:
    with served(model, None, ram=0, shards=2) as server:
        server.ask(PROMPT, 1, slot=0)
        server.engine.slots.save_file(tmp_path / "file", all_tokens=True)
    store = open_store(tmp_path / "store")
    with served(model, store, rounding=ONE) as server:
        server.engine.slots.load_file(tmp_path / "file")
        server.engine.slots.save("save", 0, "chat", None)
    assert [head.rounding for head in heads(store).values()] == [UNKNOWN_ROUNDING] * 3


def cached(server: Served, **rest: object) -> tuple[int, tuple[int, ...], list[int]]:
    """The cached tokens of the prompt, which of its chunks were foreign, and all that is said."""
    begun = rest.get("generated", ())
    name = server.submit(PROMPT, **rest)
    found, said, _ = server.end(name)
    started = next(event for event in server.of(name) if isinstance(event, Started))
    return found, started.foreign, [*begun, *said]  # type: ignore[misc]


def test_a_new_request_takes_any_chunk_and_tells_which_are_foreign(model: Path, foreign: Store) -> None:
    with served(model, foreign, rounding=ONE) as server:
        assert cached(server)[:2] == (512, (0, 1))
        assert cached(server)[:2] == (571, (0, 1)), "the same from pages, the tail being this server's"


@pytest.mark.parametrize(("own", "first"), [((), 0), ((0,), 256), ((0, 1), 512), ((1,), 0)])
def test_who_goes_on_takes_only_what_was_foreign_before(
    model: Path, foreign: Store, answer: list[int], own: tuple[int, ...], first: int
) -> None:
    with served(model, foreign, rounding=ONE) as server:
        found, _, said = cached(server, generated=tuple(answer[:3]), foreign=own)
        assert found == first
        if not own:
            assert said == answer


def test_who_goes_on_takes_no_foreign_pages_of_others(model: Path, foreign: Store, answer: list[int]) -> None:
    with served(model, foreign, rounding=ONE) as server:
        server.ask(PROMPT, 1)
        found, _, said = cached(server, generated=tuple(answer[:3]), foreign=())
        assert (found, said) == (0, answer)
        server.settle()


def test_who_goes_on_takes_what_was_rounded_alike(model: Path, tmp_path: Path, answer: list[int]) -> None:
    store = open_store(tmp_path / "store")
    with served(model, store, rounding=ONE) as server:
        server.ask(PROMPT, 1)
        server.settle()
    with served(model, store, rounding=ONE) as server:
        assert cached(server, generated=tuple(answer[:3]), foreign=()) == (512, (), answer)
