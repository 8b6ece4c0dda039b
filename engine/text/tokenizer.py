"""Text to token ids and back, as the GGUF file's vocabulary says and as llama.cpp does it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from numoe.engine.errors import InputError, ModelFileError
from numoe.engine.text.bpe import ByteLevelBPE
from numoe.engine.text.pretokenizers import pre_tokenizer
from numoe.engine.text.sentencepiece import SentencePiece
from numoe.engine.text.special import SpecialTokens, split_special
from numoe.engine.text.vocabulary import PREFIX, SENTENCEPIECE, TokenKind, Vocabulary

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Tokenizer:
    """A file's tokenizer; immutable, and safe to use from several threads."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        ids = {text: id_ for id_, text in enumerate(vocabulary.tokens)}
        if len(ids) < len(vocabulary.tokens):
            raise ModelFileError(f"{PREFIX}tokens has the same text more than once")
        self._special = SpecialTokens.of(vocabulary, ids)
        self._model: ByteLevelBPE | SentencePiece
        if vocabulary.model == SENTENCEPIECE:
            self._model = SentencePiece(vocabulary, ids)
            add_bos = True
        else:
            pre = pre_tokenizer(vocabulary.pre)
            self._model = ByteLevelBPE(vocabulary, ids, pre)
            add_bos = pre.add_bos
        self._before = _affix("bos", vocabulary.bos_id, wanted=vocabulary.add_bos, default=add_bos)
        self._after = _affix("eos", vocabulary.eos_id, wanted=vocabulary.add_eos, default=False)

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """Build it from GGUF metadata (key to Python value).

        Raises UnsupportedError for a tokenizer model or pre-tokenizer that numoe does not have, and
        ModelFileError naming the key for metadata that is missing, malformed or contradictory.
        """
        return cls(Vocabulary.from_metadata(metadata))

    @property
    def vocab_size(self) -> int:
        """Number of tokens; ids are 0 to one less."""
        return len(self._vocabulary.tokens)

    @property
    def bos_id(self) -> int | None:
        """Id of the token that begins a text, None if the file has none."""
        return self._vocabulary.bos_id

    @property
    def eos_id(self) -> int | None:
        """Id of the token that ends a text, None if the file has none."""
        return self._vocabulary.eos_id

    @property
    def eog_ids(self) -> frozenset[int]:
        """Ids that end a generation: EOS, end of turn, and others known by name."""
        return self._special.end_of_generation

    @property
    def adds_space_prefix(self) -> bool:
        """Whether `encode` puts a space before text, which `decode` takes off again."""
        return self._vocabulary.add_space_prefix

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """Token ids of `text`.

        add_special:   put BOS before and EOS after it, if the file wants them.
        parse_special: control tokens written in `text` become those tokens; without it they are
                       plain text (user-defined tokens are recognised either way).

        Raises InputError if `text` holds half of a surrogate pair, which UTF-8 cannot spell.
        """
        _check_encodable(text)
        ids = list(self._before) if add_special else []
        prefix = " " if self.adds_space_prefix else ""
        after_special = True
        for part in split_special(text, self._special, parse_hidden=parse_special):
            if isinstance(part, int):
                ids.append(part)
                after_special = True
            else:
                ids += self._model.encode(prefix + part if after_special else part)
                after_special = False
        return ids + list(self._after) if add_special else ids

    def encode_chat(self, rendered: str) -> list[int]:
        """Token ids of a rendered chat template, ready to be continued.

        Templates write special tokens as text, often BOS among them. The result begins with BOS if
        the file wants one, and never with one more than the template wrote; no EOS is added.
        """
        ids = self.encode(rendered, add_special=False)
        if self._before and ids[:1] != list(self._before):
            return [*self._before, *ids]
        return ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = False, continuation: bool = False) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD.

        skip_special: leave out control and unknown tokens.
        continuation: the ids go on after other text, so a leading space is part of them. Without it
                      the space that a SentencePiece vocabulary puts before a text is taken off.

        Raises InputError if an id is outside the vocabulary.
        """
        skipped = self._special.hidden if skip_special else frozenset()
        pieces = [self.token_bytes(id_) for id_ in ids if id_ not in skipped]
        data = b"".join(pieces)
        if self.adds_space_prefix and not continuation:
            data = data.removeprefix(b" ")
        return data.decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """Raw bytes of one token, which may be part of a character; special tokens give their text.

        Unused tokens have none. Raises InputError if the id is outside the vocabulary.
        """
        if not 0 <= token_id < self.vocab_size:
            raise InputError(f"token id {token_id} is outside the vocabulary of {self.vocab_size}")
        token, kind = self._vocabulary.tokens[token_id], self._vocabulary.kinds[token_id]
        if token_id in self._special.hidden or kind == TokenKind.USER_DEFINED:
            return token.encode()
        if kind == TokenKind.BYTE and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes.fromhex(match[1])
        return self._model.token_bytes(token) if kind == TokenKind.NORMAL else b""

    def is_special(self, token_id: int) -> bool:
        """Whether it is a control or unknown token: not text that a reader should see."""
        return token_id in self._special.hidden


def _affix(name: str, token_id: int | None, *, wanted: bool | None, default: bool) -> tuple[int, ...]:
    """The BOS or EOS to add: none, or one id."""
    if wanted and token_id is None:
        raise ModelFileError(f"{PREFIX}add_{name}_token is set, but {PREFIX}{name}_token_id is missing")
    add = default if wanted is None else wanted
    return (token_id,) if add and token_id is not None else ()


def _check_encodable(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"the text holds half of a surrogate pair at character {error.start}") from None
