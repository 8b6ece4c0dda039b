"""A durable store of keys and values: objects, their names, bytes and checksums."""

from numoe.engine.store.base import Entry, Store
from numoe.engine.store.store import open_store

__all__ = ["Entry", "Store", "open_store"]
