r"""How text is cut into words before byte-pair merging, for each `tokenizer.ggml.pre`.

A pre-tokenizer is a list of regular expressions. Each cuts every piece left by the one before into
its matches and the stretches between them, and sees no further than its piece: `\s+(?!\S)` takes
all the white space at the end of a piece, and all but the last of it elsewhere. The expressions are
those of the models' own tokenizer files, in the syntax of Oniguruma (which `tokenizers` uses), with
the deviations of llama.cpp that its users' token ids depend on.
"""

from __future__ import annotations

from dataclasses import dataclass

from numoe.engine.errors import UnsupportedError

_CONTRACTION = r"(?:'[sStTmMdD]|'[rR][eE]|'[vV][eE]|'[lL][lL])"
_LINES_AND_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_NEWLINE = r"[\r\n]"


def _words_and_digits(digits: str) -> str:
    return (
        rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_LINES_AND_SPACES}"
    )


# White space lies in this range, and llama.cpp hides it from expressions without \p{}.
_ASIAN = r"[\u4E00-\u9FA5\u0800-\u4E00\uAC00-\uD7FF&&[^\s]]+"
_KANA_AND_HAN = r"[\u4E00-\u9FA5\u3040-\u309F\u30A0-\u30FF]+"
_DEEPSEEK_V3 = (
    r"[!\x22#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_LINES_AND_SPACES}"
)

# The cased letters of an old Unicode version, as DeepSeek LLM's tokenizer file lists them.
_CASED_RANGES = """
    41-5A 61-7A B5 C0-D6 D8-F6 F8-1BA 1BC-1BF 1C4-293 295-2AF 370-373 376 377 37B-37D 37F 386 388-38A
    38C 38E-3A1 3A3-3F5 3F7-481 48A-52F 531-556 10A0-10C5 13A0-13F5 13F8-13FD 1C90-1CBA 1CBD-1CBF
    1D00-1D2B 1D6B-1D77 1D79-1D9A 1E00-1F15 1F18-1F1D 1F20-1F45 1F48-1F4D 1F50-1F57 1F59 1F5B 1F5D
    1F5F-1F7D 1F80-1FB4 1FB6-1FBC 1FBE 1FC2-1FC4 1FC6-1FCC 1FD0-1FD3 1FD6-1FDB 1FE0-1FEC 1FF2-1FF4
    1FF6-1FFC 2102 2107 210A-2113 2115 2119-211D 2124 2126 2128 212A-212D 212F-2134 2139 213C-213F
    2145-2149 214E 2183 2184 2C00-2C7B 2C7E-2CE4 2CEB-2CEE 2CF2 2CF3 A640-A66D A680-A69B A722-A76F
    A771-A787 A78B-A78E AB70-ABBF FB00-FB06 FB13-FB17 FF21-FF3A FF41-FF5A 10400-1044F 104B0-104D3
    104D8-104FB 10C80-10CB2 10CC0-10CF2 118A0-118DF 1E900-1E943
"""
# The full stop's range starts at U+3000, a white space, which llama.cpp hides here too.
_PUNCTUATION_RANGES = "21-2F 3A-7E FF01-FF0F FF1A-FF5E 2018-201F 3001-3002"
# What llama.cpp takes for Han: unified ideographs to extension F, and compatibility ideographs.
_HAN_RANGES = "4E00-9FFF 3400-4DBF 20000-2A6DF 2A700-2EBEF F900-FAFF 2F800-2FA1F"


def _members(ranges: str) -> str:
    """The inside of a bracket expression, from hexadecimal code points and ranges of them."""
    return "".join("-".join(rf"\x{{{point}}}" for point in part.split("-")) for part in ranges.split())


def _kimi_k2() -> str:
    """Han apart from other scripts, contractions kept with their word.

    Kimi's file lets combining marks into words; llama.cpp does not.
    """
    han = _members(_HAN_RANGES)
    return (
        rf"[{han}]+|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}&&[^{han}]]+{_CONTRACTION}?|\p{{N}}{{1,3}}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_LINES_AND_SPACES}"
    )


@dataclass(frozen=True)
class PreTokenizer:
    """One way to cut text.

    expressions:   applied one after the other.
    ignore_merges: a whole word that is a token is taken as it is, whatever the merges say.
    add_bos:       what a file means that does not say whether it wants BOS.
    """

    expressions: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False


_GPT2_WORDS = PreTokenizer((_GPT2,))
_SMOLLM = PreTokenizer((r"\p{N}", _GPT2))
_LLAMA3 = PreTokenizer((_words_and_digits(r"\p{N}{1,3}"),), ignore_merges=True, add_bos=True)
_QWEN2 = PreTokenizer((_words_and_digits(r"\p{N}"),))

PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "gpt-2": _GPT2_WORDS,
    "smollm": _SMOLLM,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "deepseek-llm": PreTokenizer(
        (
            _NEWLINE,
            rf"\s?[{_members(_CASED_RANGES)}]+",
            rf"\s?[{_members(_PUNCTUATION_RANGES)}]+",
            r"\s+\z",
            _ASIAN,
            r"\p{N}+",
        )
    ),
    "deepseek-coder": PreTokenizer((_NEWLINE, r"\s?\p{L}+", r"\s?\p{P}+", _ASIAN, r"\p{N}")),
    "deepseek-v3": PreTokenizer((r"\p{N}{1,3}", _KANA_AND_HAN, _DEEPSEEK_V3)),
    "kimi-k2": PreTokenizer((_kimi_k2(),)),
}


def pre_tokenizer(name: str) -> PreTokenizer:
    """The pre-tokenizer of that name; UnsupportedError if there is none.

    A file without a name ("") is refused too: guessing would give ids that are subtly wrong.
    """
    try:
        return PRE_TOKENIZERS[name]
    except KeyError:
        shown = f"'{name}'" if name else "missing (tokenizer.ggml.pre)"
        known = ", ".join(PRE_TOKENIZERS)
        raise UnsupportedError(f"pre-tokenizer {shown} is not supported; supported: {known}") from None
