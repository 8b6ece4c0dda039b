"""Which rows run in the next step: continuous batching over slots and KV pages."""

from numoe.engine.scheduler.batch import Batch
from numoe.engine.scheduler.scheduler import Scheduler, SchedulerConfig
from numoe.engine.scheduler.sequence import Sequence

__all__ = ["Batch", "Scheduler", "SchedulerConfig", "Sequence"]
