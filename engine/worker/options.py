"""What every forward pass of the attention side takes and offers, wherever it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from numoe.engine.keeper import Keepsakes
from numoe.engine.kv.port import PagePort
from numoe.engine.models.config import ModelConfig
from numoe.engine.sampling import StepLogits
from numoe.engine.scheduler import Batch
from numoe.engine.weights import CachedPages, SliceKey, WeightSlice
from numoe.engine.worker.kv_pool import F16, KvType


@dataclass(frozen=True)
class SharedWeights:
    """Where the weights of the attention side lie in shared memory.

    folder: of the server, where they are linked. key: of their slice. pages: of the model's files that
    were in the page cache.
    """

    folder: Path
    key: SliceKey
    pages: CachedPages | None = None


@dataclass(frozen=True)
class ForwardOptions:
    """Sizes of the forward pass.

    max_rows: rows of a step at most. slots: sequences. n_pages: KV pages. context: tokens of a
    sequence at most. threads: of the team; threads_on_host: of all actors on this host together.
    shard_bound_s: how long a shard may show no sign of life. kv_type: of the KV cache. shared: where a CPU's
    weights lie, None for memory of the process. gpu_layers: of the layers with routed experts that many, the
    first ones, have them on the GPU. cpus: of the team's threads, one each, none to leave them where the
    system puts them. nodes: from which a CPU's KV pages come in turn, none for anywhere. keepsakes: what outlives the
    worker: KV pages, and weights in a GPU's memory.
    """

    max_rows: int
    slots: int
    n_pages: int
    context: int
    threads: int
    threads_on_host: int
    shard_bound_s: float = 0.75
    kv_type: KvType = F16
    shared: SharedWeights | None = None
    gpu_layers: int = 0
    cpus: tuple[int, ...] = ()
    nodes: tuple[int, ...] = ()
    keepsakes: Keepsakes = field(default_factory=Keepsakes)


def nothing() -> None:
    """What there is to do meanwhile if there is nothing to do."""


class Forward(Protocol):
    """A forward pass: `CpuForward` or `GpuForward`."""

    config: ModelConfig
    options: ForwardOptions

    @property
    def pages(self) -> PagePort:
        """The way to the KV pages, for the prompt cache."""

    @property
    def kv_identity(self) -> bytes:
        """Of the memory of the KV pages: a worker before that had the same has left in them what it computed."""

    def run(self, batch: Batch, meanwhile: Callable[[], None] = nothing) -> StepLogits:
        """The logits [len(batch.logit_rows), vocab] of a batch; its rows go to the KV pool.

        They are good until the next call. meanwhile: called once the step of a device is under way, or before
        one that keeps the host busy. LateShardError names a shard that did not answer; the batch may then be run again.
        """

    def attach_experts(self, folder: Path) -> None:
        """Take note that the shards' weights are in shared memory now, in files of `folder`."""

    def times_ms(self) -> dict[str, float]:
        """Where the last step's time went, in milliseconds: attention, experts, wait."""

    @property
    def few_rows(self) -> int:
        """Steps of up to so many rows are computed otherwise, in their last bits, than longer ones; 0 if none is."""

    @property
    def slice(self) -> WeightSlice | None:
        """The weights in shared memory, None where they are elsewhere."""

    @property
    def ran_on(self) -> Sequence[int]:
        """The processor that each thread ran on last, none where a GPU computes."""

    def close(self) -> None:
        """Free what it holds."""
