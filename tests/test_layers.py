"""Who may import whom, and that everything is packaged."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("engine", "cluster", "actors", "deploy")
GRPC = ("grpc", "grpc_status", "grpc_health", "grpc_reflection")
FORBIDDEN = {
    "engine": ("ray", *GRPC, "numoe.v1", "numoe.cluster", "numoe.actors", "numoe.deploy"),
    "cluster": (*GRPC, "numoe.v1", "numoe.actors", "numoe.deploy"),
    "actors": ("numoe.deploy",),
    "deploy": (),
}


def imports(path: Path) -> Iterator[str]:
    """The modules that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield node.module or ""


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_point_downwards(folder: str) -> None:
    wrong = [
        (str(path.relative_to(ROOT)), module)
        for path in sorted((ROOT / folder).rglob("*.py"))
        for module in imports(path)
        if any(module == name or module.startswith(name + ".") for name in FORBIDDEN[folder])
    ]
    assert wrong == []


def test_the_engine_runs_without_ray_and_grpc() -> None:
    """Imported whole, in a process of its own, so that what its imports import counts as well."""
    modules = [
        "numoe." + ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in sorted((ROOT / "engine").rglob("*.py"))
    ]
    script = f"import sys, {', '.join(modules)}; print(*({{'ray', 'grpc', 'google.protobuf'}} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout.strip()) == (0, ""), result.stderr


def test_messages_import_nothing_of_ours() -> None:
    for path in (ROOT / "proto").rglob("*.py"):
        assert not [module for module in imports(path) if module.startswith("numoe.") and module != "numoe.v1"]


def test_the_scheduler_knows_no_kernel() -> None:
    for path in (ROOT / "engine" / "scheduler").glob("*.py"):
        assert not [module for module in imports(path) if module.startswith(("numba", "numoe.engine.cpu"))]


def test_every_package_is_packaged() -> None:
    packages = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {
        "numoe." + ".".join(path.parent.relative_to(ROOT).parts)
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*.py")
    }
    assert all((ROOT / folder.removeprefix("numoe.").replace(".", "/") / "__init__.py").is_file() for folder in found)
    assert packages == found | {"numoe.v1"}
