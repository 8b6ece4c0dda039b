"""Regenerate synthetic.json and goldens.json; needs llama.cpp.

    NUMOE_ORACLE=PYTHON NUMOE_SHARED=FOLDER_OF_oracle/ python tests/engine/text/make_goldens.py

synthetic.json: a byte-level vocabulary trained on this folder's corpus with no pre-tokenizer at all, so
its merges cross every boundary that a pre-tokenizer can make, and a missing cut changes the ids.
goldens.json: llama.cpp's ids of the corpus, for that vocabulary under each pre-tokenizer, for a
SentencePiece vocabulary with random tokens and scores, and for SmolLM2's own file.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

if __name__ == "__main__":  # run as a script, not as tests.engine.text.make_goldens
    sys.path.insert(0, str(Path(__file__).parents[3]))

from tests.engine.text.corpus import TEXTS, random_texts
from tests.engine.text.support import (
    GOLDENS,
    SYNTHETIC,
    ask_oracle,
    smollm2,
    synthetic,
    synthetic_sentencepiece,
    write_vocabulary,
)

PRES = ("gpt-2", "smollm", "llama-bpe", "qwen2", "deepseek-llm", "deepseek-coder", "deepseek-v3", "kimi-k2")
SPECIAL = ("<s>", "</s>", "<|im_end|>", "<unk>", "<|user|>", "<tool>")
UNMERGED = ("ĠXMLHttpRequest", "ĠHTTPServer")  # words of the corpus that no merges make
RANDOM_TEXTS = 60


def make_synthetic() -> None:
    """Train the vocabulary and write it as GGUF metadata."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=2500, initial_alphabet=alphabet, show_progress=False, min_frequency=2, max_token_length=12
    )
    tokenizer.train_from_iterator([*TEXTS, *random_texts(3000, seed=7)], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    words = sorted(model["vocab"], key=model["vocab"].get)
    words += [text for text in (*SPECIAL, *UNMERGED) if text not in words]
    kinds = [3 if text in SPECIAL else 1 for text in words]
    kinds[words.index("<tool>")] = 4
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": words,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.bos_token_id": words.index("<s>"),
        "tokenizer.ggml.eos_token_id": words.index("</s>"),
        "tokenizer.ggml.add_eos_token": True,
    }
    SYNTHETIC.write_text(json.dumps(metadata, ensure_ascii=False, separators=(",", ":")) + "\n")


def main() -> None:
    """Write both files."""
    make_synthetic()
    texts = [*TEXTS, *random_texts(RANDOM_TEXTS)]
    jobs = [(text, True, True) for text in texts] + [(text, False, False) for text in texts]
    goldens = {"smollm2": ask_oracle(smollm2(), jobs, vocabulary=True)}
    del goldens["smollm2"]["pieces"]
    vocabularies = {pre: synthetic(pre) for pre in PRES} | {"sentencepiece": synthetic_sentencepiece(0)}
    with tempfile.TemporaryDirectory() as folder:
        for name, metadata in vocabularies.items():
            path = Path(folder) / f"{name}.gguf"
            write_vocabulary(path, metadata)
            goldens[name] = {"ids": ask_oracle(path, jobs)["ids"]}
    document = {"jobs": jobs, "goldens": goldens}
    GOLDENS.write_text(json.dumps(document, ensure_ascii=False, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
