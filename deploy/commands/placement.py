"""The flags that say where a model runs, shared by every command that starts a server."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cyclopts import Parameter

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
        Threads that compute; all processors if not given.
    shards
        Expert shards: "auto" is one for each NUMA node.
    device
        Where attention runs: "gpu", "cpu", or "auto", the GPU if there is one that can be used.
    cache_type_k
        Type of the keys in the KV cache: f16, q8_0, which takes half the memory, or q4_0, a quarter (GPU only).
    cache_type_v
        Type of the values in the KV cache, likewise.

    """

    threads: int | None = None
    shards: str = "auto"
    device: str = "auto"
    cache_type_k: str = "f16"
    cache_type_v: str = "f16"

    def plan_options(self, **more: Any) -> PlanOptions:
        """These and other options of a plan; InputError for one that makes no sense."""
        from numoe.cluster.plan import PlanOptions
        from numoe.engine.worker.kv_pool import KvType

        return PlanOptions(
            threads=self.threads,
            shards=_parse_shards(self.shards),
            device=self.device,
            kv_type=KvType(self.cache_type_k, self.cache_type_v),
            **more,
        )


ANYWHERE = Placement()
"""What a command takes if none of these flags is given."""


def _parse_shards(text: str) -> int | None:
    """The number of shards, None for "auto"."""
    if text == "auto":
        return None
    if not text.isdigit():
        raise InputError(f"--shards {text} is neither 'auto' nor a number")
    return int(text)
