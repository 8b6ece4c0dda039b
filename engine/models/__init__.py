"""Model architectures: configuration, tensor lists, RoPE, and the reference forward pass."""

from __future__ import annotations

from numoe.engine.models.architecture import ARCHITECTURES, Architecture, TensorSpec
from numoe.engine.models.config import ModelConfig, MoeConfig, RopeConfig
from numoe.engine.models.rope import rope_frequencies

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "ModelConfig",
    "MoeConfig",
    "RopeConfig",
    "TensorSpec",
    "rope_frequencies",
]
