"""The flags that say where a model runs, shared by every command that starts a server."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cyclopts import Parameter

from numoe.deploy.commands.caching import parse_size
from numoe.engine.errors import InputError

if TYPE_CHECKING:
    from numoe.cluster.plan import PlanOptions


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where a model runs.

    Parameters
    ----------
    threads
        Threads that compute; if not given, one on each physical core, but for one of each node with many.
    numa
        "auto": a shard on every NUMA node, its memory bound there, each thread to a core; "off": neither; or the
        numbers of the nodes to use, as in 0,1. llama-server's words: "distribute" is auto, "isolate" the
        node that this command runs on, "numactl" auto within what numactl allows.
    shards
        Expert shards: "auto" is one for each NUMA node.
    device
        Where attention runs: "gpu", "cpu", or "auto", the GPU if there is one that can be used.
    cache_type_k
        Type of the keys in the KV cache: f16, q8_0, which takes half the memory, or q4_0, a quarter (GPU only).
    cache_type_v
        Type of the values in the KV cache, likewise.
    gpu_experts
        Layers whose routed experts live on the GPU: "auto" is as many as there is room for beside everything else
        and 1 GiB of reserve.
    gpu_memory
        Memory of the GPU to use at most, e.g. "10G"; what is free if not given.

    """

    threads: int | None = None
    numa: str = "auto"
    shards: str = "auto"
    device: str = "auto"
    cache_type_k: str = "f16"
    cache_type_v: str = "f16"
    gpu_experts: str = "auto"
    gpu_memory: str | None = None

    def plan_options(self, **more: Any) -> PlanOptions:
        """These and other options of a plan; InputError for one that makes no sense."""
        from numoe.cluster.plan import PlanOptions
        from numoe.engine.worker.kv_pool import KvType

        return PlanOptions(
            threads=self.threads,
            numa=self.numa,
            shards=_number_or_auto("--shards", self.shards),
            device=self.device,
            gpu_layers=_number_or_auto("--gpu-experts", self.gpu_experts),
            gpu_memory=None if self.gpu_memory is None else parse_size(self.gpu_memory),
            kv_type=KvType(self.cache_type_k, self.cache_type_v),
            **more,
        )


ANYWHERE = Placement()
"""What a command takes if none of these flags is given."""


def _number_or_auto(flag: str, text: str) -> int | None:
    """The number, None for "auto"."""
    if text == "auto":
        return None
    if not text.isdecimal():
        raise InputError(f"{flag} {text} is neither 'auto' nor a number")
    return int(text)
