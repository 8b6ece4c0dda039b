"""What the tests of this folder share: vocabularies, and llama.cpp as the oracle."""

from __future__ import annotations

import json
import os
import random
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf

from numoe.deploy.demo.source import source_model
from tests.engine.text.corpus import TEXTS, random_texts

HERE = Path(__file__).parent
SYNTHETIC = HERE / "synthetic.json"
GOLDENS = HERE / "goldens.json"

# Runs in the oracle's Python: tokenizes on stdin's order with one load of the file.
ORACLE = """
import ctypes, json, sys
sys.path.insert(0, sys.argv[1])
from llama_lib import Oracle
oracle = Oracle(sys.argv[2], n_ctx=0, threads=1, vocab_only=True)
L, vocab = oracle.L, oracle.vocab
def ids(text, special, parse):
    raw = text.encode()
    room = (L.llama_token * (len(raw) + 16))()
    return list(room[: L.llama_tokenize(vocab, raw, len(raw), room, len(room), special, parse)])
job = json.load(sys.stdin)
out = {"ids": [ids(*item) for item in job["encode"]], "pieces": []}
buffer = ctypes.create_string_buffer(4096)
for token in range(oracle.n_vocab) if job["vocabulary"] else ():
    size = L.llama_token_to_piece(vocab, token, buffer, len(buffer), 0, True)
    out["pieces"].append(buffer.raw[:size].hex())
if job["vocabulary"]:
    every = range(oracle.n_vocab)
    out["eog"] = [token for token in every if L.llama_vocab_is_eog(vocab, token)]
    out["control"] = [token for token in every if L.llama_vocab_is_control(vocab, token)]
json.dump(out, sys.stdout)
"""


def read_metadata(path: Path) -> dict[str, Any]:
    """Every key of a GGUF file as a Python value."""
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def smollm2() -> Path:
    """The GGUF file that the demo model is made of."""
    return source_model()


def synthetic(pre: str) -> dict[str, Any]:
    """Metadata of the small vocabulary whose merges cross every boundary a pre-tokenizer can make."""
    return json.loads(SYNTHETIC.read_text()) | {"tokenizer.ggml.pre": pre}


def synthetic_sentencepiece(seed: int) -> dict[str, Any]:
    """Metadata of a SentencePiece vocabulary: random pieces of the corpus, with scores that often tie.

    Unlike a trained one it lacks single characters of its longer tokens, so that merging and the
    fall-back to bytes meet.
    """
    rng = random.Random(seed)
    text = "\n".join(TEXTS + tuple(random_texts(500, seed=seed))).replace(" ", "▁").replace("\0", "")
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "<|user|>", "<tool>", "  "]
    kinds = [2, 3, 3, *[6] * 256, 3, 4, 4]
    pieces: dict[str, None] = {}
    while len(pieces) < 2000:
        start = rng.randrange(len(text))
        pieces[text[start : start + rng.choice((1, 1, 2, 2, 2, 3, 3, 4, 6, 9))]] = None
    pieces = {piece: None for piece in pieces if piece not in tokens}
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [*tokens, *pieces],
        "tokenizer.ggml.token_type": [*kinds, *[1] * len(pieces)],
        "tokenizer.ggml.scores": [0.0] * len(tokens) + [-float(rng.randrange(1, 200)) for _ in pieces],
        "tokenizer.ggml.add_eos_token": bool(seed % 2),
        "tokenizer.ggml.add_space_prefix": seed % 3 != 1,
    }


def without_some_bytes(metadata: dict[str, Any], seed: int) -> dict[str, Any]:
    """The synthetic byte-level vocabulary, 20 bytes that no merge uses renamed out of reach."""
    used = {part for merge in metadata["tokenizer.ggml.merges"] for part in merge.split(" ")}
    tokens = list(metadata["tokenizer.ggml.tokens"])
    free = [id_ for id_, token in enumerate(tokens) if len(token) == 1 and token not in used]
    for id_ in random.Random(seed).sample(free, min(20, len(free))):
        tokens[id_] = f"[gone {id_}]"
    return metadata | {"tokenizer.ggml.tokens": tokens}


def ask_oracle(path: Path, encode: Sequence[tuple[str, bool, bool]], *, vocabulary: bool = False) -> dict[str, Any]:
    """llama.cpp's ids for each (text, add_special, parse_special), and its view of the vocabulary.

    NUMOE_ORACLE is the oracle's Python; NUMOE_SHARED the folder that holds oracle/llama_lib.py.
    """
    job = json.dumps({"encode": encode, "vocabulary": vocabulary})
    python, library = os.environ["NUMOE_ORACLE"], Path(os.environ["NUMOE_SHARED"]) / "oracle"
    # A file for the answer: pipes of a killed process would hang the test.
    with tempfile.TemporaryFile("w+") as answer:
        subprocess.run(
            [python, "-c", ORACLE, str(library), str(path)],
            input=job,
            stdout=answer,
            text=True,
            check=True,
            timeout=280,
        )
        answer.seek(0)
        return json.load(answer)


def write_vocabulary(path: Path, metadata: dict[str, Any]) -> None:
    """A vocabulary-only GGUF file that llama.cpp loads."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in metadata.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_array(key, value)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
