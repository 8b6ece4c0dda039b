"""The manifests in a store, and which chunks they name; the ones that did not change are not read again."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

from numoe.engine.errors import NotFoundError, NumoeError
from numoe.engine.store import Entry, Store
from numoe.engine.store.manifest import Manifest, decode_manifest

logger = logging.getLogger(__name__)
_READERS: Final = 16


@dataclass(frozen=True)
class Chain:
    """The chunks of a conversation, from the first on, and when it was used last (seconds since 1970)."""

    keys: tuple[bytes, ...]
    used: float


class Manifests:
    """Reads manifests, several at a time; errors as those of the store. Not for several threads at once."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._known: dict[str, dict[str, tuple[str, Chain]]] = {}  # by folder and name, with the object's tag

    def read(self, folder: str, *passed_over: type[NumoeError]) -> list[Manifest]:
        """All of a folder, but for those that cannot be read for one of these reasons."""
        return [manifest for _, manifest in self._read(self._store.list(folder), passed_over)]

    def chains(self, folder: str, *passed_over: type[NumoeError]) -> list[Chain]:
        """What the manifests of a folder name."""
        entries, before = self._store.list(folder), self._known.get(folder, {})
        known = {e.key: before[e.key] for e in entries if e.tag and e.key in before and before[e.key][0] == e.tag}
        self._known[folder] = known
        for entry, manifest in self._read([e for e in entries if e.key not in known], passed_over):
            known[entry.key] = entry.tag, Chain(manifest.keys, manifest.created)
        return [chain for _, chain in known.values()]

    def _read(
        self, entries: Sequence[Entry], passed_over: tuple[type[NumoeError], ...]
    ) -> Iterator[tuple[Entry, Manifest]]:
        if not entries:
            return
        with ThreadPoolExecutor(min(_READERS, len(entries)), "manifests") as pool:
            for entry, data in zip(entries, pool.map(self._get, entries), strict=True):
                try:
                    if data is not None:
                        yield entry, decode_manifest(data, entry.key.rsplit("/", 1)[-1])
                except passed_over as error:
                    logger.warning("%s", error)

    def _get(self, entry: Entry) -> memoryview | None:
        """The object, or None if it is gone meanwhile."""
        try:
            return self._store.get(entry.key)
        except NotFoundError:
            return None
