"""Logits of tiny models as llama.cpp computed them, kept in goldens/*.npz.

To make them again (see oracle.py for the environment): python -m tests.engine.models.make_goldens
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from tests import models
from tests.engine.models import oracle

FOLDER = Path(__file__).parent / "goldens"
CASES: dict[str, dict[str, Any]] = {
    "qwen3moe-yarn": {"arch": "qwen3moe", "rope_scaling": "yarn", "context": 2048, "seed": 11, "n_used": 3},
    "llama-moe-linear": {"arch": "llama-moe", "rope_scaling": "linear", "seed": 12},
    "llama-factors-tied": {"arch": "llama", "frequency_factors": True, "tied": True, "seed": 13},
}
TOKENS = [72, 101, 108, 108, 111, 44, 0, 255, 199, 32, 32, 32, 10, 10, 48, 49, 50, 268, 269, 7, 7, 7, 91, 287]


def regenerate() -> None:
    """Ask llama.cpp again."""
    assert not oracle.missing(), oracle.missing()
    FOLDER.mkdir(exist_ok=True)
    for name, options in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            path = models.make_model(Path(folder) / "m.gguf", **options)
            logits = oracle.logits(path, TOKENS, Path(folder)).astype(np.float32)
        np.savez_compressed(FOLDER / f"{name}.npz", tokens=np.array(TOKENS, np.int32), logits=logits)


if __name__ == "__main__":
    regenerate()
