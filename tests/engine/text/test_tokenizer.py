"""What holds for every text, and what a broken file gets."""

from __future__ import annotations

import functools
import re
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from numoe.engine.errors import InputError, ModelFileError, UnsupportedError
from numoe.engine.text import StreamDecoder, Tokenizer
from tests.engine.text.corpus import PIECES, TEXTS
from tests.engine.text.support import synthetic, synthetic_sentencepiece

PRES = ("gpt-2", "smollm", "llama-bpe", "qwen2", "deepseek-llm", "deepseek-coder", "deepseek-v3", "kimi-k2")
texts = st.one_of(st.text(), st.lists(st.sampled_from(PIECES)).map("".join))


@functools.cache
def tokenizer(name: str) -> Tokenizer:
    return Tokenizer.from_metadata(synthetic_sentencepiece(0) if name == "sentencepiece" else synthetic(name))


id_lists = st.lists(st.integers(0, tokenizer("sentencepiece").vocab_size - 1), max_size=40)


@given(text=texts, pre=st.sampled_from(PRES))
def test_decoding_gives_the_text_back(text: str, pre: str) -> None:
    ids = tokenizer(pre).encode(text, add_special=False)
    assert tokenizer(pre).decode(ids) == text


@given(text=texts)
def test_decoding_gives_plain_text_back_with_sentencepiece(text: str) -> None:
    text = re.sub("[ ▁]+", " ", text).replace("<tool>", "")  # no user-defined token: a space would follow it
    ids = tokenizer("sentencepiece").encode(text, add_special=False, parse_special=False)
    assert tokenizer("sentencepiece").decode(ids) == text


@given(ids=id_lists, name=st.sampled_from((*PRES, "sentencepiece")), skip=st.booleans(), continuation=st.booleans())
def test_a_stream_gives_what_decode_gives(ids: list[int], name: str, skip: bool, continuation: bool) -> None:
    stream = StreamDecoder(tokenizer(name), skip_special=skip, continuation=continuation)
    pieces = [stream.push(id_) for id_ in ids]
    whole = tokenizer(name).decode(ids, skip_special=skip, continuation=continuation)
    assert "".join(pieces) + stream.flush() == whole


def test_a_stream_never_gives_half_a_character() -> None:
    for text in ("🙂👨‍👩‍👧‍👦", "中文日本語", "éΩя"):
        given_out = ""
        stream = StreamDecoder(tokenizer("gpt-2"))
        for byte_id in [tokenizer("gpt-2").encode(text, add_special=False)]:
            for id_ in byte_id:
                given_out += stream.push(id_)
                assert text.startswith(given_out)
        assert given_out == text
        assert stream.flush() == ""


def test_a_stream_replaces_bytes_that_are_no_character() -> None:
    spm = tokenizer("sentencepiece")
    first = spm.encode("<0x00>", add_special=False, parse_special=False)
    assert first
    byte = {value: 3 + value for value in range(256)}
    stream = StreamDecoder(spm)
    assert [stream.push(byte[value]) for value in b"\xe4\xb8A"] == ["", "", "\ufffdA"]
    assert stream.push(byte[0xFF]) == "\ufffd"
    assert stream.push(byte[0xF0]) == ""
    assert stream.flush() == "\ufffd"


def test_sentencepiece_spaces() -> None:
    spm = tokenizer("sentencepiece")
    ids = spm.encode("Hello world")
    assert ids[0] == spm.bos_id
    assert spm.decode(ids, skip_special=True) == "Hello world"
    assert spm.decode(ids[1:], continuation=True) == " Hello world"
    stream = StreamDecoder(spm)
    assert "".join(map(stream.push, ids[1:])) == " Hello world"


def test_special_tokens_are_text_unless_parsed() -> None:
    bpe = tokenizer("qwen2")
    eos = bpe.eos_id
    assert eos is not None
    assert bpe.encode("</s>", add_special=False) == [eos]
    assert bpe.encode("", add_special=True) == [eos]
    assert bpe.is_special(eos)
    assert eos in bpe.eog_ids
    assert bpe.token_bytes(eos) == b"</s>"
    assert bpe.decode([eos], skip_special=True) == ""


def test_phi3_special_tokens_swallow_white_space() -> None:
    metadata = synthetic_sentencepiece(0)
    phi3 = Tokenizer.from_metadata(metadata | {"general.name": "Phi-3 mini"})
    assert phi3.encode("<|user|> \n a") == phi3.encode("<|user|>a")
    assert phi3.encode("<s> a") != phi3.encode("<s>a")
    other = tokenizer("sentencepiece")
    assert other.encode("<|user|> \n a") != other.encode("<|user|>a")


def test_large_texts_take_well_under_a_second() -> None:
    text = "\n".join(TEXTS)
    text *= 1 + 100_000 // len(text.encode())
    for name in (*PRES, "sentencepiece"):
        start = time.perf_counter()
        tokenizer(name).encode(text)
        assert time.perf_counter() - start < 2, name  # a shared machine's allowance


def test_ids_outside_the_vocabulary_are_refused() -> None:
    bpe = tokenizer("qwen2")
    for id_ in (-1, bpe.vocab_size):
        with pytest.raises(InputError, match=str(id_)):
            bpe.decode([id_])
        with pytest.raises(InputError, match=str(id_)):
            StreamDecoder(bpe).push(id_)


def test_half_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(InputError, match="character 1"):
        tokenizer("qwen2").encode("a\ud800")


BPE, SPM = synthetic("qwen2"), synthetic_sentencepiece(0)


@pytest.mark.parametrize(
    ("metadata", "key", "value"),
    [
        (BPE, "model", None),
        (BPE, "model", 3),
        (BPE, "tokens", None),
        (BPE, "tokens", []),
        (BPE, "tokens", "abc"),
        (BPE, "tokens", [1, 2]),
        (BPE, "tokens", ["a", "a"]),
        (BPE, "token_type", [1]),
        (BPE, "token_type", [1.5] * len(BPE["tokenizer.ggml.tokens"])),
        (BPE, "merges", None),
        (BPE, "merges", ["ab"]),
        (BPE, "merges", ["a b c"]),
        (BPE, "merges", ["a "]),
        (BPE, "merges", ["a nonsense"]),
        (BPE, "bos_token_id", 99999),
        (BPE, "eos_token_id", -1),
        (BPE, "eot_token_id", "1"),
        (BPE, "add_bos_token", 1),
        (SPM, "scores", None),
        (SPM, "scores", [0.0]),
        (SPM, "scores", [float("nan")] * len(SPM["tokenizer.ggml.tokens"])),
    ],
)
def test_malformed_metadata_is_named(metadata: dict[str, Any], key: str, value: Any) -> None:
    broken = {
        name: item for name, item in metadata.items() if name != "tokenizer.ggml.token_type" or key == "token_type"
    }
    broken["tokenizer.ggml." + key] = value
    if key == "tokens":
        broken.pop("tokenizer.ggml.bos_token_id", None)
        broken.pop("tokenizer.ggml.eos_token_id", None)
        broken["tokenizer.ggml.merges"] = []
        broken.pop("tokenizer.ggml.add_eos_token", None)
    with pytest.raises(ModelFileError, match=f"tokenizer.ggml.{key}"):
        Tokenizer.from_metadata(broken)


def test_a_bos_that_is_wanted_must_be_there() -> None:
    metadata = {key: value for key, value in BPE.items() if "bos" not in key} | {"tokenizer.ggml.add_bos_token": True}
    with pytest.raises(ModelFileError, match="bos_token_id is missing"):
        Tokenizer.from_metadata(metadata)


@pytest.mark.parametrize("changed", [{"model": "rwkv"}, {"pre": "unheard-of"}, {"pre": ""}])
def test_what_is_not_supported_is_named(changed: dict[str, str]) -> None:
    metadata = BPE | {f"tokenizer.ggml.{key}": value for key, value in changed.items()}
    with pytest.raises(UnsupportedError, match="supported: gpt") as error:
        Tokenizer.from_metadata(metadata)
    assert all(value in str(error.value) for value in changed.values())
