"""What a slot holds between requests: a conversation, and the names of its keys and values."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final, Generic, Self, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt
from blake3 import blake3

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
    snapshot: the one that it was saved to or restored from last. stored: the names (`Parked.name`) under
    which the store has it, or what it went on from. named: whether a request or a command named its
    slot. last_used: seconds since 1970.
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
    stored: tuple[str, ...] = ()
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

    def encode(self) -> bytes:
        """All of it, for `decode`."""
        rest = {name: getattr(self, name) for name in _Encoded.__struct_fields__ if name != "tokens"}
        return msgspec.msgpack.encode(_Encoded(tokens=self.tokens.astype("<i4").tobytes(), **rest))

    @classmethod
    def decode(cls, encoded: bytes) -> Self:
        """What was encoded. Raises msgspec.DecodeError."""
        found = msgspec.structs.asdict(msgspec.msgpack.decode(encoded, type=_Encoded))
        tokens, computed = np.frombuffer(found.pop("tokens"), "<i4").tolist(), found.pop("computed")
        return cls.of(ChunkKeys(found.pop("root")), tokens, computed, **found)

    @cached_property
    def name(self) -> str:
        """The same for the same tokens, model, KV type and salt, and for no others."""
        return blake3(self.root + self.tokens.tobytes()).hexdigest(length=16)

    def begins(self, tokens: Sequence[int] | Ints) -> bool:
        """Whether `tokens` go on from the whole of what is computed."""
        n = self.computed
        return 0 < n <= len(tokens) and bool(np.array_equal(self.tokens[:n], np.asarray(tokens[:n], np.int32)))


class _Encoded(msgspec.Struct, frozen=True, kw_only=True):
    """A conversation without what follows from the rest."""

    tokens: bytes
    computed: int
    root: bytes
    salt: bytes
    sampling: SamplingParams
    prompt_tokens: int
    snapshot: str
    stored: tuple[str, ...]
    named: bool
    last_used: float


@dataclass(frozen=True, eq=False)
class Parked:
    """A conversation that lost its slot, or whose server stops while it is in `slot`.

    pages: those that hold its chunks, by key; they stay so until it is kept elsewhere.
    """

    conversation: Conversation
    pages: Mapping[bytes, int] = field(default_factory=dict)
    slot: int | None = None

    @property
    def name(self) -> str:
        """Under which the store keeps it: forks are alike, but each has its slot."""
        return self.conversation.name if self.slot is None else f"{self.conversation.name}-{self.slot}"


Name = TypeVar("Name")


class _ChunkIndex(Generic[Name]):
    """The tokens of chunks, each by the key of the chunk in front and a name; the oldest are forgotten."""

    def __init__(self) -> None:
        self._chunks: OrderedDict[tuple[bytes, Name], Ints] = OrderedDict()
        self._after: dict[bytes, dict[Name, None]] = {}

    def put(self, before: bytes, name: Name, tokens: Ints) -> None:
        self._chunks[before, name] = tokens.copy()
        self._chunks.move_to_end((before, name))
        self._after.setdefault(before, {})[name] = None
        while len(self._chunks) > MAX_TAILS:
            self.drop(*next(iter(self._chunks)))

    def after(self, before: bytes) -> Iterator[tuple[Name, Ints]]:
        for name in self._after.get(before, ()):
            yield name, self._chunks[before, name]

    def drop(self, before: bytes, name: Name) -> None:
        if self._chunks.pop((before, name), None) is not None:
            del self._after[before][name]
            if not self._after[before]:
                del self._after[before]


class TailIndex:
    """The last, partial chunks of conversations, by the key of the chunk in front; the oldest are forgotten."""

    def __init__(self) -> None:
        self._index = _ChunkIndex[bytes]()

    def add(self, conversation: Conversation) -> None:
        """Let the conversation's tail be found."""
        if conversation.tail is not None:
            number = len(conversation.keys)
            self._index.put(conversation.key_before(number), conversation.tail, conversation.chunk(number))

    def remove(self, conversation: Conversation) -> None:
        """Forget the conversation's tail."""
        if conversation.tail is not None:
            self._index.drop(conversation.key_before(len(conversation.keys)), conversation.tail)

    def after(self, key: bytes) -> Iterator[tuple[bytes, Ints]]:
        """Keys and tokens of the tails that follow the chunk `key`."""
        return self._index.after(key)


class ParkedIndex:
    """Conversations that the store has and no slot; who goes on from one takes its name. The oldest are forgotten."""

    def __init__(self) -> None:
        self._index = _ChunkIndex[str]()  # of their last chunks

    def add(self, conversation: Conversation, name: str) -> None:
        """Note under which name (`Parked.name`) the store has a conversation."""
        if conversation.computed:
            last = len(conversation.all_keys) - 1
            self._index.put(conversation.key_before(last), name, conversation.chunk(last))

    def take(self, conversation: Conversation) -> tuple[str, ...]:
        """The names of those that a conversation is, or goes on from; they are not noted any more."""
        taken = []
        for number in range(len(conversation.all_keys)):
            before, chunk = conversation.key_before(number), conversation.chunk(number)
            for name, tokens in list(self._index.after(before)):
                if np.array_equal(tokens, chunk[: len(tokens)]):
                    self._index.drop(before, name)
                    taken.append(name)
        return tuple(taken)
