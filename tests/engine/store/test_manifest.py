"""A manifest comes back as it was, or says what is wrong with it, or with using it here."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from numoe.engine.errors import DataLossError, InputError, PreconditionError, UnsupportedError
from numoe.engine.requests import SamplingParams
from numoe.engine.store.fingerprint import ModelFingerprint
from numoe.engine.store.keys import FORMAT_VERSION, chain_keys, chunk_key, root_key
from numoe.engine.store.manifest import (
    Manifest,
    Origin,
    check_compatible,
    decode_manifest,
    encode_manifest,
    manifest_path,
)

ORIGIN = Origin(
    fingerprint=b"f" * 32, kv_type="q8_0/f16", format_version=2,
    parts={"architecture": "qwen3moe", "rope theta": "10000.0", "tensor types": "3 F32 (ab)", "tensor contents": "cd"},
)  # fmt: skip


def manifest(tokens: int = 700, computed: int | None = None) -> Manifest:
    ids = np.random.default_rng(tokens).integers(0, 150_000, tokens)
    sampling = SamplingParams(temperature=0.7, logit_bias=((3, float("-inf")),), seed=2**63)
    return Manifest.of(
        "main.1", ORIGIN, ids, computed=tokens if computed is None else computed, salt=b"s", sampling=sampling,
        chunk_bytes=12345, created=1.75e9,
    )  # fmt: skip


OBJECT = encode_manifest(manifest())


def packed(payload: bytes) -> bytes:
    """A sound wrapping of whatever payload."""
    return OBJECT[:8] + blake3(payload).digest() + payload


@given(tokens=st.integers(0, 1100), left=st.integers(0, 3))
def test_a_manifest_comes_back(tokens: int, left: int) -> None:
    saved = manifest(tokens, max(0, tokens - left))
    found = decode_manifest(encode_manifest(saved), "main.1")
    assert found == saved
    assert found.token_ids.tolist() == np.random.default_rng(tokens).integers(0, 150_000, tokens).tolist()


def test_its_chunks_are_those_of_the_chain() -> None:
    saved = manifest(700)
    root = root_key(b"f" * 32, "q8_0/f16", b"s")
    keys = chain_keys(root, saved.token_ids)
    assert saved.keys == (*keys, chunk_key(keys[1], saved.token_ids[512:]))
    assert manifest(512).partial_key is None
    assert manifest(600, 512).keys == manifest(600, 512).chunk_keys
    assert len(manifest(100).keys) == 1


@given(at=st.integers(0, len(OBJECT) - 1), bits=st.integers(1, 255))
def test_any_changed_byte_is_noticed(at: int, bits: int) -> None:
    damaged = bytearray(OBJECT)
    damaged[at] ^= bits
    with pytest.raises(DataLossError, match=r"snapshot main.1 is damaged"):
        decode_manifest(bytes(damaged), "main.1")


@given(length=st.integers(0, len(OBJECT) - 1))
def test_a_manifest_cut_anywhere_is_noticed(length: int) -> None:
    with pytest.raises(DataLossError, match=r"snapshot main.1 is damaged"):
        decode_manifest(OBJECT[:length], "main.1")


@given(st.binary(max_size=200))
def test_any_payload_is_a_manifest_or_damage(payload: bytes) -> None:
    with pytest.raises(DataLossError):
        decode_manifest(packed(payload), "main.1")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"name": "other"}, "that of snapshot 'other'"),
        ({"computed": 701}, "cannot be 701 tokens"),
        ({"computed": -1}, "cannot be -1 tokens"),
        ({"computed": 512}, "not those of 512 tokens"),
        ({"computed": 511}, "not those of 511 tokens"),
        ({"partial_key": None}, "not those of 700 tokens"),
        ({"partial_key": b"short"}, "32 bytes"),
        ({"tokens": b"123"}, "3 bytes of token ids"),
        ({"salt": b"other"}, "do not belong to its tokens"),
        ({"tokens": bytes(2800)}, "do not belong to its tokens"),
        ({"computed": "many"}, "cannot be decoded"),
        ({"surprise": 1}, "cannot be decoded"),
        ({"origin": {}}, "cannot be decoded"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_damaged(change: dict, reason: str) -> None:
    fields = msgspec.msgpack.decode(OBJECT[40:]) | change
    with pytest.raises(DataLossError, match=reason):
        decode_manifest(packed(msgspec.msgpack.encode(fields)), "main.1")


def test_a_newer_manifest_is_not_called_damage() -> None:
    fields = msgspec.msgpack.decode(OBJECT[40:]) | {"version": 3, "surprise": 1}
    with pytest.raises(UnsupportedError, match="version 3, where up to 2 is read"):
        decode_manifest(packed(msgspec.msgpack.encode(fields)), "main.1")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"kv_type": "f16/f16"}, "KV cache type is q8_0/f16 there and f16/f16 here"),
        ({"format_version": 3}, "KV format is 2 there and 3 here"),
        ({"fingerprint": b"g" * 32}, f"model fingerprint is {'66' * 32} there and {'67' * 32} here"),
        ({"architecture": "llama", "rope theta": "1"}, "architecture is qwen3moe there and llama here"),
        ({"rope theta": "500000.0"}, r"rope theta is 10000.0 there and 500000.0 here"),
        ({"tensor types": "3 Q8_0 (ef)"}, r"tensor types is 3 F32 \(ab\) there and 3 Q8_0 \(ef\) here"),
        ({"tensor contents": "ee"}, "tensor contents is cd there and ee here"),
        ({"new": "1"}, "new is absent there and 1 here"),
    ],
)
def test_the_first_field_that_does_not_fit_is_named(change: dict, reason: str) -> None:
    own = {name: value for name, value in change.items() if name in Origin.__struct_fields__}
    parts = {name: value for name, value in change.items() if name not in own}
    ours = msgspec.structs.replace(ORIGIN, parts=ORIGIN.parts | parts, **own)
    with pytest.raises(PreconditionError, match=f"snapshot main.1 does not fit: {reason}; serve the model"):
        check_compatible(manifest(), ours)
    check_compatible(manifest(), ORIGIN)


def test_an_origin_is_that_of_a_model() -> None:
    model = ModelFingerprint({"architecture": "llama"})
    assert Origin.of(model, "f16/f16") == Origin(
        fingerprint=model.digest, parts={"architecture": "llama"}, kv_type="f16/f16", format_version=FORMAT_VERSION
    )


def test_a_part_that_is_gone_is_named() -> None:
    ours = msgspec.structs.replace(ORIGIN, parts={"architecture": "qwen3moe"})
    with pytest.raises(PreconditionError, match=r"rope theta is 10000.0 there and absent here"):
        check_compatible(manifest(), ours)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../a", ".a", "a b", "ü", "a" * 101, "a\n"])
def test_names_that_lead_astray_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="cannot name a snapshot"):
        manifest_path(name)


def test_snapshots_lie_in_a_folder() -> None:
    assert manifest_path("main-2.b_c") == "snapshots/main-2.b_c"
