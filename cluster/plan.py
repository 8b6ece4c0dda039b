"""The placement plan: what runs where, with how many threads and how much memory."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil

from numoe.cluster.topology import Topology
from numoe.engine.errors import InputError, ResourceError
from numoe.engine.experts.mailbox import MailboxLayout
from numoe.engine.experts.shard import ShardSlice, plan_slice, slice_bytes
from numoe.engine.formats import shape_of
from numoe.engine.gguf import GgufFile
from numoe.engine.kv.pages import pages_for
from numoe.engine.models.config import ModelConfig
from numoe.engine.worker.kv_pool import F16, KvPool, KvType
from numoe.engine.worker.weights import dense_tensor_names

DEFAULT_CONTEXT = 8192
DEFAULT_SLOTS = 4
DEFAULT_CHUNK = 256
DEFAULT_QUEUE = 64
MAX_SLOTS = 256
_SHM_FREE = Path("/dev/shm")  # noqa: S108 - that is where weights live


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """What the user may say; None chooses.

    context: tokens of a request at most. slots: requests that run at once. threads: of all shards
    together, and of the attention worker. shards: expert shards. chunk: prompt tokens a step.
    queue: requests that may wait. kv_type: of the KV cache.
    """

    context: int | None = None
    slots: int | None = None
    threads: int | None = None
    shards: int | None = None
    chunk: int | None = None
    queue: int | None = None
    kv_type: KvType = F16


@dataclass(frozen=True, kw_only=True)
class ShardPlacement:
    """One expert shard: its NUMA node, threads and bytes of weights."""

    index: int
    numa_node: int
    threads: int
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything the actors need to know to start; a value that is sent to each of them.

    cpus: processors that may be used. dense_bytes: of the attention side's weights. kv_bytes: of
    its pages.
    """

    model: str
    context: int
    slots: int
    chunk: int
    queue: int
    n_pages: int
    kv_type: KvType
    cpus: int
    attention_threads: int
    shards: tuple[ShardPlacement, ...]
    dense_bytes: int
    kv_bytes: int
    mailbox: MailboxLayout | None

    @property
    def max_rows(self) -> int:
        """Rows of a step at most: a chunk of prompts and a token of every slot."""
        return self.chunk + self.slots

    @property
    def threads_on_host(self) -> int:
        """Threads of all actors together."""
        return self.attention_threads + sum(shard.threads for shard in self.shards)

    @property
    def shared_bytes(self) -> int:
        """Bytes in shared memory: expert weights and the mailbox."""
        return sum(shard.nbytes for shard in self.shards) + (self.mailbox.nbytes if self.mailbox else 0)

    @property
    def total_bytes(self) -> int:
        """Bytes of memory that the model and its caches take."""
        return self.shared_bytes + self.dense_bytes + self.kv_bytes


def make_plan(config: ModelConfig, gguf: GgufFile, topology: Topology, options: PlanOptions) -> Plan:
    """Place a model on a host; InputError for options that make no sense."""
    options.kv_type.check(config)
    slots = _positive("--parallel", options.slots, DEFAULT_SLOTS, MAX_SLOTS)
    context = _positive("--ctx-size", options.context, min(config.context, DEFAULT_CONTEXT), config.context)
    chunk = _positive("--chunk", options.chunk, min(DEFAULT_CHUNK, context), 8192)
    threads = _positive("--threads", options.threads, topology.cpus, 4096)
    queue = _positive("--queue", options.queue, DEFAULT_QUEUE, 1 << 20)
    pages = slots * pages_for(context)
    shards: tuple[ShardPlacement, ...] = ()
    mailbox = None
    if config.moe is not None:
        count = _positive("--shards", options.shards, len(topology.nodes), config.moe.ffn // 32)
        shards = _place_shards(config, gguf, topology, count, threads)
        mailbox = MailboxLayout(count, chunk + slots, config.moe.n_used, config.hidden)
    return Plan(
        model=str(gguf.path.resolve()),
        context=context,
        slots=slots,
        chunk=chunk,
        queue=queue,
        n_pages=pages,
        kv_type=options.kv_type,
        cpus=topology.cpus,
        attention_threads=threads,
        shards=shards,
        dense_bytes=sum(_packed_bytes(gguf, name) for name in dense_tensor_names(gguf)),
        kv_bytes=KvPool.nbytes(config, pages, options.kv_type),
        mailbox=mailbox,
    )


def _place_shards(
    config: ModelConfig, gguf: GgufFile, topology: Topology, count: int, threads: int
) -> tuple[ShardPlacement, ...]:
    placements = []
    for index in range(count):
        node = topology.nodes[index * len(topology.nodes) // count]
        share = threads * (index + 1) // count - threads * index // count
        nbytes = slice_bytes(plan_slice(config, gguf, ShardSlice(index, count)))
        placements.append(ShardPlacement(index=index, numa_node=node.id, threads=max(1, share), nbytes=nbytes))
    return tuple(placements)


def check_memory(plan: Plan, available: int | None = None, shared: int | None = None) -> None:
    """ResourceError, saying how much is missing, if the plan does not fit the host's free memory.

    available, shared: free bytes of memory and of /dev/shm, default what the host has now.
    """
    available = psutil.virtual_memory().available if available is None else available
    if plan.total_bytes > available:
        raise ResourceError(
            f"the model needs {_gb(plan.total_bytes)} of memory ({_gb(plan.total_bytes - plan.kv_bytes)} weights, "
            f"{_gb(plan.kv_bytes)} KV cache) and {_gb(available)} is available: {_gb(plan.total_bytes - available)} "
            "is missing; free memory, lower --ctx-size or --parallel, or use a smaller quantization"
        )
    shared = shutil.disk_usage(_SHM_FREE).free if shared is None else shared
    if plan.shared_bytes > shared:
        raise ResourceError(
            f"the experts need {_gb(plan.shared_bytes)} of shared memory and {_SHM_FREE} has {_gb(shared)} free: "
            f"{_gb(plan.shared_bytes - shared)} is missing; enlarge it (mount -o remount,size=... {_SHM_FREE}; "
            "in a container --shm-size)"
        )


def _packed_bytes(gguf: GgufFile, name: str) -> int:
    info = gguf.tensors[name]
    return shape_of(info.qtype, info.rows, info.shape[-1]).nbytes if len(info.shape) > 1 else 4 * info.shape[0]


def _positive(flag: str, value: int | None, default: int, most: int) -> int:
    if value is None:
        return min(default, most)
    if not 1 <= value <= most:
        raise InputError(f"{flag} {value} is not possible: give a number from 1 to {most}")
    return value


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB"


