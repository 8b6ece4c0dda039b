"""Compiling the kernels a model needs, in processes of their own, before the actors start."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

from numoe.engine.cpu.isa import cache_root
from numoe.engine.errors import NumoeError
from numoe.engine.gguf import GgufFile
from numoe.engine.kernels import compiled, needed_kernels, record_compiled


class KernelBuild:
    """A compilation under way; `wait` for it before the kernels are used."""

    def __init__(self, gguf: GgufFile) -> None:
        have = compiled()
        self.missing = [name for name in needed_kernels(gguf) if name not in have]
        # Numba keeps one index for all products, and so on: those are compiled by one process.
        products = [name for name in self.missing if name.startswith(("product:", "pack:", "unpack:"))]
        others = [name for name in self.missing if name not in products]
        self._processes = [
            subprocess.Popen(  # noqa: S603 - this Python, and names of our own
                [sys.executable, "-m", "numoe.engine.kernels", *names],
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
            )
            for names in (others, products)
            if names
        ]  # fmt: skip

    def wait(self, on_done: Callable[[str], None]) -> None:
        """Return when everything is compiled; `on_done` is called for each kernel."""
        for process in self._processes:
            assert process.stdout is not None
            assert process.stderr is not None
            for line in process.stdout:
                on_done(line.strip())
            errors = process.stderr.read()
            if process.wait() != 0:
                why = (errors.strip() or "killed").splitlines()[-1]
                raise NumoeError(
                    f"the kernels could not be compiled: {why} (they are kept in {cache_root()}; XDG_CACHE_HOME "
                    "names another folder)"
                )
        if self.missing:
            record_compiled(self.missing)

    def cancel(self) -> None:
        """End the compilation."""
        for process in self._processes:
            process.kill()
            process.wait()
