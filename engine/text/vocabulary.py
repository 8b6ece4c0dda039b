"""The vocabulary of a GGUF file, read from its metadata and checked.

The keys are those of the GGUF specification, section "Tokenizer". Where the file is silent the
defaults are llama.cpp's, as are the rules in `special.py` that correct known mistakes of files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from numoe.engine.errors import ModelFileError, UnsupportedError

PREFIX = "tokenizer.ggml."
SENTENCEPIECE = "llama"
BYTE_LEVEL = "gpt2"
MODELS = (BYTE_LEVEL, SENTENCEPIECE)


class TokenKind(IntEnum):
    """Values of `tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, repr=False)
class Vocabulary:
    """What the file says, before any tokenizer is built.

    model:     "gpt2" (byte-level BPE) or "llama" (SentencePiece).
    pre:       name of the pre-tokenizer; "" for SentencePiece.
    tokens:    text of each id; all different.
    kinds:     `TokenKind` of each id, or another number for "undefined".
    scores:    of each id, for SentencePiece; else empty.
    merges:    (left, right) by rank, for byte-level BPE; else empty.
    add_bos, add_eos: None where the file does not say.
    add_space_prefix: a space goes before text at the start and after special tokens.
    model_name: `general.name`, which decides `strips_right` of special tokens.
    """

    model: str
    pre: str
    tokens: tuple[str, ...]
    kinds: tuple[int, ...]
    scores: tuple[float, ...]
    merges: tuple[tuple[str, str], ...]
    bos_id: int | None
    eos_id: int | None
    eot_id: int | None
    eom_id: int | None
    unk_id: int | None
    fim_ids: Mapping[str, int]
    add_bos: bool | None
    add_eos: bool | None
    add_space_prefix: bool
    model_name: str

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> Vocabulary:
        """Read and check the metadata.

        Raises UnsupportedError for another tokenizer model, ModelFileError naming the key at fault.
        """
        model = _get(metadata, "model", str, required=True)
        if model not in MODELS:
            raise UnsupportedError(f"tokenizer model '{model}' is not supported; supported: {', '.join(MODELS)}")
        sentencepiece = model == SENTENCEPIECE
        tokens = _tokens(metadata)
        ids = SpecialIds.from_metadata(metadata)
        pre = "" if sentencepiece else _get(metadata, "pre", str) or ""
        return cls(
            model=model,
            pre=pre,
            tokens=tokens,
            kinds=_kinds(metadata, len(tokens)),
            scores=_scores(metadata, len(tokens)) if sentencepiece else (),
            merges=() if sentencepiece else _merges(metadata, pre),
            bos_id=ids.bos,
            eos_id=ids.eos,
            eot_id=_token_id(metadata, "eot_token_id", len(tokens)),
            eom_id=_token_id(metadata, "eom_token_id", len(tokens)),
            unk_id=ids.unk,
            fim_ids=_fim_ids(metadata, len(tokens)),
            add_bos=_get(metadata, "add_bos_token", bool),
            add_eos=_get(metadata, "add_eos_token", bool),
            add_space_prefix=sentencepiece and _get(metadata, "add_space_prefix", bool) is not False,
            model_name=str(metadata.get("general.name", "")),
        )


@dataclass(frozen=True)
class SpecialIds:
    """The begin, end and unknown tokens; None where there is none.

    A SentencePiece file that does not name them means those of Llama: 1, 2 and 0.
    """

    bos: int | None
    eos: int | None
    unk: int | None

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> SpecialIds:
        """Read the ids; ModelFileError if one lies outside the vocabulary."""
        count = len(_tokens(metadata))
        defaults: tuple[int | None, ...] = (None, None, None)
        if metadata.get(PREFIX + "model") == SENTENCEPIECE:
            defaults = tuple(default if default < count else None for default in (1, 2, 0))
        names = ("bos_token_id", "eos_token_id", "unknown_token_id")
        found = (_token_id(metadata, name, count) for name in names)
        return cls(*(default if id_ is None else id_ for id_, default in zip(found, defaults, strict=True)))


def token_text(metadata: Mapping[str, Any], token_id: int | None) -> str:
    """Text of a token as the file spells it; "" for None."""
    return "" if token_id is None else _tokens(metadata)[token_id]


def _get(metadata: Mapping[str, Any], name: str, kind: type, *, required: bool = False) -> Any:
    key = PREFIX + name
    value = metadata.get(key)
    if value is None and not required:
        return None
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        found = "missing" if value is None else f"{type(value).__name__}"
        raise ModelFileError(f"{key} must be {kind.__name__}, it is {found}")
    return value


def _list(metadata: Mapping[str, Any], name: str, kinds: set[type], count: int | None) -> Sequence[Any] | None:
    """The list at `name`, its element types and length checked; None if absent."""
    key = PREFIX + name
    values = metadata.get(key)
    if values is None:
        return None
    if isinstance(values, str | bytes) or not isinstance(values, Sequence):
        raise ModelFileError(f"{key} must be a list, it is {type(values).__name__}")
    wrong = set(map(type, values)) - kinds
    if wrong:
        names = " or ".join(sorted(kind.__name__ for kind in kinds))
        raise ModelFileError(f"{key} must hold {names}, it holds {wrong.pop().__name__}")
    if count is not None and len(values) != count:
        raise ModelFileError(f"{key} has {len(values)} entries for {count} tokens")
    return values


def _tokens(metadata: Mapping[str, Any]) -> tuple[str, ...]:
    key = PREFIX + "tokens"
    values = _list(metadata, "tokens", {str}, None)
    if not values:
        raise ModelFileError(f"{key} is missing or empty")
    # An empty token cannot be looked up; llama.cpp gives it a text of its own.
    return tuple(text or f"[EMPTY_{id_}]" for id_, text in enumerate(values))


def _kinds(metadata: Mapping[str, Any], count: int) -> tuple[int, ...]:
    values = _list(metadata, "token_type", {int}, count)
    return (int(TokenKind.NORMAL),) * count if values is None else tuple(values)


def _scores(metadata: Mapping[str, Any], count: int) -> tuple[float, ...]:
    values = _list(metadata, "scores", {int, float}, count)
    if values is None:
        raise ModelFileError(f"{PREFIX}scores is missing; a '{SENTENCEPIECE}' vocabulary needs it")
    if any(map(math.isnan, values)):
        raise ModelFileError(f"{PREFIX}scores holds NaN")
    return tuple(map(float, values))


def _merges(metadata: Mapping[str, Any], pre: str) -> tuple[tuple[str, str], ...]:
    values = _list(metadata, "merges", {str}, None)
    if values is None:
        if pre == "kimi-k2":  # its own files were made from ranks, some without merges
            return ()
        raise ModelFileError(f"{PREFIX}merges is missing; a '{BYTE_LEVEL}' vocabulary needs it")
    pairs: dict[tuple[str, str], None] = {}  # the first of two equal merges has the rank
    for rank, merge in enumerate(values):
        left, _, right = merge.partition(" ")
        if not left or not right or " " in right:
            raise ModelFileError(f"{PREFIX}merges[{rank}] is not two tokens: {merge[:80]!r}")
        pairs[left, right] = None
    return tuple(pairs)


def _token_id(metadata: Mapping[str, Any], name: str, count: int) -> int | None:
    value: int | None = _get(metadata, name, int)
    if value is not None and not 0 <= value < count:
        raise ModelFileError(f"{PREFIX}{name} is {value}, outside the {count} tokens")
    return value


def _fim_ids(metadata: Mapping[str, Any], count: int) -> dict[str, int]:
    """Fill-in-the-middle tokens that the file names, by the last word of their key."""
    names = {"pre": "prefix", "suf": "suffix", "mid": "middle", "pad": None, "rep": None, "sep": None}
    ids: dict[str, int] = {}
    for name, old_name in names.items():
        keys = [f"fim_{name}_token_id"] + ([f"{old_name}_token_id"] if old_name else [])
        for key in keys:
            value = _token_id(metadata, key, count)
            if value is not None:
                ids[name] = value
    return ids
