"""`numoe doctor`: whether this host is fit to serve, and what to change."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from numoe.deploy.client import DEFAULT_ADDRESS
from numoe.deploy.console import count, one_line_errors, result_console
from numoe.engine.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

    from numoe.cluster.bandwidth import Progress
    from numoe.deploy.doctor.check import Check

_STYLES = {"ok": "green", "warning": "yellow", "error": "bold red"}


def doctor(
    model: str | None = None,
    /,
    *,
    listen: str = DEFAULT_ADDRESS,
    store: str | None = None,
    store_endpoint: str | None = None,
    measure: Annotated[bool, Parameter(negative=())] = False,
    json_output: Annotated[bool, Parameter(name="--json", negative=())] = False,
) -> int:
    """Look at this host as a server would: each line is ok, a warning or an error, with what to do about it.

    Nothing is changed, but that the store's folder is made and the first measurement of the memory remembered.
    The exit status is 1 if there is an error.

    Parameters
    ----------
    model
        A GGUF file, to be told whether it fits.
    listen
        The address that `numoe serve` would listen on.
    store
        The object store to try, as for `numoe serve`; if not given, the one that serve takes then.
    store_endpoint
        URL of the s3://, gs:// or az:// server, where it is not Amazon's, Google's or Microsoft's.
    measure
        Measure the memory's bandwidth again.
    json_output
        Print one JSON object.

    """
    with one_line_errors():
        no_path = _forget_wrong_path()

        from numoe.deploy.doctor.check import Host
        from numoe.deploy.doctor.examine import Questions, examine

        questions = Questions(
            model=model, listen=listen, store=store, store_endpoint=store_endpoint, measure=measure,
            no_path=no_path,
        )  # fmt: skip
        console, found = result_console(), []
        with _progress() as progress:
            for check in examine(Host.read(), questions, progress):
                found.append(check)
                if not json_output:
                    _print(console, check)
    states = Counter(check.state for check in found)
    worst = next((state for state in ("error", "warning") if states[state]), "ok")
    if json_output:
        print(json.dumps({"state": worst, "checks": [asdict(check) for check in found]}))
    else:
        console.print(f"{states['ok']} ok, {count(states['warning'], 'warning')}, {count(states['error'], 'error')}")
    return 1 if worst == "error" else 0


def _forget_wrong_path() -> str:
    """Drop a NUMOE_ISA that cannot run here, and say why: nothing that kernels belong to could be imported with it."""
    try:
        importlib.import_module("numoe.engine.cpu")
    except InputError as refused:
        del os.environ["NUMOE_ISA"]
        return str(refused)
    return ""


def _print(console: Console, check: Check) -> None:
    from rich.table import Table
    from rich.text import Text

    line = Table.grid(padding=(0, 2, 0, 0))
    for width in (len("warning"), len("transparent_huge_pages")):
        line.add_column(min_width=width)
    line.add_column(overflow="fold")
    line.add_row(Text(check.state, _STYLES[check.state]), check.name.replace("_", " "), check.text)
    if check.cure:
        line.add_row("", "", Text(f"→ {check.cure}", "cyan"))
    console.print(line)


@contextmanager
def _progress() -> Iterator[Progress]:
    """How far the measurement of bandwidth is, on stderr while it goes on."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("measuring memory bandwidth"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Bars(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bars:
        task = bars.add_task("", total=None, visible=False)
        yield lambda done, of: bars.update(task, completed=done, total=of, visible=done < of)
