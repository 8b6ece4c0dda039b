"""GGUF files: a validating scan of their header, memory-mapped tensors, split files."""

from __future__ import annotations

from numoe.engine.gguf.file import GgufFile
from numoe.engine.gguf.tensors import WEIGHT_TYPES, TensorInfo, dequantize_rows

__all__ = ["WEIGHT_TYPES", "GgufFile", "TensorInfo", "dequantize_rows"]
