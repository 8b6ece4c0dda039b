"""The prompt cache behind the KV pages: host memory, then the object store; and snapshots of slots."""

from numoe.engine.cache.cache import PageBroker, PromptCache
from numoe.engine.cache.ram import RamTier
from numoe.engine.cache.snapshots import Snapshots
from numoe.engine.cache.store_tier import StoreTier

__all__ = ["PageBroker", "PromptCache", "RamTier", "Snapshots", "StoreTier"]
