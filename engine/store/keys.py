"""Names of cached keys and values: a hash chain over chunks of 256 tokens.

    root  = blake3(fingerprint ‖ KV type ‖ format version ‖ salt)
    key_i = blake3(key_{i-1} ‖ tokens_i)     tokens as little-endian int32

A chunk's key stands for all tokens up to its end, for the model and for how its keys and values are
stored, so equal keys are equal content, whoever computed it.
"""

from __future__ import annotations

import struct
from typing import Final

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from numoe.engine.kv.pages import PAGE_TOKENS

FORMAT_VERSION: Final = 2
"""Of the bytes of a chunk (`chunks.py`, `portable.py`): another version is another root."""
KEY_BYTES: Final = 32
CHUNKS: Final = "chunks"
"""The folder of the chunks' objects."""


def root_key(fingerprint: bytes, kv_type: str, salt: bytes = b"") -> bytes:
    """The key before the first token, 32 bytes; only equal salts share chunks.

    fingerprint: `ModelFingerprint.digest`. kv_type: `kv_type_name`.
    """
    digest = blake3(b"numoe prompt cache")
    for part in (fingerprint, kv_type.encode(), struct.pack("<I", FORMAT_VERSION), salt):
        digest.update(struct.pack("<Q", len(part)))  # so that no two lists of parts read the same
        digest.update(part)
    return digest.digest()


def chunk_key(previous: bytes, token_ids: npt.ArrayLike) -> bytes:
    """The key of the chunk of `token_ids`, at most 256, that follows the chunk `previous`."""
    return blake3(previous + np.asarray(token_ids, "<i4").tobytes()).digest()


def chain_keys(previous: bytes, token_ids: npt.ArrayLike) -> list[bytes]:
    """The key of every full chunk of `token_ids`, which follow the chunk (or root) `previous`."""
    raw = np.asarray(token_ids, "<i4").tobytes()
    step = 4 * PAGE_TOKENS
    keys: list[bytes] = []
    for end in range(step, len(raw) + 1, step):
        previous = blake3(previous + raw[end - step : end]).digest()
        keys.append(previous)
    return keys


def chunk_path(key: bytes) -> str:
    """The name of a chunk's object: spread over folders, as no file system likes a million names in one."""
    name = key.hex()
    return f"{CHUNKS}/{name[:2]}/{name}"
