"""How servers that share a store keep out of each other's way when one saves and another makes room.

A save writes which chunks it needs before it looks whether they are there; whoever makes room writes
which chunks it removes before it looks which are needed. Whatever the order, one of the two sees the
other: the save waits until the removal is over and writes again what is gone, or the removal leaves
alone what the save needs.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Final

from blake3 import blake3

from numoe.engine.errors import NotFoundError, NumoeError
from numoe.engine.store import Store
from numoe.engine.store.keys import KEY_BYTES

NEEDS: Final = "needs"
REMOVALS: Final = "removals"
"""The folders of both kinds of claims: objects that hold a checksum, then keys, one after the other."""
REMOVES_WITHIN_S: Final = 10.0
"""A removal begins no deletion later than this after its claim."""
_WAITS_S: Final = 60.0  # then whoever removes must be dead: a deletion ends within the store's deadline
_FORGOTTEN_S: Final = 3600.0  # a save ends within this after its claim, or is dead
_LOOKS_S: Final = 0.1
_CHECKSUM: Final = 32


class Claims:
    """The claims in a store; errors as those of the store."""

    def __init__(self, store: Store) -> None:
        self._store = store

    @contextlib.contextmanager
    def needing(self, keys: Iterable[bytes], check: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Nobody begins to remove any of `keys` meanwhile, nor is anybody about to.

        check: called while removals are waited for; it raises if they need not be.
        """
        keys = set(keys)
        with self._claim(NEEDS, keys):
            self._wait_for_removals(keys, check)
            yield

    @contextlib.contextmanager
    def removing(self, keys: Iterable[bytes]) -> Iterator[set[bytes]]:
        """Announce that `keys` are removed; gives those that saves need, to be left alone."""
        keys = set(keys)
        with self._claim(REMOVALS, keys):
            needed = set[bytes]()
            for entry in self._store.list(NEEDS):
                if time.time() - entry.modified > _FORGOTTEN_S:
                    self._store.delete(entry.key)
                else:
                    needed |= self._claimed(entry.key, keys)
            yield needed

    @contextlib.contextmanager
    def _claim(self, folder: str, keys: Iterable[bytes]) -> Iterator[None]:
        path = f"{folder}/{secrets.token_hex(16)}"
        named = b"".join(keys)
        self._store.put_new(path, blake3(named).digest() + named)
        try:
            yield
        finally:
            with contextlib.suppress(NumoeError):  # it is forgotten in time
                self._store.delete(path)

    def _wait_for_removals(self, keys: set[bytes], check: Callable[[], None]) -> None:
        until = time.monotonic() + _WAITS_S
        for entry in self._store.list(REMOVALS):
            while self._claimed(entry.key, keys):
                check()
                if time.monotonic() > until:
                    self._store.delete(entry.key)
                    break
                time.sleep(_LOOKS_S)

    def _claimed(self, path: str, keys: set[bytes]) -> set[bytes]:
        """Which of `keys` are in a claim: none if it is over, all if it is damaged, as it may name any."""
        try:
            data = bytes(self._store.get(path))
        except NotFoundError:
            return set()
        checksum, named = data[:_CHECKSUM], data[_CHECKSUM:]
        if blake3(named).digest() != checksum:
            return keys
        return keys & {named[at : at + KEY_BYTES] for at in range(0, len(named), KEY_BYTES)}
