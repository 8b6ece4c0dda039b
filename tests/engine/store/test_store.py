"""What every store promises, on a folder, in memory and on an S3 server."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest

from numoe.engine.errors import InputError, NotFoundError, PreconditionError
from numoe.engine.store import Store

BAD_KEYS = ["", "/", "/a", "a/", "a//b", "..", "a/../b", "../a", ".hidden", "a/.b", "a b", "ü", "a\0", "a\n", "a" * 513]


@pytest.mark.parametrize("size", [0, 1, 100_000, 12_000_001])
def test_bytes_come_back(store: Store, open_again: Callable[[], Store], size: int) -> None:
    data = np.random.default_rng(size).bytes(size)
    assert store.put_new("chunks/ab/abcdef", memoryview(data)) is True
    other = open_again()
    assert other.get("chunks/ab/abcdef") == data
    assert other.head("chunks/ab/abcdef") == size
    assert other.exists("chunks/ab/abcdef")


def test_an_array_is_bytes_too(store: Store) -> None:
    store.put_new("a", np.arange(1000, dtype=np.uint8))
    assert store.get("a") == np.arange(1000, dtype=np.uint8).tobytes()


def test_put_new_leaves_what_is_there(store: Store) -> None:
    assert store.put_new("a/b", b"first") is True
    assert store.put_new("a/b", b"first") is False
    assert store.put_new("a/b", b"second") is False
    assert store.get("a/b") == b"first"


def test_put_if_replaces_only_the_version_it_was_told(store: Store) -> None:
    first = store.put_if("slots/main", b"1", None)
    second = store.put_if("slots/main", b"22", first)
    assert second != first
    with pytest.raises(PreconditionError, match="read it again"):
        store.put_if("slots/main", b"333", first)
    with pytest.raises(PreconditionError, match="slots/main"):
        store.put_if("slots/main", b"333", None)
    data, version = store.get_versioned("slots/main")
    assert (data, version) == (b"22", second)
    store.put_if("slots/main", b"333", version)
    assert store.get("slots/main") == b"333"


def test_put_if_of_a_version_that_is_gone_fails(store: Store) -> None:
    version = store.put_if("a", b"1", None)
    store.delete("a")
    with pytest.raises(PreconditionError):
        store.put_if("a", b"2", version)
    assert not store.exists("a")
    store.put_if("a", b"2", None)


def test_a_write_whose_answer_was_lost_can_be_repeated(store: Store) -> None:
    first = store.put_if("a", b"1", None)
    assert store.put_if("a", b"1", None) == first
    second = store.put_if("a", b"2", first)
    assert store.put_if("a", b"2", first) == second


def test_of_many_writers_of_one_name_exactly_one_wins(store: Store, open_again: Callable[[], Store]) -> None:
    version = None
    for number in range(2):
        barrier = Barrier(16)

        def write(writer: int, version: str | None = version, number: int = number, barrier: Barrier = barrier) -> str:
            own = open_again()
            barrier.wait()
            try:
                return own.put_if("slots/raced", f"round {number} writer {writer}".encode(), version)
            except PreconditionError:
                return ""

        with ThreadPoolExecutor(16) as pool:
            results = list(pool.map(write, range(16)))
        winners = [writer for writer, result in enumerate(results) if result]
        assert len(winners) == 1
        data, version = store.get_versioned("slots/raced")
        assert (bytes(data), version) == (f"round {number} writer {winners[0]}".encode(), results[winners[0]])


def test_of_many_put_new_exactly_one_is_new(store: Store) -> None:
    with ThreadPoolExecutor(16) as pool:
        new = list(pool.map(lambda i: store.put_new("chunk", b"%d" % i * 100_000), range(16)))
    assert new.count(True) == 1
    assert store.get("chunk") == b"%d" % new.index(True) * 100_000


def test_listing_names_sizes_and_times(store: Store) -> None:
    before = time.time()
    for key in ("chunks/ab/1", "chunks/ab/2", "chunks/b", "chunkss", "slots/x"):
        store.put_new(key, key.encode())
    listed = [(e.key, e.size) for e in store.list("chunks")]
    assert listed == [("chunks/ab/1", 11), ("chunks/ab/2", 11), ("chunks/b", 8)]
    assert [e.key for e in store.list()] == ["chunks/ab/1", "chunks/ab/2", "chunks/b", "chunkss", "slots/x"]
    assert all(before - 2 < e.modified < time.time() + 2 for e in store.list())
    assert list(store.list("nothing")) == []


def test_a_deleted_object_is_gone(store: Store) -> None:
    store.put_new("a/b", b"1")
    store.delete("a/b")
    store.delete("a/b")
    assert not store.exists("a/b")
    assert list(store.list()) == []
    assert store.put_new("a/b", b"2") is True


@pytest.mark.parametrize("size", [1, 9, 100_000])
def test_the_first_bytes_come_alone(store: Store, size: int) -> None:
    data = np.random.default_rng(size).bytes(100_000)
    store.put_new("a/b", data)
    assert store.get_first("a/b", size) == data[:size]


def _get_first(store: Store, key: str) -> memoryview:
    return store.get_first(key, 1)


@pytest.mark.parametrize("operation", [Store.get, _get_first, Store.get_versioned, Store.head])
def test_a_missing_object_is_not_found(store: Store, operation: Callable[[Store, str], object]) -> None:
    with pytest.raises(NotFoundError, match=r"a/missing failed: .*check the name"):
        operation(store, "a/missing")


@pytest.mark.parametrize("key", BAD_KEYS)
def test_a_name_that_leads_astray_is_refused(store: Store, key: str) -> None:
    for operation in (
        store.get, store.head, store.delete, lambda k: store.put_new(k, b"1"), lambda k: store.put_if(k, b"1", None),
    ):  # fmt: skip
        with pytest.raises(InputError, match="cannot name an object"):
            operation(key)


def test_a_store_that_works_passes_its_check(store: Store) -> None:
    store.check()
    assert list(store.list()) == []
