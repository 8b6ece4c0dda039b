"""llama.cpp as a second opinion, where the developer has it.

NUMOE_ORACLE: the Python of an environment with llama.cpp; NUMOE_SHARED: the folder that holds
oracle/logits.py, which drives it.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest


def missing() -> str:
    """Why there is no oracle, or nothing if there is one."""
    python, shared = os.environ.get("NUMOE_ORACLE"), os.environ.get("NUMOE_SHARED")
    if not python or not Path(python).is_file():
        return "set NUMOE_ORACLE to the Python of an environment that has llama.cpp"
    if not shared or not (Path(shared) / "oracle" / "logits.py").is_file():
        return "set NUMOE_SHARED to the folder that holds oracle/logits.py"
    return ""


def require() -> None:
    """Skip the calling test if there is no oracle."""
    if reason := missing():
        pytest.skip(reason)


def logits(model: Path, token_ids: Sequence[int], folder: Path) -> np.ndarray:
    """Logits [tokens, vocab] as llama.cpp computes them with a float32 KV cache, as float64."""
    tokens, out = folder / "tokens.json", folder / "oracle.npz"
    tokens.write_text(json.dumps(list(token_ids)))
    script = Path(os.environ["NUMOE_SHARED"]) / "oracle" / "logits.py"
    command = [os.environ["NUMOE_ORACLE"], script, model, "--tokens-file", tokens, "--out", out]
    subprocess.run([*command, "--cache-type", "f32", "--threads", "2"], check=True, capture_output=True)
    with np.load(out) as result:
        return result["logits"].astype(np.float64)


def nmse(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Squared error over squared size."""
    return float(((ours - theirs) ** 2).sum() / (theirs**2).sum())
