"""What a slot holds between requests: a conversation, and the names of its keys and values."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt

from numoe.engine.kv.pages import PAGE_TOKENS
from numoe.engine.kv.prefix import ChunkKeys
from numoe.engine.requests import SamplingParams
from numoe.engine.store.keys import chunk_key

Ints = npt.NDArray[np.int32]
GREEDY: Final = SamplingParams()
MAX_TAILS: Final = 4096


@dataclass(frozen=True, eq=False, kw_only=True)
class Conversation:
    """Tokens and where their keys and values are; nothing of it changes.

    tokens:  int32, everything that was said. computed: those with keys and values, from the first on.
    keys:    of every full chunk of them; tail: of the rest, or None without one. root: before the first.
    prompt_tokens: how many of the tokens were the last request's prompt.
    snapshot: the one that it was saved to or restored from last; resumable: the name under which the
    store has it since its slot was needed, or the server stopped. named: whether a request or a
    command named its slot. last_used: seconds since 1970.
    """

    tokens: Ints
    computed: int
    root: bytes
    keys: tuple[bytes, ...]
    tail: bytes | None
    salt: bytes = b""
    sampling: SamplingParams = GREEDY
    prompt_tokens: int = 0
    snapshot: str = ""
    resumable: str = ""
    named: bool = False
    last_used: float = 0.0

    @property
    def all_keys(self) -> tuple[bytes, ...]:
        """Of all chunks, the tail last."""
        return self.keys if self.tail is None else (*self.keys, self.tail)

    def chunk(self, number: int) -> Ints:
        """The tokens of a chunk that have keys and values."""
        return self.tokens[number * PAGE_TOKENS : min((number + 1) * PAGE_TOKENS, self.computed)]

    def key_before(self, number: int) -> bytes:
        """The key of the chunk in front of chunk `number`."""
        return self.keys[number - 1] if number else self.root

    @classmethod
    def of(cls, keys: ChunkKeys, tokens: Sequence[int], computed: int, **rest: Any) -> Self:
        """The conversation of a sequence with these chunk keys."""
        chain = keys.of(tokens, computed // PAGE_TOKENS)
        part = tokens[len(chain) * PAGE_TOKENS : computed]
        tail = chunk_key(chain[-1] if chain else keys.root, part) if part else None
        return cls(
            tokens=np.array(tokens, np.int32), computed=computed, root=keys.root, keys=tuple(chain), tail=tail, **rest
        )

    def begins(self, tokens: Sequence[int]) -> bool:
        """Whether `tokens` go on from the whole of what is computed."""
        n = self.computed
        return 0 < n <= len(tokens) and bool(np.array_equal(self.tokens[:n], np.asarray(tokens[:n], np.int32)))


@dataclass(frozen=True, eq=False)
class Parked:
    """A conversation that lost its slot; `pages` hold it, and stay so until it is kept elsewhere."""

    conversation: Conversation
    pages: tuple[int, ...]


class TailIndex:
    """The last, partial chunks of conversations, by the key of the chunk in front; the oldest are forgotten."""

    def __init__(self) -> None:
        self._tails: OrderedDict[tuple[bytes, bytes], Ints] = OrderedDict()
        self._after: dict[bytes, dict[bytes, None]] = {}

    def add(self, conversation: Conversation) -> None:
        """Let the conversation's tail be found."""
        if conversation.tail is None:
            return
        number = len(conversation.keys)
        name = (conversation.key_before(number), conversation.tail)
        self._tails[name] = conversation.chunk(number).copy()
        self._tails.move_to_end(name)
        self._after.setdefault(name[0], {})[name[1]] = None
        while len(self._tails) > MAX_TAILS:
            self._drop(*next(iter(self._tails)))

    def remove(self, conversation: Conversation) -> None:
        """Forget the conversation's tail."""
        if conversation.tail is None:
            return
        before = conversation.key_before(len(conversation.keys))
        if (before, conversation.tail) in self._tails:
            self._drop(before, conversation.tail)

    def after(self, key: bytes) -> Iterator[tuple[bytes, Ints]]:
        """Keys and tokens of the tails that follow the chunk `key`."""
        for tail in self._after.get(key, ()):
            yield tail, self._tails[key, tail]

    def _drop(self, before: bytes, key: bytes) -> None:
        del self._tails[before, key], self._after[before][key]
        if not self._after[before]:
            del self._after[before]
