"""Compared with llama.cpp while the test runs: pre-tokenizers, odd vocabularies, whole files.

Set NUMOE_ORACLE to the oracle's Python and NUMOE_SHARED to the folder that holds oracle/llama_lib.py;
for the files also NUMOE_VOCABS to a folder of vocabulary-only GGUF files (llama.cpp's own are in its
models/ folder). NUMOE_ORACLE_TEXTS is how many random texts to add to the corpus.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from numoe.engine.errors import UnsupportedError
from numoe.engine.text import Tokenizer
from numoe.engine.text.pretokenizers import PRE_TOKENIZERS
from tests.engine.text.corpus import TEXTS, random_texts
from tests.engine.text.support import (
    ask_oracle,
    read_metadata,
    synthetic,
    synthetic_sentencepiece,
    without_some_bytes,
    write_vocabulary,
)

MISSING = [name for name in ("NUMOE_ORACLE", "NUMOE_SHARED") if not os.environ.get(name)]
VOCABS = os.environ.get("NUMOE_VOCABS")
FILES = sorted(Path(VOCABS).glob("*.gguf")) if VOCABS else []
RANDOM_TEXTS = int(os.environ.get("NUMOE_ORACLE_TEXTS", "300"))

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.skipif(bool(MISSING), reason=f"needs llama.cpp: set {', '.join(MISSING)}"),
]


def jobs(seed: int) -> list[tuple[str, bool, bool]]:
    texts = [*TEXTS, *random_texts(RANDOM_TEXTS, seed=seed)]
    return [(text, special, parse) for text in texts for special, parse in ((True, True), (False, False))]


def supported(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_metadata(read_metadata(path))
    except UnsupportedError as error:
        pytest.skip(str(error))


@pytest.mark.skipif(not FILES, reason="set NUMOE_VOCABS to a folder of vocabulary GGUF files")
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_vocabulary_file(path: Path) -> None:
    tokenizer = supported(path)
    work = jobs(seed=1)
    answer = ask_oracle(path, work, vocabulary=True)
    for (text, special, parse), ids in zip(work, answer["ids"], strict=True):
        assert tokenizer.encode(text, add_special=special, parse_special=parse) == ids, repr(text)
    for id_, piece in enumerate(answer["pieces"]):
        assert tokenizer.token_bytes(id_) == bytes.fromhex(piece), id_
    assert sorted(tokenizer.eog_ids) == answer["eog"]


def check(metadata: dict[str, Any], path: Path, seed: int) -> None:
    write_vocabulary(path, metadata)
    tokenizer = Tokenizer.from_metadata(metadata)
    work = jobs(seed)
    for (text, special, parse), ids in zip(work, ask_oracle(path, work)["ids"], strict=True):
        assert tokenizer.encode(text, add_special=special, parse_special=parse) == ids, repr(text)


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_a_pre_tokenizer(pre: str, tmp_path: Path) -> None:
    check(synthetic(pre), tmp_path / "vocabulary.gguf", seed=2)


def test_a_vocabulary_without_some_bytes(tmp_path: Path) -> None:
    check(without_some_bytes(synthetic("qwen2"), 0), tmp_path / "vocabulary.gguf", seed=3)


@pytest.mark.parametrize("seed", range(6))
def test_a_random_sentencepiece_vocabulary(seed: int, tmp_path: Path) -> None:
    check(synthetic_sentencepiece(seed), tmp_path / "vocabulary.gguf", seed)
