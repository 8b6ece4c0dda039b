"""`numoe slots`: what the slots of a running server hold, and keeping it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from typing import Annotated, Any

from cyclopts import App, Parameter
from rich.filesize import decimal

from numoe.deploy.commands.security import DEFAULT, Connection
from numoe.deploy.commands.values import duration, unsigned
from numoe.deploy.console import count, one_line_errors, result_console
from numoe.engine.errors import UnavailableError
from numoe.v1 import admin_pb2
from numoe.v1 import slots_pb2 as pb

Json = Annotated[bool, Parameter(name="--json", negative=())]

slots = App(name="slots", help="Keep conversations: save, restore, erase and fork the slots of a running server.")


@slots.command(name="list")
def list_slots(*, connection: Connection = DEFAULT, json_output: Json = False) -> int:
    """Show what every slot holds.

    Parameters
    ----------
    json_output
        Print one JSON object instead of a table.
    connection
        How the server is reached.

    """
    with one_line_errors(), connection.client() as client:
        rows = [slot_json(slot) for slot in client.list_slots()]
    if json_output:
        print(json.dumps({"slots": rows}))
    else:
        _print_table(slot_row(row) for row in rows)
    return 0


@slots.command
def save(
    slot: int, name: str, /, *, wait: float | None = None, connection: Connection = DEFAULT, json_output: Json = False
) -> int:
    """Make or replace a snapshot of a slot, uploading only what the store lacks.

    Parameters
    ----------
    slot
        The number of the slot.
    name
        The snapshot's name: letters, digits, "_", "-" and ".".
    wait
        Wait this many seconds while the slot is busy; if not given, a busy slot is an error.
    json_output
        Print one JSON object.
    connection
        How the server is reached.

    """
    with one_line_errors(), connection.client() as client:
        request = pb.SaveSlotRequest(slot=unsigned("SLOT", slot), name=name, wait=duration("--wait", wait))
        report = _watch("saving", client.save_slot(request))
    _tell(report, f"slot {slot} is saved as {name}: {_size(report)}; {_moved(report, 'uploaded')}", json_output)
    return 0


@slots.command
def restore(
    slot: int, name: str, /, *, wait: float | None = None, connection: Connection = DEFAULT, json_output: Json = False
) -> int:
    """Put a snapshot into a slot; if anything is wrong with it, the slot stays as it was.

    Parameters
    ----------
    slot
        The number of the slot.
    name
        The snapshot's name.
    wait
        Wait this many seconds while the slot is busy; if not given, a busy slot is an error.
    json_output
        Print one JSON object.
    connection
        How the server is reached.

    """
    with one_line_errors(), connection.client() as client:
        request = pb.RestoreSlotRequest(slot=unsigned("SLOT", slot), name=name, wait=duration("--wait", wait))
        report = _watch("restoring", client.restore_slot(request))
    _tell(report, f"slot {slot} holds {name}: {_size(report)}; {_moved(report, 'read')}", json_output)
    return 0


@slots.command
def erase(
    slot: int, /, *, wait: float | None = None, connection: Connection = DEFAULT, json_output: Json = False
) -> int:
    """Empty a slot; snapshots stay.

    Parameters
    ----------
    slot
        The number of the slot.
    wait
        Wait this many seconds while the slot is busy; if not given, a busy slot is an error.
    json_output
        Print one JSON object.
    connection
        How the server is reached.

    """
    with one_line_errors(), connection.client() as client:
        request = pb.EraseSlotRequest(slot=unsigned("SLOT", slot), wait=duration("--wait", wait))
        report = client.erase_slot(request)
    _tell(report, f"slot {slot} is empty", json_output)
    return 0


@slots.command
def fork(
    slot: int, target: int, /, *, wait: float | None = None, connection: Connection = DEFAULT, json_output: Json = False
) -> int:
    """Make a slot hold what another holds, so that both can go on from there.

    Parameters
    ----------
    slot
        The number of the slot to fork.
    target
        The number of the slot that becomes the same; what it held is gone.
    wait
        Wait this many seconds while one of them is busy; if not given, a busy slot is an error.
    json_output
        Print one JSON object.
    connection
        How the server is reached.

    """
    with one_line_errors(), connection.client() as client:
        numbers = {"slot": unsigned("SLOT", slot), "target": unsigned("TARGET", target)}
        report = client.fork_slot(pb.ForkSlotRequest(**numbers, wait=duration("--wait", wait)))
    _tell(report, f"slot {target} holds what slot {slot} holds: {count(report.tokens, 'token')}", json_output)
    return 0


@slots.command
def snapshots(*, connection: Connection = DEFAULT, json_output: Json = False) -> int:
    """List the snapshots in the server's store.

    Parameters
    ----------
    json_output
        Print one JSON object instead of a table.
    connection
        How the server is reached.

    """
    with one_line_errors(), connection.client() as client:
        rows = [_snapshot_json(snapshot) for snapshot in client.list_snapshots()]
    if json_output:
        print(json.dumps({"snapshots": rows}))
    else:
        _print_table(_snapshot_row(row) for row in rows)
    return 0


@slots.command
def rm(name: str, /, *, connection: Connection = DEFAULT, json_output: Json = False) -> int:
    """Remove a snapshot.

    Parameters
    ----------
    name
        Its name.
    json_output
        Print one JSON object.
    connection
        How the server is reached.

    """
    with one_line_errors(), connection.client() as client:
        client.remove_snapshot(name)
    print(json.dumps({"removed": name}) if json_output else f"snapshot {name} is removed")
    return 0


def slot_json(slot: admin_pb2.SlotStatus) -> dict[str, Any]:
    """A slot as JSON shows it; last_used in seconds since 1970."""
    return {
        "slot": slot.slot,
        "state": admin_pb2.SlotState.Name(slot.state).removeprefix("SLOT_STATE_").lower(),
        "request_id": slot.request_id if slot.HasField("request_id") else None,
        "tokens": slot.tokens,
        "computed": slot.computed,
        "cached": slot.cached,
        "snapshot": slot.snapshot if slot.HasField("snapshot") else None,
        "last_used": slot.last_used.ToNanoseconds() / 1e9 if slot.HasField("last_used") else None,
    }


def slot_row(values: dict[str, Any]) -> dict[str, Any]:
    """The same as tables show it."""
    used = values["last_used"]
    return values | {"last_used": None if used is None else _ago(used)}


def _snapshot_json(snapshot: pb.Snapshot) -> dict[str, Any]:
    return {
        "name": snapshot.name,
        "tokens": snapshot.tokens,
        "computed": snapshot.computed,
        "bytes": snapshot.bytes,
        "created": snapshot.created.ToNanoseconds() / 1e9,
        "mismatch": snapshot.mismatch if snapshot.HasField("mismatch") else None,
    }


def _snapshot_row(values: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": values["name"],
        "tokens": values["tokens"],
        "computed": values["computed"],
        "size": decimal(values["bytes"]),
        "created": _ago(values["created"]),
        "fits this server": values["mismatch"] or "yes",
    }


def _watch(doing: str, stream: Iterable[Any]) -> pb.SlotReport:
    """Show the progress of a save or restore; its report."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn(doing), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task("", total=None)
        for message in stream:
            if message.HasField("report"):
                report: pb.SlotReport = message.report
                return report
            bars.update(task, completed=message.progress.done_bytes, total=message.progress.bytes)
    raise UnavailableError("the server ended the call without a report; look at `numoe slots list`")


def _tell(report: pb.SlotReport, text: str, json_output: bool) -> None:  # noqa: FBT001
    if not json_output:
        print(text)
        return
    values = {field.name: getattr(report, field.name) for field in report.DESCRIPTOR.fields}
    print(json.dumps(values | {"snapshot": report.snapshot or None, "seconds": round(report.seconds, 6)}))


def _size(report: pb.SlotReport) -> str:
    return f"{count(report.tokens, 'token')}, {decimal(report.bytes)} in {count(report.chunks, 'chunk')}"


def _moved(report: pb.SlotReport, verb: str) -> str:
    return f"{decimal(report.moved_bytes)} in {count(report.moved_chunks, 'chunk')} {verb} in {report.seconds:.2f} s"


def _ago(seconds: float) -> str:
    """How long ago a time is, in its largest unit."""
    past = max(0.0, time.time() - seconds)
    for unit, name in ((86_400, "d"), (3600, "h"), (60, "min")):
        if past >= unit:
            return f"{past / unit:.0f} {name} ago"
    return f"{past:.0f} s ago"


def _print_table(rows: Iterable[dict[str, Any]]) -> None:
    from rich.table import Table

    found = list(rows)
    if not found:
        print("none")
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name, value in found[0].items():
        numeric = name == "size" or isinstance(value, int)
        table.add_column(name, justify="right" if numeric else "left")
    for row in found:
        table.add_row(*("-" if value is None else str(value) for value in row.values()))
    result_console().print(table)
