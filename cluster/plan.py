"""The placement plan: what runs where, with how many threads and how much memory."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

from numoe.cluster.cores import Seating, Seats
from numoe.cluster.topology import Topology, available_memory
from numoe.engine.errors import InputError, ResourceError
from numoe.engine.experts.mailbox import MailboxLayout
from numoe.engine.experts.shard import ShardSlice, expert_layers, expert_names, plan_slice, slice_bytes
from numoe.engine.gguf import GgufFile
from numoe.engine.gpu.device import Device
from numoe.engine.gpu.kv_pool import GpuKvPool, check_kv_type
from numoe.engine.gpu.weights import dense_bytes, work_bytes
from numoe.engine.gpu.widened import widened_bytes
from numoe.engine.kv.pages import pages_for
from numoe.engine.models.config import ModelConfig
from numoe.engine.weights import HugePools, SliceKey, is_loaded, shm_medium, source_fingerprint
from numoe.engine.weights import slice_bytes as packed_bytes
from numoe.engine.worker.kv_pool import F16, KvPool, KvType
from numoe.engine.worker.weights import DENSE, dense_tensor_names, plan_dense

DEFAULT_CONTEXT = 8192
DEFAULT_SLOTS = 4
DEFAULT_CHUNK = 256
DEFAULT_GPU_CHUNK = 2048
DEFAULT_QUEUE = 64
MAX_SLOTS = 256
DEVICES = ("auto", "cpu", "gpu")
GPU_RESERVE = 1 << 30
"""Bytes of VRAM that are left to CUDA's context, its libraries' workspaces and captured graphs."""
PROCESSES_BYTES, SHARD_PROCESS_BYTES = 1080 << 20, 110 << 20
"""What a server takes beside the model, as measured: Ray's and numoe's processes with spares, and each shard's."""
_SHM_FREE = Path("/dev/shm")  # noqa: S108 - that is where weights live


@dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """Where conversations are kept beyond the KV pages; by default nowhere.

    store_url: as `open_store` takes it, "" for no store; store_endpoint: of its server, "" for the usual one.
    store_limit_bytes: of chunks in the store, None for no limit. cache_ram_bytes: of chunks in host
    memory, 0 for none. resume: idle slots are saved, at the latest at the stop, and offered again at the start.
    prompt_cache_file: what slot 0 begins with and leaves its prompt's state in, "" for none;
    prompt_cache_all: with the generated tokens too. keep: tokens of the prompt that stay when the
    context is full and generation goes on without the middle, -1 for all, None to end it there.
    """

    store_url: str = ""
    store_endpoint: str = ""
    store_limit_bytes: int | None = None
    cache_ram_bytes: int = 0
    resume: bool = False
    prompt_cache_file: str = ""
    prompt_cache_all: bool = False
    keep: int | None = None


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """What the user may say; None chooses.

    context: tokens of a request at most. slots: requests that run at once. threads: of all shards
    together, and of the attention worker. shards: expert shards. chunk: prompt tokens a step.
    queue: requests that may wait. kv_type: of the KV cache. device: where attention runs, one of DEVICES.
    gpu_layers: how many layers' routed experts live on the GPU, None for as many as there is room for.
    gpu_memory: bytes of VRAM to use at most. cache: what outlives a request. numa: see `cores.choose_nodes`.
    """

    context: int | None = None
    slots: int | None = None
    threads: int | None = None
    shards: int | None = None
    chunk: int | None = None
    queue: int | None = None
    kv_type: KvType = F16
    device: str = "auto"
    gpu_layers: int | None = None
    gpu_memory: int | None = None
    cache: CacheOptions = CacheOptions()
    numa: str = "auto"


@dataclass(frozen=True, kw_only=True)
class ShardPlacement:
    """One expert shard: where it runs, and its bytes of weights."""

    index: int
    seats: Seats
    nbytes: int

    @property
    def threads(self) -> int:
        """Threads that compute."""
        return self.seats.threads

    @property
    def numa_node(self) -> int | None:
        """The node that it is on, the first if it is on several, None without any."""
        return self.seats.nodes[0] if self.seats.nodes else None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything the actors need to know to start; a value that is sent to each of them.

    model: the file to open. files: all of its files. source: their fingerprint, which weights in shared memory have.
    cpus: processors that may be used. gpu: where attention runs, None for the CPUs. dense_bytes: of
    the attention side's weights. kv_bytes: of its pages, and of the float16 ones that a GPU makes of some.
    work_bytes: of a GPU's buffers. gpu_layers: how many layers' routed experts, the first ones, live on the
    GPU; gpu_expert_bytes: of them. The shards hold the others; there are none if no layer is left to them.
    """

    model: str
    files: tuple[str, ...]
    source: str
    context: int
    slots: int
    chunk: int
    queue: int
    n_pages: int
    kv_type: KvType
    cpus: int
    gpu: Device | None
    attention: Seats
    shards: tuple[ShardPlacement, ...]
    dense_bytes: int
    kv_bytes: int
    work_bytes: int
    gpu_layers: int
    gpu_expert_bytes: int
    mailbox: MailboxLayout | None
    cache: CacheOptions

    @property
    def max_rows(self) -> int:
        """Rows of a step at most: a chunk of prompts and a token of every slot."""
        return self.chunk + self.slots

    @property
    def attention_threads(self) -> int:
        """Threads of the attention worker that compute, one where a GPU does."""
        return self.attention.threads

    @property
    def threads_on_host(self) -> int:
        """Threads of all actors together, more than there are processors where two have to share one."""
        threads = self.attention_threads + sum(shard.threads for shard in self.shards)
        cpus = [cpu for seats in (self.attention, *(shard.seats for shard in self.shards)) for cpu in seats.cpus]
        return max(threads, self.cpus + 1) if len(set(cpus)) < len(cpus) else threads

    @property
    def slices(self) -> dict[SliceKey, int]:
        """The slices of weights in shared memory, and their bytes: of each shard, and of attention on CPUs."""
        found = {self.expert_slice(shard.index): shard.nbytes for shard in self.shards}
        return found if self.gpu else {**found, self.dense_slice: self.dense_bytes}

    def expert_slice(self, index: int) -> SliceKey:
        """The slice of a shard."""
        return SliceKey(source=self.source, cut=self.cut(index).name, nodes=self.shards[index].seats.memory)

    def cut(self, index: int) -> ShardSlice:
        """What a shard holds of the experts."""
        return ShardSlice(index, len(self.shards), self.gpu_layers)

    @property
    def dense_slice(self) -> SliceKey:
        """The slice of attention on CPUs."""
        return SliceKey(source=self.source, cut=DENSE, nodes=self.attention.memory)

    @property
    def shared_bytes(self) -> int:
        """Bytes in shared memory: weights and the mailbox."""
        return sum(self.slices.values()) + (self.mailbox.nbytes if self.mailbox else 0)

    @property
    def attention_bytes(self) -> int:
        """Bytes that the attention side takes, in memory or in VRAM."""
        return self.dense_bytes + self.kv_bytes + self.work_bytes + self.gpu_expert_bytes

    @property
    def total_bytes(self) -> int:
        """Bytes of memory that the model and its caches take, in VRAM not counted."""
        return self.shared_bytes + (0 if self.gpu else self.kv_bytes + self.work_bytes)

    @property
    def process_bytes(self) -> int:
        """Bytes of memory that the server's processes take beside that."""
        return PROCESSES_BYTES + SHARD_PROCESS_BYTES * len(self.shards)


def make_plan(
    config: ModelConfig, gguf: GgufFile, topology: Topology, options: PlanOptions, gpu: Device | None = None
) -> Plan:
    """Place a model on a host, attention on `gpu` if there is one; InputError for options that make no sense."""
    if options.device not in DEVICES:
        raise InputError(f"--device {options.device} is not one of {', '.join(DEVICES)}")
    if gpu:
        check_kv_type(config, options.kv_type)
        gpu = _capped(gpu, options.gpu_memory)
    else:
        options.kv_type.check(config)
    slots = _positive("--parallel", options.slots, DEFAULT_SLOTS, MAX_SLOTS)
    context = _positive("--ctx-size", options.context, min(config.context, DEFAULT_CONTEXT), config.context)
    if options.cache.keep is not None and options.cache.keep >= context:
        raise InputError(f"--keep {options.cache.keep} leaves nothing of a context of {context} (--ctx-size)")
    chunk = _positive("--chunk", options.chunk, min(DEFAULT_GPU_CHUNK if gpu else DEFAULT_CHUNK, context), 8192)
    # One processor is left to the worker and the gateway where the shards' threads spin for a GPU.
    cpus = len(topology.allowed_cpus)
    seating = Seating(topology, options.numa, spare=gpu is not None and cpus > 2)
    threads = None if options.threads is None else _positive("--threads", options.threads, 1, 4096)
    queue = _positive("--queue", options.queue, DEFAULT_QUEUE, 1 << 20)
    pages = slots * pages_for(context)
    placed_kv = (GpuKvPool if gpu else KvPool).nbytes(config, pages, options.kv_type)
    if gpu:
        placed_kv += widened_bytes(config, options.kv_type, chunk + slots, pages_for(context))
    dense = dense_bytes(gguf, dense_tensor_names(gguf)) if gpu else packed_bytes(plan_dense(gguf))
    count = 0
    if config.moe is not None:
        count = _positive("--shards", options.shards, len(seating.nodes), config.moe.ffn // 32)
    cuts = [ShardSlice(i, count) for i in range(count)]
    work = work_bytes(config, gguf, cuts, chunk + slots) if gpu else 0
    free = gpu.free_bytes - GPU_RESERVE - dense - placed_kv - work if gpu else 0
    on_gpu = _choose_resident(config, gguf, options.gpu_layers, free, has_gpu=gpu is not None)
    shards: tuple[ShardPlacement, ...] = ()
    mailbox = None
    if config.moe is not None and len(on_gpu) < len(expert_layers(config, gguf)):
        cuts = [replace(cut, skipped=len(on_gpu)) for cut in cuts]
        shards = _place_shards(config, gguf, seating, cuts, threads)
        mailbox = MailboxLayout(count, chunk + slots, config.moe.n_used, config.hidden)
    elif gpu:
        work = work_bytes(config, gguf, (), chunk + slots)
    return Plan(
        model=str(gguf.path.absolute()),
        files=tuple(str(path.absolute()) for path in gguf.paths),
        source=source_fingerprint(gguf.paths),
        context=context,
        slots=slots,
        chunk=chunk,
        queue=queue,
        n_pages=pages,
        kv_type=options.kv_type,
        cpus=cpus,
        gpu=gpu,
        attention=(Seats((), (), (), 1) if gpu else seating.attention(threads, (shard.seats for shard in shards))),
        shards=shards,
        dense_bytes=dense,
        kv_bytes=placed_kv,
        work_bytes=work,
        gpu_layers=len(on_gpu),
        gpu_expert_bytes=sum(on_gpu),
        mailbox=mailbox,
        cache=options.cache,
    )


def _capped(gpu: Device, most: int | None) -> Device:
    """The GPU as if no more than `most` bytes of it were free."""
    return gpu if most is None else replace(gpu, free_bytes=min(gpu.free_bytes, most))


def _choose_resident(
    config: ModelConfig, gguf: GgufFile, wanted: int | None, free: int, *, has_gpu: bool
) -> tuple[int, ...]:
    """Bytes of each layer whose routed experts go to the GPU, the first ones."""
    layers = expert_layers(config, gguf) if config.moe else []
    if wanted is not None and wanted > (len(layers) if has_gpu else 0):
        reason = f"the model has routed experts in {len(layers)} layers" if has_gpu else "no GPU is used"
        raise InputError(f"--gpu-experts {wanted} is not possible: {reason}")
    if not has_gpu:
        return ()
    sizes = [dense_bytes(gguf, expert_names(layer)) for layer in layers]
    if wanted is not None:
        return tuple(sizes[:wanted])
    return tuple(size for size, end in zip(sizes, accumulate(sizes), strict=True) if end <= free)


def _place_shards(
    config: ModelConfig, gguf: GgufFile, seating: Seating, cuts: Sequence[ShardSlice], threads: int | None
) -> tuple[ShardPlacement, ...]:
    return tuple(
        ShardPlacement(
            index=index,
            seats=seating.shard(index, len(cuts), threads),
            nbytes=slice_bytes(plan_slice(config, gguf, cut)),
        )
        for index, cut in enumerate(cuts)
    )


def check_memory(plan: Plan, available: int | None = None, shared: int | None = None) -> None:
    """ResourceError, saying how much is missing, if the plan does not fit the free memory of host and GPU.

    What lies in shared memory already is not counted, nor what has room in huge pages that are set aside.
    available, shared: free bytes of memory and of /dev/shm, default what the host has now.
    """
    if plan.gpu and plan.attention_bytes + GPU_RESERVE > plan.gpu.free_bytes:
        raise ResourceError(
            f"attention needs {_gb(plan.attention_bytes + GPU_RESERVE)} of VRAM ({_gb(plan.dense_bytes)} weights, "
            f"{_gb(plan.kv_bytes)} KV cache, {_gb(plan.work_bytes)} buffers, {_gb(plan.gpu_expert_bytes)} experts, "
            f"{_gb(GPU_RESERVE)} reserve) and of {plan.gpu.name} {_gb(plan.gpu.free_bytes)} may be used: lower "
            "--ctx-size, --parallel, --chunk or --gpu-experts, choose --cache-type-k q8_0 --cache-type-v q8_0, or "
            "--device cpu"
        )
    needed, in_shm = needed_memory(plan), plan.shared_bytes - _bytes_there(plan)
    available = available_memory() if available is None else available
    if needed > available:
        raise ResourceError(
            f"the model needs {_gb(needed)} of memory ({_gb(in_shm)} weights, "
            f"{_gb(plan.total_bytes - plan.shared_bytes)} KV cache, {_gb(plan.process_bytes)} processes) and "
            f"{_gb(available)} is available: {_gb(needed - available)} is missing; free memory (`numoe weights list` "
            "shows what earlier servers left), in a container raise its limit (--memory), lower --ctx-size or "
            "--parallel, or use a smaller quantization"
        )
    shared = shutil.disk_usage(_SHM_FREE).free if shared is None else shared
    if in_shm > shared:
        raise ResourceError(
            f"the weights need {_gb(in_shm)} of shared memory and {_SHM_FREE} has {_gb(shared)} free: "
            f"{_gb(in_shm - shared)} is missing; enlarge it (mount -o remount,size=... {_SHM_FREE}; "
            "in a container --shm-size), or remove what lies there (`numoe weights rm`)"
        )
    _check_nodes(plan)


def needed_memory(plan: Plan) -> int:
    """Bytes of free memory that a server takes: what lies there already, or in huge pages, is not counted."""
    return plan.total_bytes - _bytes_there(plan) + plan.process_bytes


def fit_cache(plan: Plan, available: int | None = None) -> Plan:
    """The plan with no more host memory for prompts than the model leaves of `available`, default what is free now."""
    available = available_memory() if available is None else available
    left = max(0, available - needed_memory(plan))
    return replace(plan, cache=replace(plan.cache, cache_ram_bytes=min(plan.cache.cache_ram_bytes, left)))


def _check_nodes(plan: Plan) -> None:
    """ResourceError if the memory of a node does not hold all that is to be bound to it.

    Of what is spread over several nodes, each takes its part.
    """
    wanted: Counter[int] = Counter()
    for key, nbytes in _slices_to_load(plan).items():
        for node in key.nodes:
            wanted[node] += nbytes // len(key.nodes)
    for node, nbytes in wanted.items():
        free = shm_medium().free_bytes((node,))
        if nbytes > free:
            raise ResourceError(
                f"weights of {_gb(nbytes)} belong on node {node}, which has {_gb(free)} "
                "available: free memory there, choose other nodes (--numa), or do without binding (--numa off)"
            )


def _bytes_there(plan: Plan) -> int:
    """Bytes of weights that take no more memory: they are loaded, or huge pages are set aside for them."""
    return sum(plan.slices.values()) - sum(_slices_to_load(plan).values())


def _slices_to_load(plan: Plan) -> dict[SliceKey, int]:
    """The slices that take memory which is free now: what is set aside as huge pages goes to the smallest first."""
    pools, smallest_first = HugePools(), sorted(plan.slices.items(), key=lambda item: item[1])
    return {
        key: nbytes for key, nbytes in smallest_first if not (is_loaded(key) or pools.take(nbytes, key.nodes))
    }


def _positive(flag: str, value: int | None, default: int, most: int) -> int:
    if value is None:
        return min(default, most)
    if not 1 <= value <= most:
        raise InputError(f"{flag} {value} is not possible: give a number from 1 to {most}")
    return value


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB"
