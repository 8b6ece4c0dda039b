"""Fixed-size KV pages: an allocator with reference counts, and a page table per sequence.

Only ids live here; the memory that they name belongs to the attention backend. A full page may be
published under the key of what it holds (`prefix.py`). When nobody holds it any more it stays where it
is, and can be adopted by whoever needs the same, until its memory is needed for something else: but,
where published pages are saved elsewhere, not before that is done.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from numoe.engine.errors import ResourceError

if TYPE_CHECKING:
    from numoe.engine.kv.journal import PageJournal

PAGE_TOKENS = 256
"""Tokens in a page: also the chunk that the prompt cache hashes, so that a full page is a chunk."""


def pages_for(n_tokens: int) -> int:
    """Pages that `n_tokens` tokens occupy."""
    return -(-n_tokens // PAGE_TOKENS)


class PageAllocator:
    """Hands out the page ids 0 … n_pages - 1, counts who holds each, and knows what published ones hold.

    saves: whether somebody saves published pages and says so (`mark_saved`). journal: is told what is published; what
    it says already is published to begin with, and held by nobody.
    Not thread-safe: the scheduler, its one user, runs in the step loop.
    """

    def __init__(self, n_pages: int, *, saves: bool = False, journal: PageJournal | None = None) -> None:
        if n_pages < 1:
            raise ResourceError(f"a KV cache of {n_pages} pages holds nothing; it needs at least one")
        self._references = [0] * n_pages
        self._free = list(range(n_pages - 1, -1, -1))
        self._pages_of: dict[bytes, int] = {}
        self._keys: dict[int, bytes] = {}
        self._idle: dict[int, None] = {}  # published pages that nobody holds, the one let go first in front
        self._partial: dict[bytes, int] = {}  # tokens of published pages that are not full
        self._saves = saves
        self._unsaved: set[int] = set()
        self._foreign: set[int] = set()
        self._read: Counter[int] = Counter()
        self._journal = journal
        if journal is not None:
            for page, key, tokens, foreign in journal.published():
                self._publish(page, key, tokens, foreign=foreign)
                self._idle[page] = None
            self._unsaved.clear()  # whoever wants them saved has to say so again
            self._free = [page for page in self._free if page not in self._idle]

    @property
    def n_pages(self) -> int:
        """All pages, free or not."""
        return len(self._references)

    @property
    def n_free(self) -> int:
        """Pages that nobody holds, published ones included."""
        return len(self._free) + len(self._idle)

    @property
    def n_idle(self) -> int:
        """Published pages that nobody holds."""
        return len(self._idle)

    @property
    def n_busy(self) -> int:
        """Published pages that nobody holds and that cannot be taken yet: they are to be saved, or are read."""
        return len((self._unsaved | self._read.keys()) & self._idle.keys())

    @property
    def n_available(self) -> int:
        """Pages that `allocate` can give."""
        return self.n_free - self.n_busy

    def available_beside(self, keys: Sequence[bytes]) -> int:
        """Pages that `allocate` can give when those published under `keys` are adopted."""
        idle = {page for key in keys if (page := self._pages_of.get(key)) in self._idle}
        return self.n_available - len(idle - self._unsaved - self._read.keys())

    @property
    def n_used(self) -> int:
        """Pages with at least one holder; a shared page counts once."""
        return self.n_pages - self.n_free

    def references(self, page: int) -> int:
        """How many hold `page`; 0 when it is free."""
        return self._references[page]

    def allocate(self, count: int) -> list[int]:
        """Take `count` free pages, each with one reference: all of them or, with ResourceError, none.

        Published pages are taken last, the one first that was let go first; they are forgotten then.
        """
        if count > self.n_available:
            raise ResourceError(
                f"the KV cache has {self.n_available} of {self.n_pages} pages free and {count} are needed: "
                "wait for a request to end, or give the cache more memory"
            )
        pages = [self._free.pop() if self._free else self._evict() for _ in range(count)]
        for page in pages:
            self._references[page] = 1
        return pages

    def _evict(self) -> int:
        page = next(page for page in self._idle if page not in self._unsaved and page not in self._read)
        del self._idle[page]
        self._unpublish(page)
        return page

    def _unpublish(self, page: int) -> None:
        if (key := self._keys.pop(page, None)) is not None:
            if self._journal is not None:
                self._journal.unpublish(page)
            del self._pages_of[key]
            self._partial.pop(key, None)
            self._foreign.discard(page)

    def share(self, pages: Iterable[int]) -> None:
        """Add a reference to each of `pages`, which somebody holds already."""
        pages = list(pages)
        self._require_held(pages, times=1)
        for page in pages:
            self._references[page] += 1

    def publish(self, page: int, key: bytes, tokens: int = PAGE_TOKENS, *, foreign: bool = False) -> None:
        """Let a held page, to which nothing is added any more, be found under `key`.

        tokens: that it holds. foreign: see `is_foreign`. Where another page has that key, this one stays unknown.
        """
        self._require_held([page], times=1)
        if key not in self._pages_of and page not in self._keys:
            self._publish(page, key, tokens, foreign=foreign)
            if self._journal is not None:
                self._journal.publish(page, key, tokens, foreign=foreign)

    def _publish(self, page: int, key: bytes, tokens: int, *, foreign: bool) -> None:
        self._pages_of[key], self._keys[page] = page, key
        if tokens < PAGE_TOKENS:
            self._partial[key] = tokens
        if foreign:
            self._foreign.add(page)
        if self._saves:
            self._unsaved.add(page)

    def withdraw(self, page: int) -> bool:
        """Let a published page not be found any more, so that its one holder can add to it.

        False, and no change, if others hold it too, it is to be saved, or it is read.
        """
        self._require_held([page], times=1)
        if self._references[page] > 1 or page in self._unsaved or page in self._read:
            return False
        self._unpublish(page)
        return True

    def is_foreign(self, key: bytes) -> bool:
        """Whether what is published under `key` was computed where sums are rounded otherwise than here."""
        return self._pages_of.get(key) in self._foreign

    def is_foreign_page(self, page: int) -> bool:
        """The same of a page, as far as it is published."""
        return page in self._foreign

    def tokens_of(self, key: bytes) -> int:
        """Tokens in the page that is published under `key`."""
        return self._partial.get(key, PAGE_TOKENS)

    def mark_saved(self, key: bytes) -> None:
        """Note that what is published under `key` need not be kept here."""
        if (page := self._pages_of.get(key)) is not None:
            self._unsaved.discard(page)

    def unsaved_keys(self) -> list[bytes]:
        """The keys of pages that nobody holds and that wait to be saved."""
        return [self._keys[page] for page in self._idle if page in self._unsaved]

    def begin_read(self, key: bytes) -> int | None:
        """The page published under `key`; it stays so until `end_read`, and does not count as used for that."""
        if (page := self._pages_of.get(key)) is not None:
            self._read[page] += 1
        return page

    def end_read(self, pages: Iterable[int]) -> None:
        """Let others have pages that were read."""
        self._read.subtract(pages)
        self._read = +self._read

    def __contains__(self, key: bytes) -> bool:
        return key in self._pages_of

    def take(self, pages: Iterable[int]) -> None:
        """Hold these very pages, whoever else holds them: the journal says that a worker before did."""
        taken = Counter(pages)
        self._free = [page for page in self._free if page not in taken]
        for page, times in taken.items():
            self._idle.pop(page, None)
            self._references[page] += times

    def adopt(self, keys: Sequence[bytes]) -> list[int]:
        """The pages of as many of `keys` as are known, from the first on, each with one reference more."""
        pages = []
        for key in keys:
            if (page := self._pages_of.get(key)) is None:
                break
            self._idle.pop(page, None)
            self._references[page] += 1
            pages.append(page)
        return pages

    def free(self, pages: Iterable[int]) -> None:
        """Drop a reference of each of `pages`; a page without references can be allocated again.

        Of published pages, the last one is let go first: a prefix is of use without what follows it.
        """
        pages = list(pages)
        for page, times in Counter(pages).items():
            self._require_held([page], times)
        for page in reversed(pages):
            self._references[page] -= 1
            if self._references[page] == 0:
                if page in self._keys:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    def check_integrity(self) -> None:
        """Raise RuntimeError unless every page is either free once or held, and published ones are found."""
        unheld = [*self._free, *self._idle]
        if not self._unsaved | self._read.keys() <= self._keys.keys():
            raise RuntimeError("a KV page that is not published waits to be saved, or is read")
        if len(set(unheld)) != len(unheld):
            raise RuntimeError("a KV page is on the free list twice")
        published = {page: key for key, page in self._pages_of.items()}
        if published != self._keys or not self._idle.keys() <= self._keys.keys():
            raise RuntimeError("published KV pages and their keys disagree")
        for page in unheld:
            if self._references[page] != 0:
                raise RuntimeError(f"KV page {page} is free and has {self._references[page]} references")
        held = sum(count > 0 for count in self._references)
        if held + self.n_free != self.n_pages:
            raise RuntimeError(f"{held} KV pages held and {self.n_free} free do not make {self.n_pages}")

    def _require_held(self, pages: list[int], times: int) -> None:
        for page in pages:
            if not 0 <= page < self.n_pages or self._references[page] < times:
                raise RuntimeError(f"KV page {page} is not held by {times}; it cannot be shared or freed")


class PageTable:
    """The pages of one sequence, in order: token `t` lies in `pages[t // PAGE_TOKENS]`."""

    def __init__(self, allocator: PageAllocator) -> None:
        self.pages: list[int] = []
        self._allocator = allocator

    @property
    def capacity(self) -> int:
        """Tokens that the pages have room for."""
        return len(self.pages) * PAGE_TOKENS

    def missing(self, n_tokens: int) -> int:
        """Pages still to be allocated before `n_tokens` tokens fit."""
        return max(0, pages_for(n_tokens) - len(self.pages))

    def ensure(self, n_tokens: int) -> None:
        """Make room for `n_tokens` tokens in all; ResourceError, and no change, if the pages run out."""
        self.pages += self._allocator.allocate(self.missing(n_tokens))

    def adopt(self, keys: Sequence[bytes]) -> int:
        """Begin an empty table with the published pages of `keys`; the tokens in them."""
        if self.pages:
            raise RuntimeError("a page table that has pages cannot adopt others")
        self.pages = self._allocator.adopt(keys)
        return self.capacity

    def append(self, page: int) -> None:
        """Go on with a page that is held, which gets one reference more."""
        self._allocator.share([page])
        self.pages.append(page)

    def publish(self, number: int, key: bytes, tokens: int = PAGE_TOKENS, *, foreign: bool = False) -> None:
        """Let page number `number` be found under `key`, as `PageAllocator.publish`."""
        self._allocator.publish(self.pages[number], key, tokens, foreign=foreign)

    def release(self) -> None:
        """Give all pages back; the table is empty afterwards."""
        self._allocator.free(self.pages)
        self.pages = []
