"""Tiny GGUF models for tests, written with `gguf.GGUFWriter`: random weights, a working tokenizer.

    path = make_model(tmp_path / "m.gguf", "qwen3moe", experts_type="IQ4_NL")

Equal arguments give equal weights, on every machine and NumPy version. Tests that want a broken
model take `build_model`, change its `metadata` and `tensors`, and `write` it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, TokenType, quants

ARCHES = ("qwen3moe", "llama-moe", "llama")
FLOAT_TYPES = ("F32", "F16", "BF16")
QUANTIZED_TYPES = (
    "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS",
    "MXFP4",
)  # fmt: skip
WEIGHT_TYPES = FLOAT_TYPES + QUANTIZED_TYPES

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
MERGES = ("Ġ t", "h e", "Ġt he", "i n", "e r", "a n", "Ġ a", "o n", "Ġ w", "r e", "o r", "Ġt o")
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Where blocks of the types that gguf cannot quantize to keep their float16 scale and minimum, and
# the minimum, as a multiple of the scale, that centres random quants on zero.
SCALE_OFFSET = {"Q2_K": 80, "Q3_K": 108, "Q4_K": 0, "Q5_K": 0, "Q6_K": 208, "IQ4_NL": 0, "IQ4_XS": 0}
MINIMUM = {"Q2_K": (82, 1.5), "Q4_K": (2, 7.5), "Q5_K": (2, 15.5)}


@dataclass
class TinyModel:
    """A model about to be written: metadata by key, (packed rows, type) of each tensor by name.

    Packed rows are float32 arrays for F32 and uint8 [..., row_bytes] for everything else.
    """

    architecture: str
    metadata: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, tuple[np.ndarray, str]] = field(default_factory=dict)

    def write(self, path: Path, splits: int = 1) -> Path:
        """Write to `path`, or to `splits` parts named after it; the (first) file."""
        per_part = math.ceil(len(self.tensors) / splits) if splits > 1 else 0
        writer = GGUFWriter(None, self.architecture, split_max_tensors=per_part)
        for key, value in self.metadata.items():
            add_value(writer, key, value)
        for name, (data, qtype) in self.tensors.items():
            kind = GGMLQuantizationType[qtype]
            writer.add_tensor(name, data, raw_dtype=None if qtype == "F32" else kind)
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        if splits == 1:
            return path
        parts = sorted(path.parent.glob(f"{path.stem}-*-of-{splits:05d}.gguf"))
        assert len(parts) == splits, f"{len(self.tensors)} tensors do not make {splits} equal parts"
        return parts[0]


def make_model(path: Path, arch: str = "qwen3moe", *, splits: int = 1, **options: Any) -> Path:
    """Write the model that `build_model` makes of `options`; its (first) file."""
    return build_model(arch, **options).write(Path(path), splits)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What `make_model` and `build_model` take.

    arch:         "qwen3moe", "llama-moe" (Mixtral's form) or "llama" (dense).
    experts_type: of the routed experts; attn_type: of attention and the dense FFN; embd_type: of
                  embedding and output, attn_type if None. Router and norms are F32.
    hidden, expert_ffn: 128 if None, or 256 where a type's blocks need it. expert_ffn is also the
                  width of the dense FFN.
    rope_scaling: None, "linear" or "yarn", by `rope_factor` from context / rope_factor tokens.
    frequency_factors: add rope_freqs.weight, as Llama 3.1 has it.
    """

    arch: str = "qwen3moe"
    experts_type: str = "F32"
    attn_type: str = "F32"
    embd_type: str | None = None
    seed: int = 0
    layers: int = 2
    hidden: int | None = None
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    n_experts: int = 8
    n_used: int = 2
    expert_ffn: int | None = None
    rope_theta: float = 10000.0
    rope_scaling: str | None = None
    rope_factor: float = 4.0
    frequency_factors: bool = False
    tied: bool = False
    vocab: int = 288
    context: int = 512

    @property
    def architecture(self) -> str:
        return "llama" if self.arch == "llama-moe" else self.arch

    @property
    def moe(self) -> bool:
        return self.arch != "llama"

    @property
    def embedding_type(self) -> str:
        return self.embd_type or self.attn_type

    @property
    def block(self) -> int:
        types = (self.experts_type, self.attn_type, self.embedding_type)
        return max(GGML_QUANT_SIZES[GGMLQuantizationType[t]][0] for t in types)

    @property
    def width(self) -> int:
        return self.hidden or max(128, self.block)

    @property
    def ffn(self) -> int:
        return self.expert_ffn or max(128, self.block)


def build_model(arch: str = "qwen3moe", **options: Any) -> TinyModel:
    """Make a model in memory; see `Options`."""
    o = Options(arch=arch, **options)
    keys = {f"{o.architecture}.{key}": value for key, value in architecture_keys(o).items()}
    weights = Weights(o.seed)
    tensors = {
        name: (weights.packed(qtype, shape, std, mean), qtype)
        for name, qtype, shape, std, mean in tensor_list(o)
    }
    if o.frequency_factors:
        tensors["rope_freqs.weight"] = (np.geomspace(1, 8, o.head_dim // 2).astype(np.float32), "F32")
    return TinyModel(o.architecture, keys | tokenizer_metadata(o.vocab), tensors)


def architecture_keys(o: Options) -> dict[str, Any]:
    """The keys below the architecture's prefix."""
    keys: dict[str, Any] = {
        "context_length": o.context,
        "embedding_length": o.width,
        "block_count": o.layers,
        "feed_forward_length": 3 * o.ffn if o.arch == "qwen3moe" else o.ffn,
        "attention.head_count": o.heads,
        "attention.head_count_kv": o.kv_heads,
        "attention.key_length": o.head_dim,
        "attention.value_length": o.head_dim,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.dimension_count": o.head_dim,
        "rope.freq_base": o.rope_theta,
        "vocab_size": o.vocab,
    }
    if o.moe:
        keys |= {"expert_count": o.n_experts, "expert_used_count": o.n_used}
    if o.arch == "qwen3moe":
        keys["expert_feed_forward_length"] = o.ffn
    if o.rope_scaling is not None:
        keys |= {
            "rope.scaling.type": o.rope_scaling,
            "rope.scaling.factor": o.rope_factor,
            "rope.scaling.original_context_length": int(o.context / o.rope_factor),
        }
    return keys


Entry = tuple[str, str, tuple[int, ...], float, float]  # name, type, shape, deviation, mean


def tensor_list(o: Options) -> Iterator[Entry]:
    """Every random tensor; activations keep about unit variance, logits a deviation of about 4."""
    embedding_std = o.width**-0.5 if o.tied else 1.0
    yield "token_embd.weight", o.embedding_type, (o.vocab, o.width), embedding_std, 0.0
    for layer in range(o.layers):
        yield from attention_tensors(o, f"blk.{layer}.")
        yield from ffn_tensors(o, f"blk.{layer}.")
    yield norm("output_norm", o.width)
    if not o.tied:
        yield "output.weight", o.embedding_type, (o.vocab, o.width), 4 * o.width**-0.5, 0.0


def attention_tensors(o: Options, prefix: str) -> Iterator[Entry]:
    q, kv = o.heads * o.head_dim, o.kv_heads * o.head_dim
    yield norm(f"{prefix}attn_norm", o.width)
    for name, rows in (("q", q), ("k", kv), ("v", kv)):
        yield f"{prefix}attn_{name}.weight", o.attn_type, (rows, o.width), o.width**-0.5, 0.0
    yield f"{prefix}attn_output.weight", o.attn_type, (o.width, q), q**-0.5, 0.0
    if o.arch == "qwen3moe":
        yield norm(f"{prefix}attn_q_norm", o.head_dim)
        yield norm(f"{prefix}attn_k_norm", o.head_dim)


def ffn_tensors(o: Options, prefix: str) -> Iterator[Entry]:
    yield norm(f"{prefix}ffn_norm", o.width)
    suffix, qtype, lead, gain = "", o.attn_type, (), 1.7
    if o.moe:
        suffix, qtype, lead, gain = "_exps", o.experts_type, (o.n_experts,), 1.7 * o.n_used**0.5
        yield f"{prefix}ffn_gate_inp.weight", "F32", (o.n_experts, o.width), 2 * o.width**-0.5, 0.0
    for name in ("gate", "up"):
        yield f"{prefix}ffn_{name}{suffix}.weight", qtype, (*lead, o.ffn, o.width), o.width**-0.5, 0.0
    yield f"{prefix}ffn_down{suffix}.weight", qtype, (*lead, o.width, o.ffn), gain * o.ffn**-0.5, 0.0


def norm(name: str, size: int) -> Entry:
    return f"{name}.weight", "F32", (size,), 0.1, 1.0


class Weights:
    """A stream of random weights. PCG64's raw output is one of the few that NumPy promises to keep."""

    def __init__(self, seed: int) -> None:
        self._bits = np.random.PCG64(seed)

    def uniform(self, count: int) -> np.ndarray:
        """Float32 [count] between -sqrt(3) and sqrt(3): mean 0, deviation 1."""
        raw = self._bits.random_raw(count) >> np.uint64(40)
        return ((raw.astype(np.float64) / 2**23 - 1) * 3**0.5).astype(np.float32)

    def packed(self, qtype: str, shape: tuple[int, ...], std: float, mean: float = 0.0) -> np.ndarray:
        """Weights of `shape` in type `qtype`, about uniform with deviation `std`."""
        if qtype in SCALE_OFFSET:
            return self._blocks(qtype, shape, std)
        values = self.uniform(math.prod(shape)).reshape(shape) * np.float32(std) + np.float32(mean)
        if qtype == "F32":
            return values
        packed = np.ascontiguousarray(quants.quantize(values, GGMLQuantizationType[qtype]))
        return packed.view(np.uint8).reshape(*shape[:-1], -1)

    def _blocks(self, qtype: str, shape: tuple[int, ...], std: float) -> np.ndarray:
        """Random blocks under scales of either sign that give about deviation `std`."""
        kind = GGMLQuantizationType[qtype]
        block, size = GGML_QUANT_SIZES[kind]
        count = math.prod(shape) // block
        assert shape[-1] % block == 0, f"{qtype} rows need a multiple of {block} elements"
        raw = self._bits.random_raw(math.ceil(count * size / 8)).view(np.uint8)[: count * size]
        raw = raw.reshape(count, size)
        set_scales(raw, qtype, np.ones(count))
        unit = float(quants.dequantize(raw, kind).std())
        set_scales(raw, qtype, np.sign(self.uniform(count)) * (1 + 0.1 * self.uniform(count)) * std / unit)
        return raw.reshape(*shape[:-1], -1)


def set_scales(raw: np.ndarray, qtype: str, scales: np.ndarray) -> None:
    """Write `scales` [blocks], and the minima that go with them, into blocks uint8 [blocks, size]."""
    at = SCALE_OFFSET[qtype]
    raw[:, at : at + 2] = scales.astype("<f2").view(np.uint8).reshape(-1, 2)
    if qtype in MINIMUM:
        at, ratio = MINIMUM[qtype]
        raw[:, at : at + 2] = (scales * ratio).astype("<f2").view(np.uint8).reshape(-1, 2)


def tokenizer_metadata(vocab: int) -> dict[str, Any]:
    """A byte-level BPE tokenizer of `vocab` tokens: bytes, a few merges, three control tokens."""
    tokens = [*byte_characters(), *(merge.replace(" ", "") for merge in MERGES)]
    types = [TokenType.NORMAL] * len(tokens)
    first = len(tokens)
    tokens += [END_OF_TEXT, IM_START, IM_END]
    types += [TokenType.CONTROL] * 3
    assert vocab >= len(tokens), f"the vocabulary needs at least {len(tokens)} tokens"
    types += [TokenType.UNUSED] * (vocab - len(tokens))
    tokens += [f"[UNUSED{index}]" for index in range(len(tokens), vocab)]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [int(kind) for kind in types],
        "tokenizer.ggml.merges": list(MERGES),
        "tokenizer.ggml.bos_token_id": first,
        "tokenizer.ggml.eos_token_id": first + 2,
        "tokenizer.ggml.padding_token_id": first,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHATML,
    }


def byte_characters() -> Iterator[str]:
    """Each byte's printable stand-in in byte-level BPE: itself, or one of U+0100 on."""
    spare = iter(range(256, 512))
    for byte in range(256):
        printable = 33 <= byte <= 126 or 161 <= byte <= 172 or byte >= 174
        yield chr(byte if printable else next(spare))


def add_value(writer: GGUFWriter, key: str, value: Any) -> None:
    """Add a metadata value under the GGUF type that converters give its kind."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
