"""What the KV pages hold, written where it outlives the worker, as they do: a successor goes on from both.

A slot that runs a request has a row of the page tables, the number of tokens that are computed, and a digest of the
request's id; beside that each slot has its conversation. A page has its tokens, and if it was published, its key and
how many tokens it was then. A worker may be killed between any two words that it writes: counts come after what they
count, and are taken back before that changes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from numoe.engine.errors import ResourceError, UnavailableError
from numoe.engine.kv.pages import PAGE_TOKENS, pages_for
from numoe.engine.shm import SharedSegment

logger = logging.getLogger(__name__)
_IDENTITY_BYTES = 16
_DIGEST_BYTES = 16
_KEY_BYTES = 32
_CONVERSATION_BYTES = 8192  # beside the tokens


@dataclass(frozen=True)
class KeptRun:
    """A request that ran when the worker died: its slot, and the pages that hold its first `computed` tokens."""

    slot: int
    computed: int
    pages: tuple[int, ...]


class PageJournal:
    """The journal of `n_pages` pages and of `slots` slots with room for `context` tokens each; not thread-safe.

    Empty to begin with, in memory of the process: see `open` for one that outlives it.
    """

    def __init__(self, n_pages: int, slots: int, context: int, memory: npt.NDArray[np.uint8] | None = None) -> None:
        layout = journal_layout(n_pages, slots, context)
        fields = np.zeros((), layout) if memory is None else memory[: layout.itemsize].view(layout)[0]
        self.page_tables: npt.NDArray[np.int32] = fields["page_tables"]
        self._identity, self._computed, self._requests = fields["identity"], fields["computed"], fields["requests"]
        self._tokens, self._keys = fields["tokens"], fields["keys"]
        self._published, self._foreign = fields["published"], fields["foreign"]
        self._lengths, self._conversations = fields["lengths"], fields["conversations"]
        self._owners: list[str | None] = [None] * slots

    @classmethod
    def open(cls, path: Path, identity: bytes, n_pages: int, slots: int, context: int) -> Self:
        """The journal at `path` of the pages in the memory `identity`; an empty one where that is of other memory.

        Where shared memory has no room for it the log says so, and it does not outlive the process.
        """
        nbytes = journal_layout(n_pages, slots, context).itemsize
        try:
            memory = SharedSegment.attach(path, nbytes).array
        except UnavailableError:  # none, or one whose maker died before it was whole
            path.unlink(missing_ok=True)
            try:
                memory = SharedSegment.create(path, nbytes).array
            except ResourceError as error:
                logger.warning("keys and values will not outlive the attention worker: %s", error)
                return cls(n_pages, slots, context)
        journal = cls(n_pages, slots, context, memory)
        if journal._identity.tobytes() != identity:
            journal._identity[:] = 0
            memory[_IDENTITY_BYTES:] = 0
            journal._identity[:] = np.frombuffer(identity, np.uint8)
        return journal

    # --- slots ------------------------------------------------------------------------------------

    def note(
        self, slot: int, request_id: str, tokens: Sequence[int], pages: Sequence[int], start: int, end: int
    ) -> None:  # fmt: skip
        """Tokens `start` to `end` of a request in a slot are computed now, and lie in its pages."""
        is_new = self._owners[slot] != request_id
        if is_new:
            start = 0  # others may have written what lies in front
        for number in range(start // PAGE_TOKENS, pages_for(end)):
            page = number * PAGE_TOKENS
            first, last = max(start, page), min(end, page + PAGE_TOKENS)
            self._tokens[pages[number], first - page : last - page] = tokens[first:last]
        if is_new:
            self.clear(slot)
            self._owners[slot] = request_id
            self._requests[slot] = np.frombuffer(digest_of(request_id), np.uint8)
        self._computed[slot] = end

    def clear(self, slot: int) -> None:
        """Nothing runs in a slot, or what does has nothing computed."""
        self._computed[slot] = 0
        self._owners[slot] = None

    def runs(self) -> dict[bytes, KeptRun]:
        """What ran when the worker before died, by the digest of the request's id."""
        found: dict[bytes, KeptRun] = {}
        for slot in np.flatnonzero(self._computed).tolist():
            computed = int(self._computed[slot])
            pages = tuple(self.page_tables[slot, : pages_for(computed)].tolist())
            found[self._requests[slot].tobytes()] = KeptRun(slot, computed, pages)
        return found

    @property
    def is_empty(self) -> bool:
        """Whether it tells of no request and no conversation."""
        return not self._computed.any() and not self._lengths.any()

    def agrees(self, run: KeptRun, tokens: Sequence[int]) -> bool:
        """Whether the pages hold these tokens, as far as there are as many."""
        held = self._tokens[list(run.pages)].reshape(-1)[: min(run.computed, len(tokens))]
        return bool(np.array_equal(held, np.array(tokens[: len(held)], np.int32)))

    # --- published pages ---------------------------------------------------------------------------

    def publish(self, page: int, key: bytes, tokens: int, *, foreign: bool) -> None:
        """A page with so many tokens can be found under a key."""
        self._keys[page] = np.frombuffer(key, np.uint8)
        self._foreign[page] = foreign
        self._published[page] = tokens

    def unpublish(self, page: int) -> None:
        """It cannot any more."""
        self._published[page] = 0

    def published(self) -> Iterator[tuple[int, bytes, int, bool]]:
        """Page, key, tokens, and whether it is foreign, of each that can be found."""
        for page in np.flatnonzero(self._published).tolist():
            yield page, self._keys[page].tobytes(), int(self._published[page]), bool(self._foreign[page])

    # --- conversations ------------------------------------------------------------------------------

    def hold(self, slot: int, conversation: bytes) -> None:
        """A slot holds a conversation now, or none, b""; one that takes more room than any should is left out."""
        self._lengths[slot] = 0
        if len(conversation) <= self._conversations.shape[1]:
            self._conversations[slot, : len(conversation)] = np.frombuffer(conversation, np.uint8)
            self._lengths[slot] = len(conversation)

    def conversations(self) -> Iterator[tuple[int, bytes]]:
        """Slot and conversation of each slot that has one."""
        for slot in np.flatnonzero(self._lengths).tolist():
            yield slot, self._conversations[slot, : self._lengths[slot]].tobytes()


def digest_of(request_id: str) -> bytes:
    """What stands for a request's id in `PageJournal.runs`."""
    return blake3(request_id.encode(errors="surrogatepass")).digest(length=_DIGEST_BYTES)


def journal_layout(n_pages: int, slots: int, context: int) -> np.dtype[np.void]:
    """What lies in a journal's memory."""
    return np.dtype(
        [
            ("identity", np.uint8, _IDENTITY_BYTES),
            ("computed", np.int64, slots),
            ("requests", np.uint8, (slots, _DIGEST_BYTES)),
            ("page_tables", np.int32, (slots, pages_for(context))),
            ("tokens", np.int32, (n_pages, PAGE_TOKENS)),
            ("keys", np.uint8, (n_pages, _KEY_BYTES)),
            ("published", np.int32, n_pages),
            ("foreign", np.bool_, n_pages),
            ("lengths", np.int32, slots),
            ("conversations", np.uint8, (slots, 4 * context + _CONVERSATION_BYTES)),
        ]
    )
