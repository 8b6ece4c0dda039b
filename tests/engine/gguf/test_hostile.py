"""Damaged and hostile files: one error line with a cure, at once, in little memory."""

from __future__ import annotations

import os
import struct
import time
import tracemalloc
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from numoe.engine.errors import ModelFileError, NumoeError, UnsupportedError
from numoe.engine.gguf import GgufFile
from numoe.engine.models import ModelConfig
from tests import models

U8, U32, F32, BOOL, STRING, ARRAY, U64 = 0, 4, 6, 7, 8, 9, 10
HUGE = 1 << 60


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return u64(len(raw)) + raw


def key(name: str | bytes, kind: int, value: bytes) -> bytes:
    return text(name) + u32(kind) + value


def tensor(name: str | bytes = "w", dims: tuple[int, ...] = (32, 2), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + u32(len(dims)) + b"".join(map(u64, dims)) + u32(kind) + u64(offset)


def gguf_bytes(
    keys: list[bytes] | None = None,
    tensors: list[bytes] | None = None,
    *,
    magic: bytes = b"GGUF",
    version: bytes = u32(3),
    key_count: int | None = None,
    tensor_count: int | None = None,
    data: int = 256,
) -> bytes:
    """A file of the given pieces, by default sound: one key, one F32 tensor [2, 32] of 256 bytes."""
    keys = [key("general.architecture", STRING, text("llama"))] if keys is None else keys
    tensors = [tensor()] if tensors is None else tensors
    counts = u64(len(tensors) if tensor_count is None else tensor_count)
    counts += u64(len(keys) if key_count is None else key_count)
    header = magic + version + counts + b"".join(keys) + b"".join(tensors)
    return header + bytes(-len(header) % 32) + bytes(range(256)) * (data // 256) + bytes(data % 256)


HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "empty"),
    "magic": (gguf_bytes(magic=b"GGML"), "not a GGUF file"),
    "html": (b"<!DOCTYPE html><html></html>", "not a GGUF file"),
    "version 1": (gguf_bytes(version=u32(1)), "version 1"),
    "version 4": (gguf_bytes(version=u32(4)), "version 4"),
    "version 0": (gguf_bytes(version=u32(0)), "version 0"),
    "big-endian": (gguf_bytes(version=struct.pack(">I", 3)), "big-endian"),
    "2^60 tensors": (gguf_bytes(tensor_count=HUGE), f"claims {HUGE} tensors"),
    "2^60 keys": (gguf_bytes(key_count=HUGE), f"claims {HUGE} metadata keys"),
    "one tensor too many": (gguf_bytes(tensor_count=2, data=0), "tensor 1 has an empty name"),
    "one key too many": (gguf_bytes(key_count=2), "."),
    "2^60 key bytes": (gguf_bytes([u64(HUGE) + b"x"]), "truncated in the name of metadata key 0"),
    "2^60 string bytes": (gguf_bytes([key("s", STRING, u64(HUGE))]), "truncated in metadata key 's'"),
    "2^60 elements": (gguf_bytes([key("a", ARRAY, u32(U8) + u64(HUGE))]), f"claims {HUGE} elements"),
    "2^60 strings": (gguf_bytes([key("a", ARRAY, u32(STRING) + u64(HUGE))]), f"claims {HUGE} elements"),
    "2^64-1 string in an array": (
        gguf_bytes([key("a", ARRAY, u32(STRING) + u64(2) + text("x") + u64((1 << 64) - 1))]),
        "a string reaches past the end",
    ),
    "nested array": (
        gguf_bytes([key("a", ARRAY, u32(ARRAY) + u64(1) + u32(U8) + u64(1) + b"x")]),
        "array of arrays",
    ),
    "value type": (gguf_bytes([key("a", 13, u32(0))]), "unknown value type 13"),
    "array value type": (gguf_bytes([key("a", ARRAY, u32(99) + u64(1))]), "unknown value type 99"),
    "boolean": (gguf_bytes([key("a", BOOL, b"\x02")]), "neither 0 nor 1"),
    "key is not UTF-8": (gguf_bytes([key(b"\xff\xfe", U32, u32(0))]), "not valid UTF-8"),
    "value is not UTF-8": (gguf_bytes([key("a", STRING, text(b"\xff"))]), "'a' is not valid UTF-8"),
    "array value is not UTF-8": (
        gguf_bytes([key("a", ARRAY, u32(STRING) + u64(1) + text(b"\xc3"))]),
        "'a' is not valid UTF-8",
    ),
    "empty key": (gguf_bytes([key("", U32, u32(0))]), "empty name"),
    "key twice": (gguf_bytes([key("a", U32, u32(0))] * 2), "'a' appears twice"),
    "tensor twice": (gguf_bytes(tensors=[tensor(), tensor(offset=256)], data=512), "'w' appears twice"),
    "tensor name is not UTF-8": (gguf_bytes(tensors=[tensor(b"\xff")]), "not valid UTF-8"),
    "empty tensor name": (gguf_bytes(tensors=[tensor("")]), "empty name"),
    "no dimensions": (gguf_bytes(tensors=[tensor(dims=())]), "0 dimensions"),
    "five dimensions": (gguf_bytes(tensors=[tensor(dims=(1,) * 5)]), "5 dimensions"),
    "2^31 dimensions": (
        gguf_bytes(tensors=[text("w") + u32(1 << 31) + bytes(64)]),
        f"{1 << 31} dimensions",
    ),
    "zero dimension": (gguf_bytes(tensors=[tensor(dims=(32, 0))]), r"dimension of zero: \[0, 32\]"),
    "2^60 rows": (gguf_bytes(tensors=[tensor(dims=(32, HUGE))]), "past the file's end"),
    "2^252 elements": (gguf_bytes(tensors=[tensor(dims=(1 << 63,) * 4)]), "past the file's end"),
    "product is 0 mod 2^64": (gguf_bytes(tensors=[tensor(dims=(1 << 32, 1 << 32))]), "past the file's end"),
    "block size": (gguf_bytes(tensors=[tensor(dims=(33, 2), kind=8)]), "33 elements.*Q8_0's 32"),
    "offset past the end": (gguf_bytes(tensors=[tensor(offset=HUGE)]), "past the file's end"),
    "offset 2^64-32": (gguf_bytes(tensors=[tensor(offset=(1 << 64) - 32)]), "past the file's end"),
    "misaligned": (gguf_bytes(tensors=[tensor(offset=4)], data=512), "no multiple of the alignment 32"),
    "overlap": (
        gguf_bytes(tensors=[tensor("a"), tensor("b", offset=224)], data=512),
        "'b' overlaps that of 'a'",
    ),
    "same place": (gguf_bytes(tensors=[tensor("a"), tensor("b")]), "overlaps"),
    "no data": (gguf_bytes(data=0), "past the file's end"),
    "alignment 0": (gguf_bytes([key("general.alignment", U32, u32(0))]), "general.alignment is '0'"),
    "alignment 24": (gguf_bytes([key("general.alignment", U32, u32(24))]), "general.alignment is 24"),
    "alignment 2^63": (gguf_bytes([key("general.alignment", U64, u64(1 << 63))]), "general.alignment"),
    "alignment text": (gguf_bytes([key("general.alignment", STRING, text("x"))]), "general.alignment"),
    "alignment true": (gguf_bytes([key("general.alignment", BOOL, b"\x01")]), "general.alignment"),
    "name with newlines": (gguf_bytes(tensors=[tensor("a\nb" * 999, dims=(0,))]), "dimension of zero"),
    "split count text": (gguf_bytes([key("split.count", STRING, text("3"))]), "split.count"),
    "split count 2^63": (gguf_bytes([key("split.count", U64, u64(1 << 63))]), "named"),
}


def check_message(message: str, path: object) -> None:
    """One line of sensible length: the file, what is wrong, and after the semicolon a cure."""
    assert "\n" not in message
    assert len(message) < 500
    assert message.startswith(str(path))
    assert "; " in message


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_file_is_refused(tmp_path, name):
    data, expected = HOSTILE[name]
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    tracemalloc.start()
    start = time.perf_counter()
    try:
        with pytest.raises(ModelFileError, match=expected) as caught:
            GgufFile.open(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert time.perf_counter() - start < 1
    assert peak < 4 << 20
    check_message(str(caught.value), path)


def test_the_pieces_make_a_sound_file(tmp_path):
    path = tmp_path / "m.gguf"
    for version in (2, 3):
        path.write_bytes(gguf_bytes(version=u32(version)))
        with GgufFile.open(path) as gguf:
            assert gguf.tensors["w"].shape == (2, 32)
            assert gguf.read("w").tobytes() == bytes(range(256))


def test_unknown_tensor_type_is_named(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes(tensors=[tensor(kind=144)]))
    with pytest.raises(UnsupportedError, match="'w' has the unknown type 144") as caught:
        GgufFile.open(path)
    check_message(str(caught.value), path)


def test_larger_alignment_is_honoured(tmp_path):
    path = tmp_path / "m.gguf"
    raw = gguf_bytes([key("general.alignment", U32, u32(128))], data=0)
    raw += bytes(-len(raw) % 128) + bytes(range(256))
    path.write_bytes(raw)
    with GgufFile.open(path) as gguf:
        assert gguf.tensors["w"].offset % 128 == 0
        assert gguf.read("w").tobytes() == bytes(range(256))


def test_not_a_file(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    cases: dict[str, Callable[[], object]] = {
        "a directory": lambda: GgufFile.open(tmp_path),
        "no such file": lambda: GgufFile.open(tmp_path / "none.gguf"),
        "not a regular file": lambda: GgufFile.open(tmp_path / "fifo"),
        "cannot be opened": lambda: GgufFile.open(tmp_path / ("x" * 5000)),
        "null": lambda: GgufFile.open("a\0b"),
    }
    for expected, open_it in cases.items():
        with pytest.raises(ModelFileError, match=expected) as caught:
            open_it()
        assert "; " in str(caught.value)


def test_truncation_at_every_byte(tmp_path):
    keys = [
        key("general.architecture", STRING, text("llama")),
        key("n", U32, u32(7)),
        key("f", F32, struct.pack("<f", 1.5)),
        key("words", ARRAY, u32(STRING) + u64(3) + text("a") + text("bc") + text("")),
        key("flags", ARRAY, u32(BOOL) + u64(2) + b"\x00\x01"),
    ]
    whole = gguf_bytes(keys, [tensor("a"), tensor("b", offset=256)], data=512)
    path = tmp_path / "m.gguf"
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(ModelFileError) as caught:
            GgufFile.open(path)
        check_message(str(caught.value), path)
    path.write_bytes(whole)
    GgufFile.open(path).close()


@pytest.fixture(scope="module")
def model_bytes(tmp_path_factory):
    path = models.make_model(
        tmp_path_factory.mktemp("fuzz") / "m.gguf",
        layers=1,
        hidden=32,
        head_dim=32,
        expert_ffn=32,
        n_experts=2,
    )
    with GgufFile.open(path) as gguf:
        header = min(info.offset for info in gguf.tensors.values())
    return path.read_bytes(), header


def load(path) -> None:
    """Whatever a model load does with an untrusted file."""
    try:
        with GgufFile.open(path) as gguf:
            for name in gguf.tensors:
                gguf.read(name)[..., -1].max()
            gguf.check_weight_types()
            ModelConfig.from_gguf(gguf)
    except NumoeError as error:
        check_message(str(error), path)


FUZZ = settings(max_examples=150, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZ
@given(data=st.data())
def test_truncated_model_loads_or_raises_numoe_error(tmp_path, model_bytes, data):
    raw, header = model_bytes
    size = data.draw(st.one_of(st.integers(0, header), st.integers(0, len(raw))))
    path = tmp_path / "m.gguf"
    path.write_bytes(raw[:size])
    load(path)


@FUZZ
@given(data=st.data())
def test_flipped_bytes_load_or_raise_numoe_error(tmp_path, model_bytes, data):
    raw, header = model_bytes
    mutated = bytearray(raw)
    # the tokens fill the header's middle; counts, keys and tensors lie at its ends
    where = st.one_of(
        st.integers(0, 1200), st.integers(header - 1200, header - 1), st.integers(0, len(raw) - 1)
    )
    for position, value in data.draw(st.lists(st.tuples(where, st.integers(0, 255)), min_size=1, max_size=4)):
        mutated[position] = value
    path = tmp_path / "m.gguf"
    path.write_bytes(mutated)
    load(path)
