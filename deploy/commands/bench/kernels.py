"""`numoe bench kernels`: products of every weight format beside what this machine can do at most."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from numoe.deploy.console import one_line_errors
from numoe.engine.errors import InputError, ResourceError

if TYPE_CHECKING:
    from numoe.deploy.commands.bench.stand import Stand

ROWS = (1, 4, 16, 64, 512)
_COLUMNS = "|{:>7} |{:>5} |{:>8} |{:>10} |{:>10} |{:>13} |{:>8} |{:>7} |"
_HEAD = ("format", "rows", "GB/s", "GFLOP/s", "read GB/s", "peak GFLOP/s", "limit", "share")


@dataclass(frozen=True)
class Speed:
    """One row: medians, in 1e9 bytes of weights and 1e9 operations a second, a multiply-add being two.

    read_gb_s: plain reading, peak_gflop_s: arithmetic on registers, of integers where the products
    are; both measured between the products. limit: which of the two allows less; share: how much of
    it the products reach.
    """

    format: str
    rows: int
    gb_s: float
    gflop_s: float
    read_gb_s: float
    peak_gflop_s: float
    limit: str
    share: float


def kernels(
    *,
    threads: int | None = None,
    formats: str = "all",
    buffer_mb: int = 600,
    rounds: int = 5,
    json_output: Annotated[bool, Parameter(name="--json", negative=())] = False,
) -> int:
    """Measure the products of each weight format for 1, 4, 16, 64 and 512 rows.

    Packed weights as in experts of 2048 columns fill a buffer, which the threads share. Each round
    reads the buffer, computes on registers alone, and runs the products for each number of rows, one
    after the other, so that whatever else the machine does hits all of them alike. The limit of a
    product is what memory or arithmetic allow, whichever is less.

    Parameters
    ----------
    threads
        Threads that compute; all processors if not given.
    formats
        Names of weight formats with commas between; "all" is all of them.
    buffer_mb
        Megabytes of weights; choose more than the last-level cache holds. At most a third of the
        memory that is free is taken.
    rounds
        Measurements, of which the median is shown.
    json_output
        Print one JSON object a line instead of the table.

    """
    with one_line_errors():
        from numoe.cluster.topology import Topology

        count = len(Topology.read().allowed_cpus) if threads is None else threads
        limits = (("--threads", count, 4096), ("--buffer-mb", buffer_mb, 1 << 20), ("--rounds", rounds, 1 << 20))
        for flag, value, most in limits:
            if not 1 <= value <= most:
                raise InputError(f"{flag} {value} is not possible: give a number from 1 to {most}")
        for number, speed in enumerate(_measure(formats, count, 1_000_000 * buffer_mb, rounds)):
            if number == 0 and not json_output:
                print(_COLUMNS.format(*_HEAD))
            print(json.dumps(asdict(speed)) if json_output else _row(speed), flush=True)
    return 0


def _row(speed: Speed) -> str:
    numbers = (f"{x:.2f}" for x in (speed.gb_s, speed.gflop_s, speed.read_gb_s, speed.peak_gflop_s))
    return _COLUMNS.format(speed.format, speed.rows, *numbers, speed.limit, f"{100 * speed.share:.1f} %")


def _measure(formats: str, threads: int, nbytes: int, rounds: int) -> Iterator[Speed]:
    import psutil

    from numoe.deploy.commands.bench.stand import Stand

    chosen = _chosen(formats)
    nbytes = min(nbytes, psutil.virtual_memory().available // 3)
    try:
        stand = Stand(nbytes, threads, max(ROWS))
    except MemoryError:
        raise ResourceError(f"{nbytes / 1e6:.0f} MB cannot be had: lower --buffer-mb") from None
    with stand:
        for qtype in chosen:
            yield from _measure_format(stand, qtype, rounds)


def _measure_format(stand: Stand, qtype: Any, rounds: int) -> Iterator[Speed]:
    """Interleaved: reading, the peak, and the products of all numbers of rows, `rounds` times over."""
    from statistics import median

    if sys.stderr.isatty():
        print(f"{qtype.name} ...", end="\r", file=sys.stderr, flush=True)
    products = stand.products(qtype)
    reads, peaks = list[float](), list[float]()
    macs: dict[int, list[float]] = {rows: [] for rows in ROWS}
    for _ in range(rounds):
        reads.append(stand.read())
        peaks.append(stand.peak(products.activations))
        for rows in ROWS:
            macs[rows].append(products.run(rows))
    read, peak = median(reads), median(peaks)
    for rows in ROWS:
        found = median(macs[rows])
        by_memory = read * rows / products.bytes_per_weight
        yield Speed(
            format=qtype.name,
            rows=rows,
            gb_s=found / rows * products.bytes_per_weight / 1e9,
            gflop_s=2 * found / 1e9,
            read_gb_s=read / 1e9,
            peak_gflop_s=2 * peak / 1e9,
            limit="memory" if by_memory < peak else "compute",
            share=found / min(by_memory, peak),
        )


def _chosen(names: str) -> list[Any]:
    from numoe.engine.formats import FORMATS

    by_name = {qtype.name: qtype for qtype in FORMATS}
    wanted = list(by_name) if names == "all" else [name.strip() for name in names.split(",")]
    if unknown := [name for name in wanted if name not in by_name]:
        raise InputError(f"--formats {','.join(unknown)}: choose from {', '.join(by_name)}")
    return [by_name[name] for name in wanted]
