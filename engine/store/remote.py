"""Stores that obstore reaches: S3, Google Cloud Storage, Azure, and memory."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import obstore

from numoe.engine.store.base import Entry, Store
from numoe.engine.store.failures import timeout_error

if TYPE_CHECKING:
    from obstore.store import ObjectStore
    from typing_extensions import Buffer

_Result = TypeVar("_Result")


class RemoteStore(Store):
    """Objects of an obstore store.

    Calls run on an event loop in a thread of its own, where the deadline cancels them: obstore's
    own limits are for one request, and leave out the search for credentials.
    """

    def __init__(self, url: str, deadline: float, store: ObjectStore) -> None:
        super().__init__(url, deadline)
        self._store = store

    def _put(self, key: str, data: Buffer, version: str | None) -> str:
        async def write() -> str:
            mode: Any = "create" if version is None else _split(version)
            # A condition needs a single request.
            return _version(await obstore.put_async(self._store, key, data, mode=mode, use_multipart=False))

        return self._run(f"writing {key}", write())

    def _get(self, key: str) -> memoryview:
        return self._get_versioned(key)[0]

    def _get_first(self, key: str, nbytes: int) -> memoryview:
        async def read() -> memoryview:
            return memoryview(await obstore.get_range_async(self._store, key, start=0, length=nbytes))

        return self._run(f"reading {key}", read())

    def _get_versioned(self, key: str) -> tuple[memoryview, str]:
        async def read() -> tuple[memoryview, str]:
            result = await obstore.get_async(self._store, key)
            return memoryview(await result.bytes_async()), _version(result.meta)

        return self._run(f"reading {key}", read())

    def _head(self, key: str) -> int:
        async def look() -> int:
            return (await obstore.head_async(self._store, key))["size"]

        return self._run(f"looking for {key}", look())

    def _list(self, folder: str) -> list[Entry]:
        async def collect() -> list[Entry]:
            found = await obstore.list(self._store, folder or None).collect_async()
            return [Entry(m["path"], m["size"], m["last_modified"].timestamp(), m["e_tag"] or "") for m in found]

        return self._run(f"listing {folder or 'it'}", collect())

    def _delete(self, key: str) -> None:
        async def remove() -> None:
            await obstore.delete_async(self._store, key)

        try:
            self._run(f"removing {key}", remove())
        except FileNotFoundError:  # some stores say so, others do not
            return

    def _run(self, doing: str, call: Coroutine[Any, Any, _Result]) -> _Result:
        try:
            return _EventLoop.run(asyncio.wait_for(call, self.deadline))
        except TimeoutError:
            raise timeout_error(doing, self.url, self.deadline) from None


def _version(meta: Mapping[str, Any]) -> str:
    """Both that identify a version, as some stores go by the tag and some by the number."""
    return f"{meta['version'] or ''}|{meta['e_tag'] or ''}"


def _split(version: str) -> dict[str, str]:
    parts = zip(("version", "e_tag"), version.split("|", 1), strict=True)
    return {name: part for name, part in parts if part}


class _EventLoop:
    """One event loop for all stores of the process, in a thread that starts with the first call."""

    _lock = threading.Lock()
    _loop: asyncio.AbstractEventLoop | None = None

    @classmethod
    def run(cls, call: Coroutine[Any, Any, _Result]) -> _Result:
        with cls._lock:
            if cls._loop is None:
                cls._loop = asyncio.new_event_loop()
                threading.Thread(target=cls._loop.run_forever, name="store", daemon=True).start()
        return asyncio.run_coroutine_threadsafe(call, cls._loop).result()
