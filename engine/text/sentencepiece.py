"""SentencePiece's BPE: neighbours merge in the order of the scores of what they make.

Kudo and Richardson 2018, "SentencePiece"; merging as in Kudo's bpe_model.cc, ties to the left,
characters without a token spelled in bytes <0x00> to <0xFF>. The `tokenizers` library cannot do it
exactly: it merges only characters that are tokens themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from heapq import heapify, heappop, heappush
from itertools import pairwise

from numoe.engine.errors import ModelFileError
from numoe.engine.text.vocabulary import PREFIX, Vocabulary

SPACE = "▁"
CACHED_STRETCHES = 32_768
CACHED_LENGTH = 64


class SentencePiece:
    """Text without special tokens to ids, and the bytes of an ordinary token."""

    def __init__(self, vocabulary: Vocabulary, ids: Mapping[str, int]) -> None:
        self._ids = ids
        self._scores = vocabulary.scores
        self._longest = max(map(len, vocabulary.tokens))
        self._bytes = _byte_ids(vocabulary, ids)
        # Two characters that no token has side by side can never merge: text is cut between them,
        # and the stretches, words mostly, are remembered.
        self._joints = {pair for token in vocabulary.tokens for pair in pairwise(token)}
        self._encode_short = lru_cache(CACHED_STRETCHES)(self._encode_stretch)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, with no space put before it."""
        text = text.replace(" ", SPACE)
        joints = self._joints
        cuts = [i for i, pair in enumerate(pairwise(text), 1) if pair not in joints]
        ids: list[int] = []
        for start, stop in pairwise([0, *cuts, len(text)]):
            stretch = text[start:stop]
            short = stop - start <= CACHED_LENGTH
            ids += self._encode_short(stretch) if short else self._encode_stretch(stretch)
        return ids

    @staticmethod
    def token_bytes(token: str) -> bytes:
        """The bytes of an ordinary token."""
        return token.replace(SPACE, " ").encode()

    def _encode_stretch(self, text: str) -> tuple[int, ...]:
        ids: list[int] = []
        for piece in self._merge(text):
            id_ = self._ids.get(piece)
            if id_ is None:
                ids += [self._bytes[byte] for byte in piece.encode()]
            else:
                ids.append(id_)
        return tuple(ids)

    def _merge(self, text: str) -> list[str]:
        """The pieces left when no two neighbours make a token any more."""
        count = len(text)
        ends = list(range(1, count + 1))  # by where a piece starts; 0 for one that has been merged away
        before = list(range(-1, count - 1))  # where the piece to the left starts

        def candidate(left: int, right: int) -> tuple[float, int, int, int] | None:
            """What merging two neighbours would give: minus its score, and both places."""
            end = ends[right]
            id_ = self._ids.get(text[left:end]) if end - left <= self._longest else None
            return None if id_ is None else (-self._scores[id_], left, right, end)

        queue = [found for i in range(count - 1) if (found := candidate(i, i + 1))]
        heapify(queue)
        while queue:
            _, left, right, end = heappop(queue)
            if ends[left] != right or ends[right] != end:
                continue  # one of the two has merged with another since
            ends[left], ends[right] = end, 0
            if end < count:
                before[end] = left
                if found := candidate(left, end):
                    heappush(queue, found)
            if before[left] >= 0 and (found := candidate(before[left], left)):
                heappush(queue, found)

        pieces: list[str] = []
        start = 0
        while start < count:
            pieces.append(text[start : ends[start]])
            start = ends[start]
        return pieces


def _byte_ids(vocabulary: Vocabulary, ids: Mapping[str, int]) -> list[int]:
    """Id of each byte's token; the unknown token stands for bytes that have none."""
    found = [ids.get(f"<0x{byte:02X}>", vocabulary.unk_id) for byte in range(256)]
    known = [id_ for id_ in found if id_ is not None]
    if len(known) < len(found):
        raise ModelFileError(f"{PREFIX}tokens has neither all byte tokens <0x00> to <0xFF> nor an unknown token")
    return known
