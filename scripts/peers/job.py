"""What a measurement is given and what it prints; needs NumPy alone, as every peer's environment has it."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median

import numpy as np
import numpy.typing as npt

MARK = "result: "
"""Begins the line with the result: peers print much else."""
_ONE_ROW_CALLS, _MANY_ROWS_CALLS = 200, 4

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Job:
    """One measurement: a model, its dimensions, and how to run it.

    workers: threads that compute. prompt, answer: tokens of prefill and of decode; `prompt` is also the
    number of rows with which experts alone are measured, beside one. backend: a peer's choice of kernels.
    """

    model: str
    workers: int
    prompt: int
    answer: int
    hidden: int
    ffn: int
    experts: int
    top_k: int
    layers: int
    vocab: int
    backend: str = ""

    @classmethod
    def from_command_line(cls) -> Job:
        """The job that was written as JSON behind the module's name."""
        return cls(**json.loads(sys.argv[1]))

    def to_json(self) -> str:
        """The job as `from_command_line` reads it."""
        return json.dumps(asdict(self))

    def routing(self, rows: int, calls: int) -> Ids:
        """Different random experts for each row of each call, int64 [calls, rows, top_k]."""
        keys = np.random.default_rng(0).random((calls, rows, self.experts))
        return np.ascontiguousarray(keys.argpartition(self.top_k, axis=2)[:, :, : self.top_k].astype(np.int64))

    def tokens(self, count: int) -> list[int]:
        """Random token ids."""
        return np.random.default_rng(1).integers(0, self.vocab, count).tolist()


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one measurement found; None for what it does not measure.

    decode, prefill: of the whole model, tokens a second. one_row_us, many_rows_ms: a layer's experts alone,
    medians. expert_bytes: weights of one expert, in the format that was run. read_gb_s: plain reading.
    """

    format: str = ""
    decode: float | None = None
    prefill: float | None = None
    one_row_us: float | None = None
    many_rows_ms: float | None = None
    expert_bytes: float | None = None
    read_gb_s: float | None = None

    def print(self) -> None:
        """Print the line that `parse` finds."""
        print("\n" + MARK + json.dumps(asdict(self)), flush=True)

    @classmethod
    def parse(cls, output: str) -> Result | None:
        """The result in a program's output, if it came so far."""
        lines = [line for line in output.splitlines() if line.startswith(MARK)]
        return cls(**json.loads(lines[-1].removeprefix(MARK))) if lines else None


def time_experts(job: Job, layers: int, call: Callable[[int, Ids], None]) -> tuple[float, float]:
    """Time `call(layer, ids)` for one row and for `job.prompt` rows: median microseconds, milliseconds.

    Layers take turns, so that with enough of them weights come from memory.
    """
    medians = []
    for rows, calls, warm_up in ((1, _ONE_ROW_CALLS, 2 * layers), (job.prompt, _MANY_ROWS_CALLS, 1)):
        taken = []
        for number, ids in enumerate(job.routing(rows, calls + warm_up)):
            start = time.perf_counter()
            call(number % layers, ids)
            taken.append(time.perf_counter() - start)
        medians.append(median(taken[warm_up:]))
    return 1e6 * medians[0], 1e3 * medians[1]
