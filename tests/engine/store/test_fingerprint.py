"""A fingerprint follows what a model computes, and nothing else."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from numoe.engine.gguf import GgufFile
from numoe.engine.store import fingerprint as module
from numoe.engine.store.fingerprint import ModelFingerprint
from numoe.engine.weights import ContentSum
from tests.models import build_model, make_model


@pytest.fixture
def of(tmp_path: Path) -> Callable[[Path], ModelFingerprint]:
    """The fingerprint of a file, digests being kept in a folder of the test's own."""

    def fingerprint(path: Path) -> ModelFingerprint:
        with GgufFile.open(path) as gguf:
            return ModelFingerprint.from_gguf(gguf, cache=tmp_path / "digests")

    return fingerprint


Of = Callable[[Path], ModelFingerprint]


def different(a: ModelFingerprint, b: ModelFingerprint) -> set[str]:
    return {name for name in a.parts.keys() | b.parts.keys() if a.parts.get(name) != b.parts.get(name)}


def test_a_model_keeps_it_when_renamed_moved_copied_or_split(tmp_path: Path, of: Of) -> None:
    original = make_model(tmp_path / "a.gguf")
    first = of(original)
    assert len(first.digest) == 32
    assert of(original) == first
    (tmp_path / "elsewhere").mkdir()
    copied = Path(shutil.copy(original, tmp_path / "elsewhere" / "b.gguf"))
    assert of(copied).digest == first.digest
    moved = original.rename(tmp_path / "elsewhere" / "c.gguf")
    assert of(moved).digest == first.digest
    assert different(of(make_model(tmp_path / "s.gguf", splits=3)), first) == set()


def test_names_authors_and_templates_are_none_of_it(tmp_path: Path, of: Of) -> None:
    model = build_model()
    first = of(model.write(tmp_path / "a.gguf"))
    model.metadata |= {
        "general.name": "Other", "general.author": "Somebody", "general.url": "x", "tokenizer.chat_template": "{{ 1 }}",
    }  # fmt: skip
    assert of(model.write(tmp_path / "b.gguf")).digest == first.digest


@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_one_byte_of_one_tensor_changes_it(tmp_path: Path, of: Of, where: str) -> None:
    path = make_model(tmp_path / "a.gguf")
    first = of(path)
    with GgufFile.open(path) as gguf:
        tensors = sorted(gguf.tensors.values(), key=lambda tensor: tensor.offset)
    tensor = {"first": tensors[0], "middle": tensors[len(tensors) // 2], "last": tensors[-1]}[where]
    at = {"first": tensor.offset, "middle": tensor.offset + 5, "last": tensor.offset + tensor.nbytes - 1}[where]
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))
    changed = of(path)
    assert changed.digest != first.digest
    assert different(changed, first) == {"tensor contents"}


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"seed": 1}, {"tensor contents"}),
        ({"experts_type": "F16"}, {"tensor contents", "tensor types"}),
        ({"rope_theta": 5e5}, {"qwen3moe.rope.freq_base", "rope theta"}),
    ],
)
def test_another_model_of_the_same_shape_has_another(
    tmp_path: Path, of: Of, options: dict[str, Any], parts: set[str]
) -> None:
    first, other = of(make_model(tmp_path / "a.gguf")), of(make_model(tmp_path / "b.gguf", **options))
    assert first.digest != other.digest
    assert different(first, other) == parts


def test_a_swap_of_two_tensors_changes_it(tmp_path: Path, of: Of) -> None:
    model = build_model()
    first = of(model.write(tmp_path / "a.gguf"))
    a, b = "blk.0.attn_q.weight", "blk.1.attn_q.weight"
    model.tensors[a], model.tensors[b] = model.tensors[b], model.tensors[a]
    assert different(of(model.write(tmp_path / "b.gguf")), first) == {"tensor contents"}


def test_parts_can_be_read(tmp_path: Path, of: Of) -> None:
    parts = of(make_model(tmp_path / "a.gguf", experts_type="Q8_0")).parts
    assert parts["architecture"] == "qwen3moe"
    assert parts["qwen3moe.block_count"] == "2"
    assert parts["rope theta"] == "10000.0"
    assert parts["tensor types"].startswith("21 F32, 6 Q8_0 (")
    assert not [name for name in parts if name.startswith(("general.", "tokenizer."))]


@pytest.fixture
def settled(tmp_path: Path) -> Path:
    """A model of two parts that was written a while ago."""
    path = make_model(tmp_path / "m.gguf", splits=2)
    for part in tmp_path.glob("m-*.gguf"):
        os.utime(part, (time.time() - 60,) * 2)
    return path


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tensors that were read."""
    names: list[str] = []
    original = module._read
    monkeypatch.setattr(module, "_read", lambda g, n, t: names.extend(n) or original(g, n, t))
    return names


def test_tensors_are_read_once(tmp_path: Path, settled: Path, of: Of, hashed: list[str]) -> None:
    first = of(settled)
    total = len(hashed)
    assert len(set(hashed)) == total > 0
    assert of(settled) == first
    assert len(hashed) == total
    second = sorted(tmp_path.glob("m-*.gguf"))[1]
    os.utime(second, (time.time() - 30,) * 2)
    assert of(settled) == first
    assert total < len(hashed) < 2 * total  # of the part that might have changed


def test_a_damaged_or_unwritable_cache_only_costs_time(
    tmp_path: Path, settled: Path, of: Of, hashed: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    first = of(settled)
    total = len(hashed)
    for kept in (tmp_path / "digests").iterdir():
        kept.write_bytes(kept.read_bytes()[:-1] + b"\0")
    assert of(settled) == first
    assert len(hashed) == 2 * total
    (tmp_path / "digests").rename(tmp_path / "gone")
    (tmp_path / "digests").write_text("a file in its place")
    assert of(settled) == first
    assert len(hashed) == 3 * total
    assert "cannot be kept" in caplog.text


def test_a_file_just_written_is_read_again(tmp_path: Path, of: Of, hashed: list[str]) -> None:
    path = make_model(tmp_path / "a.gguf")
    for times in (1, 2):
        of(path)
        assert len(hashed) == times * len(set(hashed))


def test_what_was_read_for_something_else_is_not_read_again(tmp_path: Path, of: Of, hashed: list[str]) -> None:
    path = make_model(tmp_path / "a.gguf", experts_type="Q4_0")
    first, every = of(path), sorted(hashed)
    hashed.clear()
    with GgufFile.open(path) as gguf:
        sums = {
            name: ContentSum.of(tensor, 0, gguf.read(name).reshape(tensor.rows, tensor.row_bytes))
            for name, tensor in gguf.tensors.items()
        }
        assert ModelFingerprint.from_gguf(gguf, read=sums, cache=tmp_path / "other") == first
        assert hashed == []
        sums[every[0]] = ContentSum()
        del sums[every[1]]
        assert ModelFingerprint.from_gguf(gguf, read=sums, cache=tmp_path / "another") == first
        assert sorted(hashed) == every[:2]
