"""kt-kernel: the CPU expert kernels of KTransformers, over random weights of the model's dimensions.

The compiled module is loaded without the package around it, which wants torch and needs it for nothing
here. Back ends, all of 4.5 bits a weight:

    raw-int4          method RAWINT4: int4, a bfloat16 scale for each 32; what the package chooses with AVX-512
    raw-int4-blocked  the same with KT_RAWINT4_BACKEND=blocked
    llamafile-q4_k    method LLAMAFILE on Q4_K, its 4-bit format nearest to the others (it has no IQ4_NL)

A request goes through `CPUInfer` as in the package's wrapper. The thread of its queue and `sync` spin beside
the workers, so with as many workers as processors threads take turns by the scheduler's slices of
milliseconds: on few processors one worker less is faster for one row.
"""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from peers.job import Ids, Job, Result, time_experts

_BITS, _GROUP = 4.5, 32
_LEAST_BYTES = 1.5e9
"""Weights of all layers, more than caches hold."""
_Q4_K, _BF16 = 12, 30
_CLASSES = {
    "raw-int4": ("AMXInt4_KGroup_MOE", "AVXVNNI256RawInt4_MOE", "AVX2RawInt4_MOE"),
    "raw-int4-blocked": ("AMXInt4_KGroupBlocked_MOE",),
    "llamafile-q4_k": ("MOE",),
}
_SCALE = 0x3C24  # about 0.01 as bfloat16


def load_extension() -> Any:
    """The module compiled for this processor, found as the package does."""
    package = importlib.util.find_spec("kt_kernel")
    assert package is not None, "kt-kernel is not installed"
    assert package.origin is not None, "kt-kernel has no files"
    spec = importlib.util.spec_from_file_location("detect", Path(package.origin).with_name("_cpu_detect.py"))
    assert spec is not None, "kt-kernel has no _cpu_detect"
    assert spec.loader is not None, "kt-kernel has no _cpu_detect"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.initialize()[0]


def pointer(array: npt.NDArray[Any]) -> int:
    """The address of an array's bytes."""
    return int(array.ctypes.data)


class Experts:
    """Layers of random experts, and the threads that compute them."""

    def __init__(self, job: Job) -> None:
        self._job, self._ext = job, load_extension()
        pool = self._ext.WorkerPoolConfig()
        pool.subpool_count, pool.subpool_numa_map, pool.subpool_thread_count = 1, [0], [job.workers]
        self._cpu = self._ext.CPUInfer(pool)
        self._kept = list[npt.NDArray[Any]]()
        self._mask = np.zeros(job.experts, np.uint8)
        self._identity = np.arange(job.experts, dtype=np.int64)
        self.expert_bytes = 3 * job.hidden * job.ffn * _BITS / 8
        count = math.ceil(_LEAST_BYTES / (job.experts * self.expert_bytes))
        self.layers = [self._layer(number) for number in range(count)]
        shape = (job.prompt, job.hidden)
        x = np.random.default_rng(0).standard_normal(shape, np.float32)
        self._x, self._y = (x.view(np.uint32) >> 16).astype(np.uint16), np.zeros(shape, np.uint16)
        self._weights = np.full((job.prompt, job.top_k), 1 / job.top_k, np.float32)
        self._rows = np.zeros(2, np.int64)

    def _layer(self, number: int) -> Any:
        job, ext = self._job, self._ext
        config = ext.moe.MOEConfig(job.experts, job.top_k, job.hidden, job.ffn, pointer(self._mask))
        config.layer_idx, config.pool, config.max_len = number, self._cpu.backend_, job.prompt
        weights = self._gguf_weights(config) if job.backend == "llamafile-q4_k" else self._raw_weights(config)
        kind = next(found for name in _CLASSES[job.backend] if (found := getattr(ext.moe, name, None)))
        moe = kind(config)
        self._cpu.submit(moe.load_weights_task(pointer(self._identity)))
        self._cpu.sync()
        if job.backend == "llamafile-q4_k":
            self._kept += weights  # the others were copied
        return moe

    def _raw_weights(self, config: Any) -> list[npt.NDArray[Any]]:
        job, kept = self._job, list[npt.NDArray[Any]]()
        quant = config.quant_config
        quant.bits, quant.group_size, quant.zero_point = 4, _GROUP, False
        generator = np.random.default_rng(0)
        weights = job.hidden * job.ffn
        for part in ("gate", "up", "down"):
            codes = generator.integers(0, 256, (job.experts, weights // 2), np.uint8)
            scales = np.full((job.experts, weights // _GROUP), _SCALE, np.uint16)
            setattr(config, f"{part}_projs", [[pointer(expert) for expert in codes]])
            setattr(config, f"{part}_scales", [[pointer(expert) for expert in scales]])
            kept += [codes, scales]
        return kept

    def _gguf_weights(self, config: Any) -> list[npt.NDArray[Any]]:
        job, kept = self._job, list[npt.NDArray[Any]]()
        config.m_block, config.group_min_len, config.group_max_len = 32, 10, job.prompt
        config.hidden_type = self._ext.kvcache.ggml_type(_BF16)
        generator = np.random.default_rng(0)
        for part in ("gate", "up", "down"):
            # Bytes of which any two are a float16 of normal size.
            blocks = generator.integers(0x24, 0x2C, int(job.experts * job.hidden * job.ffn * _BITS / 8), np.uint8)
            setattr(config, f"{part}_proj", pointer(blocks))
            setattr(config, f"{part}_type", self._ext.kvcache.ggml_type(_Q4_K))
            kept.append(blocks)
        return kept

    def run(self, layer: int, ids: Ids) -> None:
        """One layer's experts for rows routed to `ids`, [rows, top_k]."""
        self._rows[0] = len(ids)
        addresses = [pointer(array) for array in (ids, self._weights, self._x, self._y)]
        self._cpu.submit(self.layers[layer].forward_task(pointer(self._rows), ids.shape[1], *addresses, False))  # noqa: FBT003
        self._cpu.sync()


if __name__ == "__main__":
    given = Job.from_command_line()
    experts = Experts(given)
    one, many = time_experts(given, len(experts.layers), experts.run)
    Result(format=given.backend, one_row_us=one, many_rows_ms=many, expert_bytes=experts.expert_bytes).print()
