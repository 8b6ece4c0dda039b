"""Token ids equal llama.cpp's, as recorded in goldens.json by make_goldens.py."""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest

from numoe.engine.text import Tokenizer
from tests.engine.text.support import GOLDENS, read_metadata, smollm2, synthetic, synthetic_sentencepiece

DOCUMENT = json.loads(GOLDENS.read_text())


@functools.cache
def load(name: str) -> tuple[Tokenizer, dict[str, Any]]:
    match name:
        case "smollm2":
            metadata = read_metadata(smollm2())
        case "sentencepiece":
            metadata = synthetic_sentencepiece(0)
        case _:
            metadata = synthetic(name)
    return Tokenizer.from_metadata(metadata), DOCUMENT["goldens"][name]


@pytest.mark.parametrize("name", DOCUMENT["goldens"])
def test_ids_equal_llama_cpp(name: str) -> None:
    tokenizer, golden = load(name)
    for (text, special, parse), ids in zip(DOCUMENT["jobs"], golden["ids"], strict=True):
        assert tokenizer.encode(text, add_special=special, parse_special=parse) == ids, repr(text)


def test_the_goldens_tell_the_pre_tokenizers_apart() -> None:
    ids = {name: json.dumps(golden["ids"]) for name, golden in DOCUMENT["goldens"].items()}
    assert len(set(ids.values())) == len(ids)


def test_smollm2_ends_and_control_tokens_equal_llama_cpp() -> None:
    tokenizer, golden = load("smollm2")
    assert sorted(tokenizer.eog_ids) == golden["eog"]
    assert [id_ for id_ in range(tokenizer.vocab_size) if tokenizer.is_special(id_)] == golden["control"]
