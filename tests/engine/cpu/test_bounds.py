"""No kernel reads or writes outside its arrays: they run between pages that nobody may touch (`guard.py`).

On the best path of the host: products, unpacking and packing of every format, KV pages on their way,
and forward passes that run every kernel of a step and the shards' loop. On its other paths, products and unpacking of
the two formats that test_isa.py compiles there anyway, since compiling is what takes time;
`NUMOE_BOUNDS=all` runs everything on every path, which takes about ten minutes.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from numoe.engine import kernels
from numoe.engine.cpu.isa import host_isas
from tests.engine.cpu.bounds import PASSES
from tests.engine.cpu.support import ALL_FORMATS

ROOT = Path(__file__).resolve().parents[3]
BEST, *OTHERS = host_isas()
EVERYTHING = os.environ.get("NUMOE_BOUNDS") == "all"
PASS_ISAS = host_isas() if EVERYTHING else [BEST]
FORMAT_CASES = [
    (isa, f"{kind}:{qtype.name}")
    for isa in host_isas()
    for qtype in ALL_FORMATS
    for kind in ("product", "unpack", "pack")
    if EVERYTHING or isa == BEST or (kind != "pack" and qtype.name in ("IQ4_XS", "F16"))
]


class Checker:
    """A process that runs cases of `bounds.py` over guarded arrays, and may die of one."""

    def __init__(self, isa: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.engine.cpu.bounds"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1,
            cwd=ROOT, env={**os.environ, "NUMOE_ISA": isa},
        )  # fmt: skip

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def run(self, case: str) -> set[str]:
        """Run a case at both sides; what it said. AssertionError tells what it died of, and where."""
        orders, answers, errors = self._process.stdin, self._process.stdout, self._process.stderr
        assert None not in (orders, answers, errors)
        orders.write(case + "\n")
        said = [""]
        for line in answers:
            if line == "ok\n":
                return set(said)
            said.append(line.strip())
        code = self._process.wait()
        died = f"died of {signal.Signals(-code).name}" if code < 0 else "failed"
        raise AssertionError(f"{case} {died} in: {said[-1]}\n{errors.read()}")

    def close(self) -> None:
        self._process.__exit__(None, None, None)


class Checkers:
    """One for each path, another once it has died."""

    def __init__(self) -> None:
        self._running: dict[str, Checker] = {}

    def run(self, isa: str, case: str) -> set[str]:
        """Run a case on a path; see `Checker.run`."""
        if isa in self._running and not self._running[isa].alive:
            self._running.pop(isa).close()
        if isa not in self._running:
            self._running[isa] = Checker(isa)
        return self._running[isa].run(case)

    def close(self) -> None:
        for checker in self._running.values():
            checker.close()


@pytest.fixture(scope="module")
def checkers() -> Iterator[Checkers]:
    found = Checkers()
    yield found
    found.close()


@pytest.mark.parametrize(("isa", "case"), FORMAT_CASES)
def test_kernels_of_weight_formats_stay_inside_their_arrays(checkers: Checkers, isa: str, case: str) -> None:
    checkers.run(isa, case)


@pytest.mark.parametrize("isa", PASS_ISAS)
@pytest.mark.parametrize("name", kernels.PAGES)
def test_kernels_of_kv_pages_stay_inside_their_arrays(checkers: Checkers, isa: str, name: str) -> None:
    checkers.run(isa, f"pages:{name}")


@pytest.mark.parametrize("isa", PASS_ISAS)
def test_every_kernel_of_a_forward_pass_stays_inside_its_arrays(checkers: Checkers, isa: str) -> None:
    """Small models with odd sizes, every KV type, several shards and threads, rows at the ends of pages."""
    ran = {name for case in PASSES for name in checkers.run(isa, case)}
    assert {f"step:{name}" for name in kernels.STEP_KERNELS} <= ran


@pytest.mark.parametrize("where", ["past the end", "before the start"])
@pytest.mark.parametrize("access", ["read", "write"])
def test_a_kernel_that_leaves_its_array_is_named(checkers: Checkers, access: str, where: str) -> None:
    """The mode can fail: one vector too many ends the process, and the next case gets another."""
    fault = f"fault:{access} {where}"
    with pytest.raises(AssertionError, match=f"(?s)died of SIGSEGV in: {fault}.*Segmentation fault"):
        checkers.run(BEST, fault)


def test_a_write_that_touches_no_forbidden_page_shows(checkers: Checkers) -> None:
    with pytest.raises(AssertionError, match=r"(?s)fault:write unseen failed.*written outside of an array"):
        checkers.run(BEST, "fault:write unseen")
