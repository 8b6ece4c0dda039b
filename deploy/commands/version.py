"""`numoe version`."""

from __future__ import annotations

import importlib.metadata
import platform


def version() -> int:
    """Print the versions of numoe and of what it stands on."""
    stack = ("ray", "numba", "llvmlite", "numpy", "grpcio", "gguf", "tokenizers")
    print(f"numoe {importlib.metadata.version('numoe')}")
    print(", ".join(f"{name} {importlib.metadata.version(name)}" for name in stack))
    print(f"Python {platform.python_version()}, {platform.machine()}")
    return 0
