"""Conversations in the store: chunks first, then a manifest that names them, with a conditional put.

Until the manifest is written the snapshot does not exist, and afterwards all of it does: a process
that dies at any moment leaves the old snapshot or the new one.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from numoe.engine.cache.cache import PromptCache
from numoe.engine.cache.manifests import Chain, Manifests
from numoe.engine.cache.store_tier import StoreTier
from numoe.engine.errors import (
    DataLossError,
    NotFoundError,
    NumoeError,
    PreconditionError,
    ResourceError,
    UnsupportedError,
)
from numoe.engine.kv.pages import PAGE_TOKENS
from numoe.engine.kv.prefix import ChunkKeys
from numoe.engine.requests import SnapshotInfo
from numoe.engine.scheduler.conversation import Conversation, Parked
from numoe.engine.store import Entry
from numoe.engine.store.keys import root_key
from numoe.engine.store.manifest import (
    RESUMABLE,
    SNAPSHOTS,
    Manifest,
    Origin,
    check_compatible,
    decode_manifest,
    encode_manifest,
    manifest_path,
    resumable_folder,
)

logger = logging.getLogger(__name__)
MAX_RESUMABLE: Final = 256
"""Conversations of a model that come back by themselves; of more, the oldest are forgotten."""


class StoppedError(NumoeError):
    """Whoever wanted a save or a restore has gone away."""


@dataclass
class Progress:
    """How far a save or a restore has come; `report` is called after each chunk.

    moved_*: what was really uploaded or read, the rest being there already. `stopped` ends it.
    """

    chunks: int = 0
    bytes: int = 0
    report: Callable[[Progress], None] = lambda _: None
    stopped: bool = False
    done_chunks: int = 0
    done_bytes: int = 0
    moved_chunks: int = 0
    moved_bytes: int = 0

    def begin(self, sizes: Sequence[int]) -> None:
        """So many bytes in so many chunks."""
        self.chunks, self.bytes = len(sizes), sum(sizes)
        self.report(self)

    def add(self, nbytes: int, moved: int) -> None:
        """One more chunk of `nbytes` is done, of which `moved` bytes had to be moved; StoppedError if nobody waits."""
        self.check()
        self.done_chunks += 1
        self.done_bytes += nbytes
        self.moved_chunks += moved > 0
        self.moved_bytes += moved
        self.report(self)

    def check(self) -> None:
        """StoppedError if nobody waits any more."""
        if self.stopped:
            raise StoppedError("the operation was cancelled; nothing was changed")


class Snapshots:
    """Saves, lists and removes snapshots of conversations of one model, and finds what can be resumed.

    origin: of this server. Methods block and may be called from any thread; they raise what the
    store raises, and PreconditionError on a server without one.
    """

    def __init__(self, cache: PromptCache, origin: Origin) -> None:
        self.cache, self.origin = cache, origin
        if cache.tier is not None:
            self._manifests = Manifests(cache.tier.store)
            cache.tier.pinned, cache.tier.chains = self.pinned_keys, self.chains

    @property
    def _tier(self) -> StoreTier:
        if self.cache.tier is None:
            raise PreconditionError("this server has no store: start it with --store URL")
        return self.cache.tier

    # --- users' snapshots -------------------------------------------------------------------------

    def save(self, conversation: Conversation, name: str, progress: Progress) -> Manifest:
        """Write what the store lacks, then the manifest.

        Raises PreconditionError if somebody else writes the same name meanwhile, DataLossError if nobody has a
        chunk any more.
        """
        path, store = manifest_path(name), self._tier.store
        version: str | None = None
        with contextlib.suppress(NotFoundError):
            version = store.get_versioned(path)[1]
        return self._save(conversation, name, progress, lambda data: store.put_if(path, data, version), whole=True)

    def manifest(self, name: str) -> Manifest:
        """The manifest of a snapshot that can be restored here.

        Raises NotFoundError, DataLossError, and PreconditionError, which names what does not fit.
        """
        manifest = decode_manifest(self._get(manifest_path(name), name), name)
        check_compatible(manifest, self.origin)
        return manifest

    def _get(self, path: str, name: str) -> memoryview:
        try:
            return self._tier.store.get(path)
        except NotFoundError:
            raise NotFoundError(f"there is no snapshot {name}; numoe slots snapshots lists those there are") from None

    def infos(self) -> tuple[SnapshotInfo, ...]:
        """All snapshots of the store, of other models too, ordered by name."""
        return tuple(self._info(entry) for entry in self._tier.store.list(SNAPSHOTS))

    def remove(self, name: str) -> None:
        """Remove a snapshot; its chunks stay as long as there is room for them."""
        path = manifest_path(name)
        self._get(path, name)
        self._tier.store.delete(path)

    def pinned_keys(self) -> set[bytes]:
        """Chunks that snapshots need, those of other models too; raises if any snapshot cannot be read."""
        try:
            return {key for chain in self._manifests.chains(SNAPSHOTS, DataLossError) for key in chain.keys}
        except UnsupportedError as error:
            raise ResourceError(f"no room can be made in the store: {error}") from error

    def chains(self) -> list[Chain]:
        """What is known of the order in which chunks were used: that of all conversations in the store."""
        return [
            chain
            for folder in (SNAPSHOTS, RESUMABLE)
            for chain in self._manifests.chains(folder, DataLossError, UnsupportedError)
        ]

    # --- conversations without a slot -------------------------------------------------------------

    def park(self, parked: Parked) -> None:
        """Write a conversation under its name, so that it comes back; then remove what it went on from."""
        conversation, store = parked.conversation, self._tier.store
        replaced = tuple(name for name in conversation.stored if name != parked.name)
        path = manifest_path(parked.name, self._resumable)
        there, version = self._there(path, parked.name)
        now = (conversation.computed, conversation.named, conversation.snapshot)
        if there is None or (there.computed, there.named, there.snapshot) != now:
            self._save(
                conversation, parked.name, Progress(), lambda data: store.put_if(path, data, version),
                slot=parked.slot, replaces=replaced, created=conversation.last_used,
            )  # fmt: skip
            self._forget_old()
        for name in replaced:
            self.unpark(name)

    def _there(self, path: str, name: str) -> tuple[Manifest | None, str | None]:
        """A parked conversation's manifest, None for a damaged one, and its version, None if there is none."""
        try:
            data, version = self._tier.store.get_versioned(path)
        except NotFoundError:
            return None, None
        try:
            return decode_manifest(data, name), version
        except (DataLossError, UnsupportedError):
            return None, version

    def unpark(self, name: str) -> None:
        """Remove a conversation that is not to come back."""
        self._tier.store.delete(manifest_path(name, self._resumable))

    def resumable(self) -> list[Parked]:
        """Conversations of this model that are to come back, the last one first."""
        manifests = [
            manifest
            for manifest in self._manifests.read(self._resumable, DataLossError, UnsupportedError)
            if manifest.origin == self.origin
        ]
        replaced = {name for manifest in manifests for name in manifest.replaces}
        found = [_parked(manifest) for manifest in manifests if manifest.name not in replaced]
        return sorted(found, key=lambda parked: -parked.conversation.last_used)

    @property
    def _resumable(self) -> str:
        return resumable_folder(self.origin)

    # --- inside -----------------------------------------------------------------------------------

    def _save(
        self, conversation: Conversation, name: str, progress: Progress, commit: Callable[[bytes], object],
        *, whole: bool = False, slot: int | None = None, replaces: tuple[str, ...] = (), created: float = 0.0,
    ) -> Manifest:  # fmt: skip
        """Write chunks, then the manifest; of what nobody has any more, the beginning unless the `whole` is wanted."""
        shape = self.cache.pages.shape
        sizes = [shape(len(conversation.chunk(n))).object_bytes for n in range(len(conversation.all_keys))]
        progress.begin(sizes)
        keys = conversation.all_keys
        self.cache.use(keys)
        self._write_chunks(keys, sizes, progress)
        with self._tier.claims.needing(keys, progress.check):
            # Only now nobody removes them any more: what is gone since is written again.
            lost = self._write_chunks(keys, sizes, progress, again=True)
            if lost is not None and whole:
                raise DataLossError(
                    f"chunk {keys[lost].hex()} of the conversation is not in the cache any more, and nothing was "
                    "saved: continue the conversation, which computes it again, then save it"
                )
            if lost is not None:  # what follows is computed again after a restore
                conversation = shortened(conversation, lost * PAGE_TOKENS)
            manifest = Manifest.of(
                name, self.origin, conversation.tokens, computed=conversation.computed, salt=conversation.salt,
                sampling=conversation.sampling, chunk_bytes=sum(sizes[:lost]),
                created=created or time.time(), prompt_tokens=conversation.prompt_tokens, slot=slot,
                named=conversation.named, snapshot=conversation.snapshot, replaces=replaces,
            )  # fmt: skip
            progress.check()
            commit(encode_manifest(manifest))
        self.cache.use(keys)
        return manifest

    def _write_chunks(
        self, keys: Sequence[bytes], sizes: Sequence[int], progress: Progress, *, again: bool = False
    ) -> int | None:
        """Write what is missing; the number of the first chunk that nobody has any more, None if there is none."""

        def write(key: bytes, nbytes: int) -> bool:
            progress.check()
            written = self.cache.store_now(key, nbytes)
            if written is not None and not again:
                progress.add(nbytes, written)
            return written is not None

        there = list(self.cache.writers.map(write, keys, sizes))
        return next((number for number, good in enumerate(there) if not good), None)

    def _info(self, entry: Entry) -> SnapshotInfo:
        name = entry.key.rsplit("/", 1)[-1]
        try:
            manifest = decode_manifest(self._tier.store.get(entry.key), name)
        except NumoeError as error:
            return SnapshotInfo(name=name, tokens=0, computed=0, bytes=0, created=entry.modified, mismatch=str(error))
        mismatch = ""
        try:
            check_compatible(manifest, self.origin)
        except PreconditionError as error:
            mismatch = str(error)
        return SnapshotInfo(
            name=name, tokens=len(manifest.token_ids), computed=manifest.computed, bytes=manifest.chunk_bytes,
            created=manifest.created, mismatch=mismatch,
        )  # fmt: skip

    def _forget_old(self) -> None:
        entries = sorted(self._tier.store.list(self._resumable), key=lambda entry: entry.modified)
        for entry in entries[: max(0, len(entries) - MAX_RESUMABLE)]:
            self._tier.store.delete(entry.key)


def conversation_of(manifest: Manifest, **rest: Any) -> Conversation:
    """What a manifest describes; rest: of the conversation."""
    origin = manifest.origin
    keys = ChunkKeys(root_key(origin.fingerprint, origin.kv_type, manifest.salt))
    return Conversation.of(
        keys, manifest.token_ids.tolist(), manifest.computed, salt=manifest.salt, sampling=manifest.sampling,
        prompt_tokens=manifest.prompt_tokens, last_used=manifest.created, **rest,
    )  # fmt: skip


def _parked(manifest: Manifest) -> Parked:
    stored = (manifest.name, *manifest.replaces)
    conversation = conversation_of(manifest, stored=stored, named=manifest.named, snapshot=manifest.snapshot)
    return Parked(conversation, slot=manifest.slot)


def shortened(conversation: Conversation, computed: int, said: int | None = None) -> Conversation:
    """The first `said` tokens of a conversation (None: all), `computed` of them with keys and values."""
    return Conversation.of(
        ChunkKeys(conversation.root), conversation.tokens[:said].tolist(), computed, salt=conversation.salt,
        sampling=conversation.sampling, prompt_tokens=conversation.prompt_tokens, snapshot=conversation.snapshot,
        last_used=conversation.last_used, named=conversation.named,
    )  # fmt: skip
