"""Sound files: what is written is what is read, in one file or many."""

from __future__ import annotations

from pathlib import Path

import gguf as gguf_package
import numpy as np
import pytest
from gguf import GGMLQuantizationType

from numoe.engine.errors import ModelFileError, UnsupportedError
from numoe.engine.gguf import WEIGHT_TYPES, GgufFile
from tests import models


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return models.make_model(tmp_path_factory.mktemp("gguf") / "m.gguf", experts_type="Q4_0", layers=1)


def test_metadata_are_python_values(path):
    with GgufFile.open(path) as gguf:
        assert gguf.architecture == "qwen3moe"
        assert gguf.metadata["qwen3moe.block_count"] == 1
        assert gguf.metadata["qwen3moe.rope.freq_base"] == 10000.0
        assert gguf.metadata["tokenizer.ggml.add_bos_token"] is False
        assert gguf.metadata["tokenizer.ggml.tokens"][:3] == ["Ā", "ā", "Ă"]
        assert gguf.metadata["tokenizer.ggml.token_type"][255:257] == [1, 1]
        kinds = {type(value) for value in gguf.metadata.values()}
        assert kinds == {str, int, float, bool, list}


def test_agrees_with_the_gguf_package(path):
    reader = gguf_package.GGUFReader(path)
    with GgufFile.open(path) as gguf:
        assert list(gguf.tensors) == [tensor.name for tensor in reader.tensors]
        for tensor in reader.tensors:
            info = gguf.tensors[tensor.name]
            assert (info.offset, info.nbytes) == (tensor.data_offset, tensor.n_bytes)
            assert info.shape == tuple(reversed(tensor.shape.tolist()))
            assert info.qtype == tensor.tensor_type
            assert np.array_equal(gguf.read(info.name).reshape(-1), tensor.data.view(np.uint8).reshape(-1))
        for key, value in gguf.metadata.items():
            field = reader.get_field(key)
            assert field is not None
            assert field.contents() == value


def test_read_is_a_view_and_dequantize_is_float32(path):
    with GgufFile.open(path) as gguf:
        name = "blk.0.ffn_down_exps.weight"
        info, raw = gguf.tensors[name], gguf.read(name)
        assert info.shape == (8, 128, 128)
        assert info.rows == 8 * 128
        assert raw.shape == (8, 128, info.row_bytes)
        assert raw.base is not None
        assert not raw.flags.writeable
        assert raw.nbytes == info.nbytes
        values = gguf.dequantize(name)
        assert values.shape == info.shape
        assert values.dtype == np.float32
        assert gguf.size_bytes == path.stat().st_size


def test_arrays_outlive_the_file(path):
    with GgufFile.open(path) as gguf:
        raw = gguf.read("output_norm.weight")
        before = raw.copy()
    assert np.array_equal(raw, before)
    with pytest.raises(ValueError, match="closed"):
        gguf.read("output_norm.weight")


def test_missing_tensor_is_named(path):
    with GgufFile.open(path) as gguf, pytest.raises(ModelFileError, match=r"'no\.such' is missing"):
        gguf.read("no.such")


@pytest.mark.parametrize("qtype", models.WEIGHT_TYPES)
def test_every_weight_type_dequantizes_to_sane_weights(tmp_path, qtype):
    path = models.make_model(tmp_path / "m.gguf", "llama", attn_type=qtype, layers=1)
    with GgufFile.open(path) as gguf:
        gguf.check_weight_types()
        values = gguf.dequantize("blk.0.attn_q.weight")
        assert abs(values.std() * values.shape[1] ** 0.5 - 1) < 0.1
        assert abs(values.mean()) < 0.1 * values.std()


def test_the_supported_types_are_the_documented_ones():
    assert {qtype.name for qtype in WEIGHT_TYPES} == set(models.WEIGHT_TYPES)


def test_unsupported_weight_type_opens_but_does_not_load(tmp_path):
    model = models.build_model("llama", layers=1)
    model.tensors["blk.0.attn_q.weight"] = (np.zeros((256, 8192 // 256 * 66), np.uint8), "IQ2_XXS")
    with GgufFile.open(model.write(tmp_path / "m.gguf")) as gguf:
        assert gguf.tensors["blk.0.attn_q.weight"].qtype == GGMLQuantizationType.IQ2_XXS
        gguf.check_weight_types(["output_norm.weight"])
        with pytest.raises(UnsupportedError, match=r"blk\.0\.attn_q\.weight.*IQ2_XXS.*Q8_0.*IQ4_XS"):
            gguf.check_weight_types()


def write_split(folder: Path, splits: int = 3) -> tuple[models.TinyModel, list[Path]]:
    model = models.build_model("llama", layers=2)
    model.write(folder / "whole.gguf")
    model.write(folder / "part.gguf", splits)
    return model, sorted(folder.glob("part-*.gguf"))


def test_a_split_model_reads_like_a_whole_one_by_any_part(tmp_path):
    _, parts = write_split(tmp_path)
    with GgufFile.open(tmp_path / "whole.gguf") as whole:
        for part in parts:
            with GgufFile.open(part) as split:
                assert split.path == parts[0]
                assert split.paths == tuple(parts)
                assert split.size_bytes == sum(p.stat().st_size for p in parts)
                assert set(split.tensors) == set(whole.tensors)
                assert whole.metadata.items() <= split.metadata.items()
                assert all(np.array_equal(split.read(name), whole.read(name)) for name in whole.tensors)


def test_split_by_relative_path(tmp_path, monkeypatch):
    _, parts = write_split(tmp_path)
    monkeypatch.chdir(tmp_path)
    with GgufFile.open(parts[1].name) as split:
        assert split.architecture == "llama"


def test_missing_part_is_named(tmp_path):
    _, parts = write_split(tmp_path)
    parts[1].unlink()
    with pytest.raises(ModelFileError, match=r"1 of 3 parts missing.*part-00002-of-00003\.gguf; download"):
        GgufFile.open(parts[0])


def test_renamed_part_is_refused(tmp_path):
    _, parts = write_split(tmp_path)
    parts[0].rename(tmp_path / "model.gguf")
    with pytest.raises(ModelFileError, match=r"one of 3 parts.*original name"):
        GgufFile.open(tmp_path / "model.gguf")


def test_swapped_parts_are_refused(tmp_path):
    _, parts = write_split(tmp_path)
    parts[0].rename(tmp_path / "x")
    parts[1].rename(parts[0])
    (tmp_path / "x").rename(parts[1])
    with pytest.raises(ModelFileError, match=r"is part 2 of 3, by its name 1 of 3"):
        GgufFile.open(parts[0])


def test_part_of_another_split_is_refused(tmp_path):
    _, parts = write_split(tmp_path)
    other = tmp_path / "part-00001-of-00002.gguf"
    parts[0].rename(other)
    with pytest.raises(ModelFileError, match="named one of 2 parts, but made as one of 3"):
        GgufFile.open(other)


def test_part_of_a_model_with_other_tensors_is_refused(tmp_path):
    _, parts = write_split(tmp_path)
    (tmp_path / "b").mkdir()
    models.build_model("llama", layers=1).write(tmp_path / "b" / "part.gguf", 3)
    (tmp_path / "b" / parts[2].name).replace(parts[2])
    with pytest.raises(ModelFileError, match=r"tensor .* is in another part too|parts hold"):
        GgufFile.open(parts[0])


def test_truncated_later_part_is_named(tmp_path):
    _, parts = write_split(tmp_path)
    parts[2].write_bytes(parts[2].read_bytes()[:-64])
    with pytest.raises(ModelFileError, match=r"part-00003-of-00003\.gguf.*past the file's end"):
        GgufFile.open(parts[0])


@pytest.mark.parametrize("count", [0, 1])
def test_a_name_like_a_part_of_an_unsplit_model_is_just_a_name(tmp_path, count):
    model = models.build_model("llama", layers=1)
    model.metadata["split.count"] = count
    path = model.write(tmp_path / "m-00001-of-00002.gguf")
    with GgufFile.open(path) as gguf:
        assert gguf.paths == (path,)
