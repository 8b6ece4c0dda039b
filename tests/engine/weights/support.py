"""Slices of a small model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from numoe.engine.gguf import GgufFile
from numoe.engine.progress import Progress
from numoe.engine.weights import PackedTensor, SliceKey, WeightSlice, load_tensors, open_tensors, source_fingerprint
from numoe.engine.weights.loading import slice_bytes
from numoe.engine.worker.weights import plan_dense


def key_of(gguf: GgufFile) -> SliceKey:
    """The slice with everything but the experts."""
    return SliceKey(source=source_fingerprint(gguf.paths), cut="dense")


def load(path: Path, key: SliceKey | None = None, progress: Progress | None = None) -> WeightSlice:
    """Load that slice, or attach to it."""
    with GgufFile.open(path) as gguf:
        return open_tensors(key or key_of(gguf), gguf, plan_dense(gguf), progress or Progress(1), threads=2)


def packed(gguf: GgufFile, tensors: Sequence[PackedTensor]) -> np.ndarray:
    """What a slice has to hold."""
    out = np.zeros(slice_bytes(tensors), np.uint8)
    load_tensors(out, tensors, Progress(1), 1)
    return out
