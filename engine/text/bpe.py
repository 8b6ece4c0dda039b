"""Byte-level byte-pair encoding, by the `tokenizers` library."""

from __future__ import annotations

from collections.abc import Mapping

from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from numoe.engine.errors import ModelFileError
from numoe.engine.text.bytelevel import BYTE_TO_CHAR, to_bytes
from numoe.engine.text.pretokenizers import PreTokenizer
from numoe.engine.text.vocabulary import Vocabulary


class ByteLevelBPE:
    """Text without special tokens to ids, and the bytes of an ordinary token."""

    def __init__(self, vocabulary: Vocabulary, ids: Mapping[str, int], pre: PreTokenizer) -> None:
        self._count = len(vocabulary.tokens)
        # A byte without a token must still stand between its neighbours while they merge; its id,
        # past the vocabulary's, is dropped afterwards.
        missing = [char for char in BYTE_TO_CHAR.values() if char not in ids]
        self._drops = bool(missing)
        known = dict(ids) | {char: self._count + index for index, char in enumerate(missing)}
        for rank, (left, right) in enumerate(vocabulary.merges):
            if left not in ids or right not in ids or left + right not in ids:
                raise ModelFileError(
                    f"tokenizer.ggml.merges[{rank}] makes or takes a token that is not in the "
                    f"vocabulary: {left[:40]!r} {right[:40]!r}"
                )
        self._tokenizer = Tokenizer(
            models.BPE(vocab=known, merges=list(vocabulary.merges), ignore_merges=pre.ignore_merges)
        )
        splits = [pre_tokenizers.Split(Regex(expression), behavior="isolated") for expression in pre.expressions]
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self._tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; bytes that have no token are left out."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return [id_ for id_ in ids if id_ < self._count] if self._drops else ids

    @staticmethod
    def token_bytes(token: str) -> bytes:
        """The bytes that an ordinary token's spelling stands for."""
        return to_bytes(token)
