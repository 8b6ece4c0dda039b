"""Which instruction set the kernels are compiled for, and where their machine code is cached.

The choice follows the host; NUMOE_ISA forces another:

    avx512    512-bit vectors with VNNI dot products (Ice Lake, Zen 4 and newer)
    avxvnni   256-bit vectors with VNNI dot products (Alder Lake and newer)
    avx2      256-bit vectors, dot products through 16-bit multiplies
    portable  what LLVM makes of plain vector code for the host: ARM, old x86

Numba reads its settings when it is imported, or told to, so `configure` runs first (see `__init__.py`).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
from pathlib import Path

import llvmlite.binding as llvm

from numoe.engine.errors import InputError
from numoe.engine.private import make_private_folder

ISAS = ("avx512", "avxvnni", "avx2", "portable")
_NEEDS = {
    "avx512": ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vnni"),
    "avxvnni": ("avx2", "fma", "f16c", "avxvnni"),
    "avx2": ("avx2", "fma", "f16c"),
    "portable": (),
}
# The CPU that code for a forced, lesser path is compiled for.
_FORCED_CPU = {"avxvnni": "alderlake", "avx2": "haswell", "portable": "x86-64-v2"}
_KEPT_CACHES = 4
_COMPILED = ("cpu", "experts", "formats", "kv")  # folders of `engine` whose code ends up in kernels


def host_isas() -> tuple[str, ...]:
    """The paths this host can run, best first."""
    features = llvm.get_host_cpu_features()
    return tuple(isa for isa in ISAS if all(features.get(f, False) for f in _NEEDS[isa]))


def choose_isa() -> str:
    """The best path of the host, or the one NUMOE_ISA names; InputError if it cannot run here."""
    available = host_isas()
    forced = os.environ.get("NUMOE_ISA", "")
    if not forced:
        return available[0]
    if forced not in available:
        raise InputError(f"NUMOE_ISA={forced} cannot run on this CPU; choose one of {', '.join(available)}")
    return forced


def cache_root() -> Path:
    """The user's cache folder for numoe: XDG_CACHE_HOME/numoe, else ~/.cache/numoe."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base else Path.home() / ".cache") / "numoe"


def kernel_cache_dir(isa: str) -> Path:
    """The folder of compiled kernels: one for each CPU, path, Numba version and state of the sources.

    Numba itself notices only changes of the file that defines a function, not of what it calls. Where the cache folder
    cannot be written, as that of a user without a home, it is in a folder of this user's among the temporary files.
    """
    digest = hashlib.sha256()
    for part in (isa, llvm.get_host_cpu_name(), platform.machine(), platform.python_version()):
        digest.update(part.encode() + b"\0")
    digest.update(importlib.metadata.version("numba").encode())
    engine = Path(__file__).resolve().parent.parent
    for source in sorted([f for folder in _COMPILED for f in (engine / folder).rglob("*.py")]):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    folder = cache_root() / "kernels" / f"{isa}-{digest.hexdigest()[:16]}"
    return folder if folder.is_dir() or _may_write(folder.parent) else spare_kernels() / folder.name


def spare_kernels() -> Path:
    """Where compiled kernels are kept if the cache folder cannot be written."""
    return Path(tempfile.gettempdir()) / f"numoe-kernels-{os.getuid()}"


def _may_write(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK | os.X_OK)


def configure() -> str:
    """Point Numba at the path and its cache folder; the path's name. Must run before Numba compiles anything."""
    isa = choose_isa()
    if os.environ.get("NUMOE_ISA") and isa in _FORCED_CPU and platform.machine() == "x86_64":
        os.environ["NUMBA_CPU_NAME"] = _FORCED_CPU[isa]
        os.environ["NUMBA_CPU_FEATURES"] = ""
    folder = kernel_cache_dir(isa)
    if folder.parent == spare_kernels():
        make_private_folder(folder.parent)  # what lies there is run: nobody else may have put it there
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        _forget_old_caches(folder.parent)
    os.environ["NUMBA_CACHE_DIR"] = str(folder)
    if "numba" in sys.modules:
        # Somebody imported it before us: it would keep stale machine code beside the sources.
        sys.modules["numba"].core.config.reload_config()
    return isa


def _forget_old_caches(parent: Path) -> None:
    """Keep the newest few caches: every edit of a kernel during development makes another."""
    folders = sorted(parent.iterdir(), key=lambda f: f.stat().st_mtime, reverse=True)
    for folder in folders[_KEPT_CACHES:]:
        shutil.rmtree(folder, ignore_errors=True)
