"""What users do to slots: save, restore, fork and erase them, beside the steps."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from pathlib import Path
from typing import Final

import numpy as np

from numoe.engine.cache import Snapshots
from numoe.engine.cache.archive import NAME, Archive, open_archive, write_archive
from numoe.engine.cache.cache import Layers
from numoe.engine.cache.snapshots import Progress, StoppedError, conversation_of, shortened
from numoe.engine.errors import BusyError, DataLossError, NotFoundError, NumoeError, PreconditionError, ResourceError
from numoe.engine.kv.pages import PAGE_TOKENS
from numoe.engine.requests import Event, SlotProgress, SlotReport, SnapshotInfo
from numoe.engine.scheduler import Scheduler
from numoe.engine.scheduler.conversation import Conversation
from numoe.engine.scheduler.slots import Operation
from numoe.engine.store.manifest import Manifest, check_name
from numoe.engine.worker.caching import Caching, LostChunkError

logger = logging.getLogger(__name__)
_PROGRESS_S: Final = 0.05  # between two reports
_REMEMBERED: Final = 256  # operations
_PAGES_S: Final = 10.0  # how long to wait for pages that are being saved
_CURE: Final = "what it held is computed again; save the snapshot anew, or remove it"


class SlotOperations:
    """Operations on the slots of a scheduler; each may be called from any thread and blocks it.

    changed: the engine's lock. emit takes the events of progress.
    """

    def __init__(
        self, scheduler: Scheduler, changed: threading.Condition, caching: Caching, emit: Callable[[list[Event]], None]
    ) -> None:
        self._scheduler, self._changed, self._caching, self._emit = scheduler, changed, caching, emit
        self._running: dict[str, Progress] = {}
        self._overtaken: dict[str, None] = {}

    def save(self, operation: str, slot: int, name: str, wait_until: float | None) -> SlotReport:
        """Write a slot's conversation to the store under `name`.

        Raises PreconditionError for a slot that is in use (after `wait_until`, `time.time()`, if given)
        or empty, and whatever `Snapshots.save` raises: then nothing of that name was changed.
        """
        check_name(name)
        snapshots, start = self._snapshots(), time.perf_counter()
        with self._operation(operation) as progress, self._kept(slot, "saving", wait_until, progress):
            conversation = self._conversation(slot)
            manifest = snapshots.save(conversation, name, progress)
            with self._changed:
                self._scheduler.ledger.note_conversation(slot, conversation, snapshot=name, named=True)
        return _report(slot, conversation, name, manifest.computed, progress, start)

    def restore(self, operation: str, slot: int, name: str, wait_until: float | None) -> SlotReport:
        """Give a slot the conversation of a snapshot; any error leaves the slot as it was.

        Raises as `save`, NotFoundError, DataLossError, PreconditionError for a snapshot that does not
        fit, ResourceError if there are too few pages for it.
        """
        check_name(name)
        snapshots, start = self._snapshots(), time.perf_counter()
        with self._operation(operation) as progress, self._kept(slot, "restoring", wait_until, progress):
            manifest = snapshots.manifest(name)
            conversation = dataclasses.replace(
                conversation_of(manifest, snapshot=name), named=True, last_used=time.time()
            )

            def read(key: bytes, tokens: int) -> Layers:
                try:
                    return snapshots.cache.read(key, tokens)
                except NotFoundError:
                    raise DataLossError(f"KV chunk {key.hex()} of snapshot {name} is lost; {_CURE}") from None

            self.bring(slot, conversation, progress, read)
            snapshots.cache.use(conversation.all_keys)
        return _report(slot, conversation, name, conversation.computed, progress, start)

    def erase(self, operation: str, slot: int, wait_until: float | None) -> SlotReport:
        """Forget a slot's conversation; chunks that it shares with the prompt cache stay there."""
        start = time.perf_counter()
        with (
            self._operation(operation) as progress,
            self._kept(slot, "saving", wait_until, progress),
            self._changed,
        ):
            self._scheduler.ledger.forget_conversation(slot)
            self._caching.collect()
        return SlotReport(slot=slot, seconds=time.perf_counter() - start)

    def fork(self, operation: str, slot: int, target: int, wait_until: float | None) -> SlotReport:
        """Let slot `target` hold what `slot` holds; nothing is copied, as both share the chunks."""
        start = time.perf_counter()
        if slot == target:
            raise PreconditionError(f"slot {slot} cannot be forked to itself: name another one")
        with (
            self._operation(operation) as progress,
            self._kept(slot, "saving", wait_until, progress),
            self._kept(target, "restoring", wait_until, progress),
        ):
            conversation = self._conversation(slot)
            copy = dataclasses.replace(conversation, named=True, stored=(), last_used=time.time())
            with self._changed:
                self._scheduler.ledger.replace_conversation(target, copy)
                self._caching.collect()
        return _report(target, conversation, conversation.snapshot, conversation.computed, Progress(), start)

    def cancel(self, operation: str) -> None:
        """End a save or restore that nobody waits for any more; it changes nothing then."""
        with self._changed:
            if (progress := self._running.get(operation)) is not None:
                progress.stopped = True
            else:  # the call may have overtaken the operation's own
                self._overtaken[operation] = None
                while len(self._overtaken) > _REMEMBERED:
                    del self._overtaken[next(iter(self._overtaken))]
            self._changed.notify_all()

    def snapshots(self) -> tuple[SnapshotInfo, ...]:
        """The snapshots of the store."""
        return self._snapshots().infos()

    def remove(self, name: str) -> None:
        """Remove a snapshot; NotFoundError if there is none of that name."""
        self._snapshots().remove(name)

    def bring(
        self, slot: int, conversation: Conversation, progress: Progress, read: Callable[[bytes, int], Layers],
        *, saved: bool = True,
    ) -> None:  # fmt: skip
        """Read a conversation's chunks into spare pages, then give it to a slot that is kept.

        read: the layers of a chunk and the bytes that were moved for it. saved: whether that is the prompt cache.
        """
        self._check_fits(conversation)
        pages = self._caching.pages
        sizes = [pages.shape(len(conversation.chunk(n))).object_bytes for n in range(len(conversation.all_keys))]
        progress.begin(sizes)
        spare, foreign = self._spare_pages(conversation, progress), set[bytes]()

        def fetch(number: int) -> None:
            key, page, published = spare[number]
            tokens, moved = len(conversation.chunk(number)), 0
            try:
                if not published:
                    progress.check()
                    found = read(key, tokens)
                    pages.import_page(page, found.layers, tokens)
                    moved = found.moved
                    if found.foreign:
                        foreign.add(key)
                progress.add(sizes[number], moved)
            except BaseException:
                progress.stopped = True  # the others need not begin
                raise

        try:
            fetches = [self._caching.readers.submit(fetch, number) for number in range(len(spare))]
            wait(fetches)  # all of them: nobody may write to a page that is given back
            failures = [error for error in (f.exception() for f in fetches) if error is not None]
            if failures:  # the reason, rather than that others stopped because of it
                raise next((error for error in failures if not isinstance(error, StoppedError)), failures[0])
            with self._changed:
                ledger = self._scheduler.ledger
                for number, (key, page, published) in enumerate(spare):
                    if not published:
                        tokens = len(conversation.chunk(number))
                        ledger.publish_spare(key, page, tokens, saved=saved, foreign=key in foreign)
                ledger.replace_conversation(slot, conversation)
        finally:
            with self._changed:
                self._scheduler.ledger.give_back([page for _, page, _ in spare])
                self._caching.collect()
                self._changed.notify_all()

    def _spare_pages(self, conversation: Conversation, progress: Progress) -> list[tuple[bytes, int, bool]]:
        """As `Ledger.spare_pages`, when what is in pages that nobody holds is saved."""
        until, ledger, cache = time.monotonic() + _PAGES_S, self._scheduler.ledger, self._caching.cache
        with self._changed:
            while True:
                try:
                    return ledger.spare_pages(conversation.all_keys)
                except ResourceError:
                    if cache is None or not ledger.waits_for_cache or time.monotonic() > until:
                        raise
                cache.save_soon(ledger.unsaved_keys(), first=True)
                self._changed.wait(_PAGES_S / 100)
                progress.check()

    # --- a prompt cache in a file -----------------------------------------------------------------

    def load_file(self, path: Path, slot: int = 0) -> SlotReport | None:
        """Give a slot the conversation in a file; None if there is no such file. Errors as `restore`."""
        start, progress = time.perf_counter(), Progress()
        try:
            with open_archive(path, self._caching.origin) as archive:
                conversation = self._load_archive(archive, slot, progress)
        except FileNotFoundError:
            return None
        return _report(slot, conversation, str(path), conversation.computed, progress, start)

    def _load_archive(self, archive: Archive, slot: int, progress: Progress) -> Conversation:
        def read(key: bytes, tokens: int) -> Layers:
            layers = archive.read(key, self._caching.pages.shape(tokens))
            return Layers(layers, archive.places[key][1], foreign=True)  # for all that the file tells

        conversation = dataclasses.replace(conversation_of(archive.manifest), named=True, last_used=time.time())
        with self._kept(slot, "restoring", None):
            self.bring(slot, conversation, progress, read, saved=False)
        return conversation

    def save_file(self, path: Path, *, all_tokens: bool, slot: int = 0) -> None:
        """Write a slot's conversation, or only its prompt, to a file; an empty slot leaves the file as it is."""
        with self._changed:
            held = self._scheduler.slots.conversations[slot]
        if held is None:
            return
        kept = held
        if not all_tokens and held.prompt_tokens < len(held.tokens):
            kept = shortened(held, min(held.computed, held.prompt_tokens), said=held.prompt_tokens)
        while True:
            manifest = self._file_manifest(kept)
            if self._is_poorer(path, manifest):
                logger.warning("%s stays as it is: it holds more of the conversation than is there now", path)
                return
            try:
                write_archive(path, manifest, self._caching.chunks(kept, held))
            except LostChunkError as lost:  # what is in front of it is of use
                kept = shortened(kept, lost.number * PAGE_TOKENS)
            else:
                return

    def _file_manifest(self, kept: Conversation) -> Manifest:
        shape = self._caching.pages.shape
        return Manifest.of(
            NAME, self._caching.origin, kept.tokens, computed=kept.computed, salt=kept.salt, sampling=kept.sampling,
            chunk_bytes=sum(shape(len(kept.chunk(number))).object_bytes for number in range(len(kept.all_keys))),
            created=time.time(), prompt_tokens=kept.prompt_tokens,
        )  # fmt: skip

    def _is_poorer(self, path: Path, manifest: Manifest) -> bool:
        """Whether a file has the beginning of the same conversation, and more of its keys and values."""
        try:
            with open_archive(path, self._caching.origin) as archive:
                old = archive.manifest
        except (FileNotFoundError, NumoeError):
            return False
        same = old.salt == manifest.salt and np.array_equal(old.token_ids, manifest.token_ids[: len(old.token_ids)])
        return same and old.computed > manifest.computed

    # --- inside -----------------------------------------------------------------------------------

    def _snapshots(self) -> Snapshots:
        snapshots = self._caching.snapshots
        if snapshots is None or snapshots.cache.tier is None:
            raise PreconditionError("this server has no store: start it with --store URL")
        return snapshots

    def _conversation(self, slot: int) -> Conversation:
        with self._changed:
            conversation = self._scheduler.slots.conversations[slot]
        if conversation is None:
            raise PreconditionError(f"slot {slot} is empty: name one that numoe slots list shows with tokens")
        return conversation

    def _check_fits(self, conversation: Conversation) -> None:
        context = self._scheduler.config.context
        if len(conversation.tokens) > context:
            raise PreconditionError(
                f"the conversation has {len(conversation.tokens)} tokens and the context holds {context}: "
                "start the server with a larger --ctx-size"
            )

    @contextlib.contextmanager
    def _operation(self, name: str) -> Iterator[Progress]:
        """The progress of an operation, told as it goes on."""
        last = 0.0

        def report(progress: Progress) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last >= _PROGRESS_S or progress.done_chunks in (0, progress.chunks):
                last = now
                self._emit([
                    SlotProgress(name, progress.done_chunks, progress.chunks, progress.done_bytes, progress.bytes)
                ])

        with self._changed:
            progress = self._running[name] = Progress(report=report)
            progress.stopped = name in self._overtaken
            self._overtaken.pop(name, None)
        try:
            progress.check()
            yield progress
        finally:
            self._running.pop(name, None)

    @contextlib.contextmanager
    def _kept(
        self, slot: int, operation: Operation, wait_until: float | None, progress: Progress | None = None
    ) -> Iterator[None]:
        """Keep a slot from requests and other operations; BusyError if it is in use for too long."""
        with self._changed:
            while True:
                try:
                    self._scheduler.slots.begin(slot, operation)
                    break
                except BusyError:
                    left = 0.0 if wait_until is None else wait_until - time.time()
                    if left <= 0:
                        raise
                    self._changed.wait(left)
                    if progress is not None:
                        progress.check()
        try:
            yield
        finally:
            with self._changed:
                self._scheduler.slots.end(slot)
                self._changed.notify_all()


def _report(
    slot: int, conversation: Conversation, name: str, computed: int, progress: Progress, start: float
) -> SlotReport:
    return SlotReport(
        slot=slot, snapshot=name, tokens=len(conversation.tokens), computed=computed,
        chunks=progress.chunks, bytes=progress.bytes, moved_chunks=progress.moved_chunks,
        moved_bytes=progress.moved_bytes, seconds=time.perf_counter() - start,
    )  # fmt: skip
