"""Packed weights in named shared memory: they outlive the process that loaded them."""

from numoe.engine.weights.contents import ContentSum
from numoe.engine.weights.inventory import (
    StoredSlice,
    free_weights,
    hold_weights,
    is_loaded,
    link_slice,
    linked,
    linked_contents,
    stored_slices,
    sweep_incomplete,
    verify_slice,
)
from numoe.engine.weights.loading import PackedTensor, load_tensors, open_tensors, slice_bytes
from numoe.engine.weights.media import HugePools, shm_medium
from numoe.engine.weights.pages import CachedPages, SharedReads
from numoe.engine.weights.report import SliceReport, SliceReporter
from numoe.engine.weights.slices import SliceKey, WeightSlice, remove_slice
from numoe.engine.weights.source import source_fingerprint

__all__ = [
    "CachedPages",
    "ContentSum",
    "HugePools",
    "PackedTensor",
    "SharedReads",
    "SliceKey",
    "SliceReport",
    "SliceReporter",
    "StoredSlice",
    "WeightSlice",
    "free_weights",
    "hold_weights",
    "is_loaded",
    "link_slice",
    "linked",
    "linked_contents",
    "load_tensors",
    "open_tensors",
    "remove_slice",
    "shm_medium",
    "slice_bytes",
    "source_fingerprint",
    "stored_slices",
    "sweep_incomplete",
    "verify_slice",
]
