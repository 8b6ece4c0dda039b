"""`numoe weights`: what lies packed in shared memory."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, Parameter

from numoe.deploy.console import count, one_line_errors, result_console
from numoe.engine.errors import DataLossError, InputError, NotFoundError, NumoeError, ResourceError

if TYPE_CHECKING:
    from numoe.engine.weights import StoredSlice

weights = App(name="weights", help="Packed weights in shared memory: list, check and remove them.")
Names = Annotated[tuple[str, ...], Parameter(negative=())]
_NOTHING = "no weights lie in shared memory"
JsonOutput = Annotated[bool, Parameter(name="--json", negative=())]


@weights.command(name="list")
def list_(*, json_output: JsonOutput = False) -> int:
    """Show every slice of this user's models in shared memory.

    Parameters
    ----------
    json_output
        Print one JSON array instead of a table.

    """
    with one_line_errors():
        from numoe.engine.weights import stored_slices

        rows = [_row(found) for found in stored_slices()]
    if json_output:
        print(json.dumps(rows))
    elif rows:
        _print_table(rows)
    else:
        print(_NOTHING)
    return 0


@weights.command
def rm(
    names: Names = (), /, *,
    every: Annotated[bool, Parameter(name="--all", negative=())] = False,
    stale: Annotated[bool, Parameter(negative=())] = False,
) -> int:  # fmt: skip
    """Remove weights that no server uses.

    Parameters
    ----------
    names
        Fingerprints, or their beginnings, as `numoe weights list` shows them, or the models' files.
    every
        Remove the weights of all models.
    stale
        Remove what can serve nobody any more, as its file is gone or has changed since, or numoe has.

    """
    with one_line_errors():
        from numoe.engine.weights import remove_slice

        if every + stale + bool(names) != 1:
            raise InputError("give the fingerprints that `numoe weights list` shows, or --stale, or --all")
        chosen = stale_slices() if stale else _chosen(names)
        kept = [found for found in chosen if not remove_slice(found.path)]
        removed = sum(found.nbytes for found in chosen) - sum(found.nbytes for found in kept)
        in_use = f"; {len(kept)} in use" if kept else ""
        print(f"removed {count(len(chosen) - len(kept), 'slice')}, {removed / 1e9:.2f} GB{in_use}")
        if kept and names:
            raise ResourceError(
                f"not removed: {count(len(kept), 'slice')} in use "
                f"({', '.join(sorted({found.fingerprint[:8] for found in kept}))}): "
                "stop their server first (`numoe stop`)"
            )
    return 0


@weights.command
def verify(names: Names = (), /, *, json_output: JsonOutput = False) -> int:
    """Read weights in shared memory and compare them with the checksums that were taken when they were loaded.

    Parameters
    ----------
    names
        Fingerprints, or their beginnings, or the models' files; all models if none is given.
    json_output
        Print one JSON array instead of lines.

    """
    with one_line_errors():
        results = [_verified(found) for found in _chosen(names) if found.header is not None]
        if json_output:
            print(json.dumps(results))
        else:
            for result in results:
                print(f"{result['fingerprint'][:8]} {result['slice']}: {result['found']}")
        damaged = [result for result in results if result["found"] != "sound"]
        if damaged:
            raise DataLossError(
                f"{count(len(damaged), 'damaged slice')} of {len(results)}: stop their server, `numoe weights rm` "
                "them, and test the memory"
            )
        if not json_output:
            print(f"checked {count(len(results), 'slice')}: no damage" if results else _NOTHING)
    return 0


def _chosen(names: Sequence[str]) -> list[StoredSlice]:
    """The slices of these models, of all without names; NotFoundError for a name that none has."""
    from numoe.engine.weights import source_fingerprint, stored_slices

    slices = list(stored_slices())
    if not names:
        return slices
    chosen: list[StoredSlice] = []
    for name in names:
        prefix = source_fingerprint(_files(name)) if Path(name).is_file() else name.lower()
        of_name = [found for found in slices if prefix and found.fingerprint.startswith(prefix)]
        if not of_name:
            raise NotFoundError(f"no weights of {name!r} lie in shared memory; `numoe weights list` shows what does")
        chosen += [found for found in of_name if found not in chosen]
    return chosen


def stale_slices() -> list[StoredSlice]:
    """The slices in shared memory that no server uses or can use."""
    from numoe.engine.weights import stored_slices

    return [found for found in stored_slices() if not found.in_use and (not found.current or _changed(found))]


def _changed(found: StoredSlice) -> str:
    """What has happened to the file of a slice since, empty if nothing has."""
    from numoe.engine.weights import source_fingerprint

    if found.header is None:
        return ""
    try:
        if source_fingerprint(_files(found.header.model)) == found.fingerprint:
            return ""
    except (NumoeError, OSError):
        pass
    return "its file has changed" if Path(found.header.model).exists() else "its file is gone"


def _files(model: str) -> Sequence[Path]:
    from numoe.engine.gguf import GgufFile

    with GgufFile.open(model) as gguf:
        return gguf.paths


def _verified(found: StoredSlice) -> dict[str, Any]:
    from numoe.engine.weights import verify_slice

    try:
        places = verify_slice(found.path, len(os.sched_getaffinity(0)))
        result = f"{count(len(places), 'damaged piece')}, the first at byte {places[0]}" if places else "sound"
    except DataLossError as error:
        result = str(error)
    return {"fingerprint": found.fingerprint, "slice": _name(found), "bytes": found.nbytes, "found": result}


def _name(found: StoredSlice) -> str:
    return found.header.cut if found.header else found.path.name


def _row(found: StoredSlice) -> dict[str, Any]:
    header = found.header
    state = "in use" if found.in_use else "kept"
    if header is None:
        state = "loading" if found.in_use else "incomplete"
    elif not found.current:
        state += ", of another version of numoe"
    elif changed := _changed(found):
        state += f", stale: {changed}"
    return {
        "fingerprint": found.fingerprint,
        "slice": _name(found),
        "bytes": found.nbytes,
        "nodes": list(header.nodes) if header else None,
        "memory": header.medium if header else None,
        "state": state,
        "read_bytes": header.read_bytes if header else None,
        "seconds": round(header.seconds, 3) if header else None,
        "model": header.model if header else None,
        "path": str(found.path),
    }


def _print_table(rows: list[dict[str, Any]]) -> None:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("fingerprint", "slice", "GB", "nodes", "memory", "state", "load, GB/s", "model"):
        justify: Literal["left", "right"] = "right" if name in ("GB", "load, GB/s") else "left"
        table.add_column(name, justify=justify, overflow="fold", no_wrap=name in ("fingerprint", "slice"))
    for row in rows:
        speed = f"{row['read_bytes'] / row['seconds'] / 1e9:.2f}" if row["seconds"] else "-"
        nodes = " ".join(map(str, row["nodes"] or "-"))
        cells = (row["fingerprint"][:8], row["slice"], f"{row['bytes'] / 1e9:.2f}", nodes, row["memory"],
                 row["state"], speed, row["model"])  # fmt: skip
        table.add_row(*("-" if cell is None else str(cell) for cell in cells))
    result_console().print(table)
