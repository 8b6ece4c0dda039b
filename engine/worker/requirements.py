"""What the CPU kernels ask of a model's dimensions."""

from __future__ import annotations

from numoe.engine.errors import UnsupportedError
from numoe.engine.models.config import ModelConfig


def check_kernel_shapes(config: ModelConfig) -> None:
    """UnsupportedError naming the dimension that the kernels cannot work with."""
    wanted = {
        "embedding length": (config.hidden, 32),
        "head size": (config.head_dim, 16),
        "width of all heads": (config.n_heads * config.head_dim, 32),
        "width of all KV heads": (config.n_kv_heads * config.head_dim, 32),
        "feed-forward length": (config.dense_ffn, 32),
        "expert feed-forward length": (config.moe.ffn if config.moe else 0, 32),
    }
    for name, (value, multiple) in wanted.items():
        if value % multiple:
            raise UnsupportedError(
                f"the model's {name} is {value}, and the kernels need a multiple of {multiple}: use another model"
            )
