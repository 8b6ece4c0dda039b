"""The hash chain: a chunk's key stands for everything before and in it."""

from __future__ import annotations

import struct

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from numoe.engine.store import keys as keys_module
from numoe.engine.store.keys import chain_keys, chunk_key, chunk_path, root_key

ROOT = root_key(b"f" * 32, "f16/f16")


@pytest.mark.parametrize(("tokens", "chunks"), [(0, 0), (255, 0), (256, 1), (511, 1), (512, 2), (1000, 3)])
def test_every_full_chunk_has_a_key(tokens: int, chunks: int) -> None:
    assert len(chain_keys(ROOT, list(range(tokens)))) == chunks


def test_a_key_is_the_hash_of_the_key_before_and_the_tokens() -> None:
    tokens = list(range(1000, 1512))
    first = blake3(ROOT + struct.pack("<256i", *tokens[:256])).digest()
    second = blake3(first + struct.pack("<256i", *tokens[256:])).digest()
    assert chain_keys(ROOT, tokens) == [first, second]
    assert chain_keys(first, tokens[256:]) == [second] == [chunk_key(first, tokens[256:])]


@given(st.lists(st.integers(0, 3), min_size=768, max_size=800), st.integers(0, 767))
def test_a_changed_token_changes_its_key_and_all_that_follow(tokens: list[int], at: int) -> None:
    changed = [*tokens[:at], tokens[at] + 1, *tokens[at + 1 :]]
    before, after = chain_keys(ROOT, tokens), chain_keys(ROOT, changed)
    assert [a == b for a, b in zip(before, after, strict=True)] == [i < at // 256 for i in range(3)]


def test_a_partial_chunk_has_a_key_of_its_own() -> None:
    assert len({chunk_key(ROOT, [1]), chunk_key(ROOT, [1, 0]), chunk_key(ROOT, []), ROOT}) == 4


def test_a_root_stands_for_model_type_version_and_salt(monkeypatch: pytest.MonkeyPatch) -> None:
    roots = [
        ROOT, root_key(b"g" * 32, "f16/f16"), root_key(b"f" * 32, "f16/q8_0"), root_key(b"f" * 32, "f16/f16", b"s"),
        root_key(b"f" * 31, "ff16/f16"), root_key(b"f" * 32, "f16/f1", b"6"),
    ]  # fmt: skip
    monkeypatch.setattr(keys_module, "FORMAT_VERSION", 3)
    roots.append(root_key(b"f" * 32, "f16/f16"))
    assert len(set(roots)) == len(roots)
    assert {len(root) for root in roots} == {32}


def test_chunks_are_spread_over_folders() -> None:
    assert chunk_path(bytes(range(32))) == "chunks/00/" + bytes(range(32)).hex()
