"""The actor of one expert shard: loads a slice of every expert, then serves the mailbox."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from numoe.actors.identity import Identity, identity
from numoe.actors.placement import describe, reporter_of
from numoe.cluster.plan import Plan
from numoe.cluster.status import ActorPlacement
from numoe.engine.progress import Progress


class ExpertActor:
    """Ray actor. `__init__` is cheap; `initialize` loads; `run` serves until the mailbox says stop."""

    def __init__(self, plan: Plan, folder: str) -> None:
        self._plan, self._folder = plan, Path(folder)

    def identity(self) -> Identity:
        """Who this process is."""
        return identity()

    def prepare(self) -> None:
        """Have the modules and kernels in memory that any shard takes; `initialize` does, too."""
        import numoe.engine.experts.shard  # noqa: F401
        from numoe.engine.gguf import GgufFile
        from numoe.engine.kernels import compile_kernel, needed_kernels

        with GgufFile.open(self._plan.model) as gguf:
            for name in needed_kernels(gguf):
                if name.startswith(("product:", "loop:shard")):
                    compile_kernel(name)

    def initialize(self, index: int) -> None:
        """Be shard `index`: place its slice in shared memory, or attach to it where it lies."""
        from numoe.engine.experts.mailbox import Mailbox
        from numoe.engine.experts.shard import ExpertShard
        from numoe.engine.gguf import GgufFile
        from numoe.engine.models.config import ModelConfig
        from numoe.engine.weights import CachedPages

        self._index = index
        plan, placement = self._plan, self._plan.shards[index]
        gguf = GgufFile.open(plan.model)
        assert plan.mailbox is not None
        mailbox = Mailbox.attach(str(self._folder / "mailbox"), plan.mailbox)
        self._shard = ExpertShard(
            ModelConfig.from_gguf(gguf),
            gguf,
            mailbox,
            plan.cut(self._index),
            folder=self._folder,
            threads=placement.threads,
            threads_on_host=plan.threads_on_host,
            key=plan.expert_slice(self._index),
            cpus=placement.seats.cpus,
        )
        weights = self._shard.load(CachedPages.load(self._folder))
        self._reporter = reporter_of(weights, placement.seats)
        self._mailbox = mailbox
        gguf.close()
        self._shard.start()

    def progress(self) -> dict[str, Any]:
        """How far loading has come: see `Progress.report`; zeros before `initialize`."""
        shard = getattr(self, "_shard", None)
        return (shard.progress if shard else Progress(0)).report()

    def placement(self) -> ActorPlacement:
        """Where the slice lies, the threads run, and how fast they read."""
        seats, (nbytes, nanoseconds) = self._plan.shards[self._index].seats, self._mailbox.reading(self._index)
        speed = 1e9 * nbytes / nanoseconds if nbytes else None
        return describe(seats, self._reporter, self._shard.ran_on, read_bytes_s=speed)

    def run(self) -> None:
        """Return when the shard has been told to stop; while this is pending, the shard is alive."""
        self._shard.join()
