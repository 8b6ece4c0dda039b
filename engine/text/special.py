"""Which tokens are special: control, end of generation, matched before the text is split.

Files often mark these tokens wrongly or not at all, so llama.cpp corrects them by name. The
names and the order of the rules here give what its vocabulary loader gives.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from numoe.engine.text.vocabulary import TokenKind, Vocabulary

END_OF_GENERATION = (
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "</s>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<eos>",
    "<turn|>",
    "<|tool_response>",
    "<｜end▁of▁sentence｜>",
    "[e~[",
)

# Fill-in-the-middle tokens by role. The last three also end a generation: after them the model
# goes on with another file.
FILL_IN_THE_MIDDLE: Mapping[str, tuple[str, ...]] = {
    "pre": (
        "<|fim_prefix|>",
        "<fim-prefix>",
        "<fim_prefix>",
        "<｜fim▁begin｜>",
        "<PRE>",
        "▁<PRE>",
        "<|code_prefix|>",
        "<|prefix|>",
    ),
    "suf": (
        "<|fim_suffix|>",
        "<fim-suffix>",
        "<fim_suffix>",
        "<｜fim▁hole｜>",
        "<SUF>",
        "▁<SUF>",
        "<|code_suffix|>",
        "<|suffix|>",
    ),
    "mid": (
        "<|fim_middle|>",
        "<fim-middle>",
        "<fim_middle>",
        "<｜fim▁end｜>",
        "<MID>",
        "▁<MID>",
        "<|code_middle|>",
        "<|middle|>",
    ),
    "pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "sep": ("<|file_sep|>",),
}
ENDS_GENERATION = ("pad", "rep", "sep")

# Part of what gpt-oss says, not hidden from the reader.
ALWAYS_SHOWN = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")

# Phi-3 swallows the white space after its special tokens, except after these.
PHI3_KEEPS_SPACE = ("<unk>", "<s>", "<|endoftext|>")


@dataclass(frozen=True, repr=False)
class SpecialTokens:
    """The outcome of the rules.

    hidden:       ids that are control or unknown: recognised in text only when asked for, and left
                  out of text when asked for.
    matched:      (text, id) recognised in text before anything else, in the order they are sought.
    strips_right: ids that swallow the ASCII white space after them.
    end_of_generation: ids that end a generation.
    """

    hidden: frozenset[int]
    matched: tuple[tuple[str, int], ...]
    strips_right: frozenset[int]
    end_of_generation: frozenset[int]

    @classmethod
    def of(cls, vocabulary: Vocabulary, ids: Mapping[str, int]) -> SpecialTokens:
        """Apply the rules; `ids` gives the id of a token's text."""
        kinds = vocabulary.kinds
        hidden = {i for i, kind in enumerate(kinds) if kind in {TokenKind.CONTROL, TokenKind.UNKNOWN}}
        user_defined = {i for i, kind in enumerate(kinds) if kind == TokenKind.USER_DEFINED}

        fim = _fill_in_the_middle(vocabulary, ids)
        ends = {ids[name] for name in END_OF_GENERATION if name in ids}
        hidden |= ends | {id_ for role, id_ in fim.items() if role not in vocabulary.fim_ids}
        ends |= {fim[role] for role in ENDS_GENERATION if role in fim}
        shown = {ids[name] for name in ALWAYS_SHOWN if name in ids}
        hidden -= shown
        user_defined |= shown

        named = (vocabulary.eos_id, vocabulary.eot_id, vocabulary.eom_id)
        ends |= {id_ for id_ in named if id_ is not None}
        if _end_is_a_separator(ids, ends):
            ends.remove(ids["<|end|>"])
            hidden.remove(ids["<|end|>"])
            user_defined.add(ids["<|end|>"])

        matched = sorted(hidden | user_defined, key=lambda i: (-len(vocabulary.tokens[i].encode()), i))
        return cls(
            hidden=frozenset(hidden),
            matched=tuple((vocabulary.tokens[i], i) for i in matched),
            strips_right=_strips_right(vocabulary, ids, matched),
            end_of_generation=frozenset(ends),
        )


def _fill_in_the_middle(vocabulary: Vocabulary, ids: Mapping[str, int]) -> dict[str, int]:
    """Id of each role: the file's own, else the lowest id with one of the known names."""
    found = dict(vocabulary.fim_ids)
    for role, names in FILL_IN_THE_MIDDLE.items():
        candidates = [ids[name] for name in names if name in ids]
        if candidates:
            found.setdefault(role, min(candidates))
    return found


def _end_is_a_separator(ids: Mapping[str, int], ends: set[int]) -> bool:
    """Whether <|end|> only ends a message: gpt-oss and Solar end a turn with other tokens."""

    def has(name: str) -> bool:
        return ids.get(name) in ends

    calls = has("<|call|>") or has("<|calls|>")
    return has("<|end|>") and calls and (has("<|return|>") or has("<|flush|>"))


def _strips_right(vocabulary: Vocabulary, ids: Mapping[str, int], matched: list[int]) -> frozenset[int]:
    name = vocabulary.model_name.lower()
    if "phi-3" not in name and "phi3" not in name:
        return frozenset()
    keeps = {ids[text] for text in PHI3_KEEPS_SPACE if text in ids}
    return frozenset(matched) - keeps


def split_special(text: str, special: SpecialTokens, *, parse_hidden: bool) -> list[str | int]:
    """Cut `text` into stretches of plain text (never empty) and the ids of special tokens in it.

    Longer tokens are sought first, each through the whole text (this is llama.cpp's order; it is
    not the same as leftmost-longest). Hidden tokens are sought only with `parse_hidden`.
    """
    parts: list[str | int] = [text] if text else []
    for token, id_ in special.matched:
        if token in text and (parse_hidden or id_ not in special.hidden):
            strip = id_ in special.strips_right
            parts = [piece for part in parts for piece in _split_one(part, token, id_, strip_right=strip)]
    return parts


def _split_one(part: str | int, token: str, id_: int, *, strip_right: bool) -> list[str | int]:
    if isinstance(part, int):
        return [part]
    first, *rest = part.split(token)
    pieces: list[str | int] = [first] if first else []
    for after in rest:
        pieces.append(id_)
        if strip_right:
            after = after.lstrip(" \t\n\v\f\r")
        if after:
            pieces.append(after)
    return pieces
