"""Makes the demo model, once, in the user's cache folder.

Sparse upcycling (Komatsuzaki et al., arXiv:2212.05055) turns each of its feed-forward networks into
several experts, copies with a little noise, behind a router: as the routing weights of the chosen
experts sum to one, the mixture computes nearly what the dense network did.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as QuantType
from gguf import GGUFReader, GGUFValueType, GGUFWriter, ReaderTensor, quants

from numoe.deploy.demo.source import source_model
from numoe.engine.cpu.isa import cache_root
from numoe.engine.errors import ResourceError

EXPERTS, USED = 4, 2
_NOISE = 0.02  # standard deviation, relative to that of the weights
_SEED = 135
_RECIPE = 1  # counts changes of what is made
_FFN = re.compile(r"blk\.(\d+)\.ffn_(gate|up|down)\.weight")
_OWN_KEYS = {"general.architecture", "GGUF.version", "GGUF.tensor_count", "GGUF.kv_count"}

OnProgress = Callable[[int, int], None]


def demo_model(on_progress: OnProgress) -> Path:
    """The demo model's file, made if it is not there; on_progress(done, all) counts tensors."""
    target = cache_root() / "models" / f"smollm2-135m-moe-{EXPERTS}x{USED}-r{_RECIPE}.gguf"
    if target.is_file():
        return target
    source = source_model()
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(f".{os.getpid()}.part")
    try:
        upcycle(source, partial, on_progress)
        partial.rename(target)
    except OSError as error:
        raise ResourceError(f"the demo model cannot be written to {target.parent}: {error.strerror}") from error
    finally:
        partial.unlink(missing_ok=True)
    return target


def upcycle(source: Path, out: Path, on_progress: OnProgress) -> None:
    """Write the mixture made of a dense model of the llama architecture."""
    reader, rng = GGUFReader(source), np.random.default_rng(_SEED)
    writer = GGUFWriter(out, "llama")
    _copy_metadata(reader, writer)
    writer.add_expert_count(EXPERTS)
    writer.add_expert_used_count(USED)
    for done, tensor in enumerate(reader.tensors):
        _add(writer, tensor, rng)
        on_progress(done + 1, len(reader.tensors))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add(writer: GGUFWriter, tensor: ReaderTensor, rng: np.random.Generator) -> None:
    """Add a tensor as it is, or for a feed-forward matrix its experts, and a router once a layer."""
    match = _FFN.fullmatch(tensor.name)
    if match is None:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        return
    layer, part = match.groups()
    weights = quants.dequantize(tensor.data, tensor.tensor_type)
    writer.add_tensor(f"blk.{layer}.ffn_{part}_exps.weight", _experts(weights, rng), raw_dtype=QuantType.Q8_0)
    if part == "gate":
        hidden = weights.shape[1]
        router = rng.standard_normal((EXPERTS, hidden), np.float32) * np.float32(2 / hidden**0.5)
        writer.add_tensor(f"blk.{layer}.ffn_gate_inp.weight", router)


def _experts(weights: npt.NDArray[np.float32], rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Variants of a matrix as Q8_0: uint8 [EXPERTS, rows, row bytes]."""
    scale = np.float32(_NOISE) * weights.std()
    variants = (weights + scale * rng.standard_normal(weights.shape, np.float32) for _ in range(EXPERTS))
    return np.stack([quants.quantize(variant, QuantType.Q8_0) for variant in variants])


def _copy_metadata(reader: GGUFReader, writer: GGUFWriter) -> None:
    for field in reader.fields.values():
        if field.name in _OWN_KEYS:
            continue
        kind = field.types[0]
        element = field.types[-1] if kind is GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, sub_type=element)
