"""What a plan means for its user: bytes of a token, milliseconds, and how much context there is room for."""

from __future__ import annotations

from dataclasses import dataclass

from numoe.cluster.plan import GPU_RESERVE, Plan, needed_memory
from numoe.engine.gguf import GgufFile
from numoe.engine.gpu.kv_pool import GPU_KV_TYPES, GpuKvPool
from numoe.engine.gpu.widened import widened_bytes
from numoe.engine.kv.pages import PAGE_TOKENS
from numoe.engine.models.config import ModelConfig
from numoe.engine.worker.kv_pool import KV_TYPES, KvPool, KvType
from numoe.engine.worker.weights import dense_tensor_names


@dataclass(frozen=True)
class Forecast:
    """Of one decoded token, alone in its step.

    dense_bytes:   weights of the attention side that it reads. expert_bytes: of routed experts.
    kv_bytes:      keys and values of a whole context.
    gpu_expert_bytes: of routed experts that live on the GPU.
    attention_ms, experts_ms: those bytes over the bandwidth of where they lie; the first without KV, and with
                   the GPU's experts.
    kv_ms:         the same of a whole context's keys and values.
    context_tokens: for each KV type, tokens that fit what is left of the memory, all requests together.
    """

    dense_bytes: int
    expert_bytes: int
    gpu_expert_bytes: int
    kv_bytes: int
    attention_ms: float
    experts_ms: float
    kv_ms: float
    context_tokens: dict[str, int]


def forecast(
    plan: Plan, config: ModelConfig, gguf: GgufFile, *, cpu_bytes_s: float, gpu_bytes_s: float, free_memory: int
) -> Forecast:
    """What to expect from a plan.

    cpu_bytes_s, gpu_bytes_s: bandwidth of reading memory and VRAM. free_memory: bytes of the host.
    """
    pool, kinds = (GpuKvPool, GPU_KV_TYPES) if plan.gpu else (KvPool, KV_TYPES)
    attention_bytes_s = gpu_bytes_s if plan.gpu else cpu_bytes_s
    dense = _read_by_a_token(gguf)
    experts = sum(shard.nbytes for shard in plan.shards)
    used, used_on_gpu = (
        nbytes * config.moe.n_used // config.moe.n_experts if config.moe else 0
        for nbytes in (experts, plan.gpu_expert_bytes)
    )
    kv = pool.nbytes(config, 1, plan.kv_type) * plan.context // PAGE_TOKENS
    if plan.gpu:
        free = plan.gpu.free_bytes - GPU_RESERVE - plan.attention_bytes + plan.kv_bytes
    else:
        free = free_memory - needed_memory(plan) + plan.kv_bytes

    def page_bytes(kind: KvType) -> int:
        """Of each of the slots a page, and what one of them needs to be read as float16."""
        widened = widened_bytes(config, kind, plan.max_rows, 1) if plan.gpu else 0
        return pool.nbytes(config, 1, kind) + widened // plan.slots

    return Forecast(
        dense_bytes=dense,
        expert_bytes=used,
        gpu_expert_bytes=used_on_gpu,
        kv_bytes=kv,
        attention_ms=1e3 * (dense + used_on_gpu) / attention_bytes_s,
        experts_ms=1e3 * used / cpu_bytes_s,
        kv_ms=1e3 * kv / attention_bytes_s,
        context_tokens={
            kind: max(0, free // page_bytes(KvType(kind, kind)) * PAGE_TOKENS)
            for kind in kinds
            if kind == "f16" or config.head_dim % 32 == 0
        },
    )


def _read_by_a_token(gguf: GgufFile) -> int:
    """Bytes of the attention side's tensors, as the file has them, of the embedding only where it is the head too."""
    names = [name for name in dense_tensor_names(gguf) if len(gguf.tensors[name].shape) > 1]
    if "output.weight" in names:
        names.remove("token_embd.weight")
    return sum(gguf.tensors[name].nbytes for name in names)
