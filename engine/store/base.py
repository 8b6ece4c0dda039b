"""`Store`: what every store of objects can do. An object is bytes under a name; it appears whole or not at all."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeVar

from numoe.engine.errors import InputError, NotFoundError, PreconditionError
from numoe.engine.store.failures import STORE_FAILURES, MissingStoreError, store_error

if TYPE_CHECKING:
    from typing_extensions import Buffer

MAX_KEY: Final = 512
_KEY: Final = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}(/[A-Za-z0-9_-][A-Za-z0-9._-]{0,199})*")
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Entry:
    """An object in a listing: its name, its size in bytes, when it was written (seconds since 1970).

    tag: another one when the object is written anew; empty if the store has none.
    """

    key: str
    size: int
    modified: float
    tag: str = ""


class Store(ABC):
    """Objects by name. Every method may be called from any thread, blocks, and ends within about `deadline` seconds.

    A name is made of parts of letters, digits, "_", "-" and, not in front, ".", with "/" between.

    Raises InputError for an impossible name, NotFoundError for a missing object, PreconditionError,
    AccessError for missing or wrong credentials, ResourceError for a full store, UnavailableError
    for one that cannot be reached or whose bucket is gone (which `head` cannot tell from a missing
    object). After an UnavailableError of a write nobody knows whether it happened; it may simply be
    repeated.
    """

    def __init__(self, url: str, deadline: float) -> None:
        self.url, self.deadline = url, deadline

    def put_new(self, key: str, data: Buffer) -> bool:
        """Write an object unless there is one; whether there was none. An existing one is left as it is."""
        try:
            self._do(f"writing {key}", lambda: self._put(check_key(key), data, None))
        except PreconditionError:
            return False
        return True

    def put_if(self, key: str, data: bytes, version: str | None) -> str:
        """Replace `version` of an object, or write it if there must be none (None); the new version.

        Raises PreconditionError if it is another one. An object that holds the same bytes already
        counts as written: so a write whose answer was lost can be repeated.
        """
        try:
            return self._do(f"writing {key}", lambda: self._put(check_key(key), data, version))
        except PreconditionError:
            try:
                found, current = self.get_versioned(key)
            except NotFoundError:
                found, current = memoryview(b""), ""
            if current and found == data:
                return current
            raise

    def get(self, key: str) -> memoryview:
        """The bytes of an object."""
        return self._do(f"reading {key}", lambda: self._get(check_key(key)))

    def get_first(self, key: str, nbytes: int) -> memoryview:
        """The first `nbytes` (at least 1) bytes of an object, which must have as many; the others are not moved."""
        return self._do(f"reading {key}", lambda: self._get_first(check_key(key), nbytes))

    def get_versioned(self, key: str) -> tuple[memoryview, str]:
        """The bytes of an object and its version, for `put_if`."""
        return self._do(f"reading {key}", lambda: self._get_versioned(check_key(key)))

    def head(self, key: str) -> int:
        """The size of an object in bytes."""
        return self._do(f"looking for {key}", lambda: self._head(check_key(key)))

    def exists(self, key: str) -> bool:
        """Whether there is such an object."""
        try:
            self.head(key)
        except NotFoundError:
            return False
        return True

    def list(self, folder: str = "") -> Sequence[Entry]:
        """All objects whose names begin with `folder` and "/" (all if it is empty), ordered by name."""
        entries = self._do(f"listing {folder or 'it'}", lambda: self._list(folder and check_key(folder)))
        return sorted(entries, key=lambda entry: entry.key)

    def delete(self, key: str) -> None:
        """Remove an object, if it is there."""
        self._do(f"removing {key}", lambda: self._delete(check_key(key)))

    def check(self) -> None:
        """Raise what using the store would raise: UnavailableError, AccessError, …; it changes nothing.

        NotFoundError if there is no such bucket: here, that is a name that is wrong rather than a store that is away.
        """
        try:
            self.list("check")
        except MissingStoreError as error:
            raise NotFoundError(str(error)) from error

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"

    def _do(self, doing: str, operation: Callable[[], _Result]) -> _Result:
        """Run an operation; whatever it raises becomes an error of numoe."""
        try:
            return operation()
        except STORE_FAILURES as error:
            raise store_error(error, doing, self.url) from error

    @abstractmethod
    def _put(self, key: str, data: Buffer, version: str | None) -> str:
        """Write where `version` (None: nothing) is; the new version. Errors as obstore and OSErrors, as all below."""

    @abstractmethod
    def _get(self, key: str) -> memoryview: ...

    @abstractmethod
    def _get_first(self, key: str, nbytes: int) -> memoryview: ...

    @abstractmethod
    def _get_versioned(self, key: str) -> tuple[memoryview, str]: ...

    @abstractmethod
    def _head(self, key: str) -> int: ...

    @abstractmethod
    def _list(self, folder: str) -> Sequence[Entry]: ...

    @abstractmethod
    def _delete(self, key: str) -> None: ...


def check_key(key: str) -> str:
    """Return `key`; InputError if it cannot name an object, as it would if it led out of the store."""
    if len(key) > MAX_KEY or not _KEY.fullmatch(key):
        raise InputError(
            f"{key[:80]!r} cannot name an object of a store: use letters, digits, '_', '-' and '.', "
            f"at most {MAX_KEY} of them"
        )
    return key
