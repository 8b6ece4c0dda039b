"""Chunks on their way from the prompt cache into the pages of a sequence."""

from __future__ import annotations

from dataclasses import dataclass

from numoe.engine.errors import NotFoundError


@dataclass(frozen=True)
class Tail:
    """The beginning of a chunk, for a page of its own: the sequence goes on differently behind it.

    key: of the chunk, which holds `chunk_tokens` tokens; `tokens` of them are of use.
    source: the page that holds the chunk now, `page` itself where nothing need be copied, or None if it has to be
    read.
    """

    key: bytes
    chunk_tokens: int
    tokens: int
    source: int | None
    page: int


@dataclass(eq=False)
class Load:
    """What to bring into pages before a sequence runs: full chunks, then a tail.

    before: the chunks in front of them, which are in pages already. own: of the others those that must have been
    computed as here, as the sequence did so before: else they are computed again.
    All pages have a reference of the load's own, so that nobody else gets them while it is under
    way. `cancelled` when the sequence has ended or lost its slot: stop, and report as always.
    """

    before: tuple[bytes, ...]
    keys: tuple[bytes, ...]
    pages: tuple[int, ...]
    tail: Tail | None
    own: frozenset[bytes] = frozenset()
    cancelled: bool = False

    def check_takes(self, key: bytes) -> None:
        """Raise NotFoundError for a chunk from where sums are rounded otherwise if it must not be one."""
        if key in self.own:
            raise NotFoundError("what the prompt cache has was computed where sums are rounded otherwise")

    @property
    def first(self) -> int:
        """The number of the first chunk."""
        return len(self.before)

    @property
    def held(self) -> list[int]:
        """The pages with a reference of the load's own."""
        if self.tail is None:
            return list(self.pages)
        source = [] if self.tail.source is None else [self.tail.source]
        return [*self.pages, self.tail.page, *source]
