"""`numoe bench slots`: what saving and restoring a long conversation costs, against reading its prompt again."""

from __future__ import annotations

import json
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any, Final

from cyclopts import Parameter

from numoe.deploy.answers import Answer
from numoe.deploy.client import Client
from numoe.deploy.commands.placement import ANYWHERE, Placement
from numoe.deploy.console import one_line_errors
from numoe.engine.errors import InputError, NumoeError
from numoe.v1 import generation_pb2 as pb
from numoe.v1 import slots_pb2

if TYPE_CHECKING:
    from numoe.cluster.plan import PlanOptions
    from numoe.engine.store import Store

_NAME: Final = "numoe-bench-slots"
_READERS: Final = 4  # as a worker has


@dataclass(frozen=True)
class Operation:
    """A save or restore: seconds as the client saw them, chunks and bytes in all and moved."""

    seconds: float
    chunks: int
    bytes: int
    moved_chunks: int
    moved_bytes: int


@dataclass
class Figures:
    """What was measured; `to_json` adds what follows from it.

    first: saved right after the prefill, much being in the store by then; whole: with nothing in the
    store; again: after `more` tokens more. same: restored into another slot of the same worker.
    fresh, read: restored by a fresh worker, and the same objects only read, in turns, nothing in the page cache.
    """

    tokens: int
    more: int
    prefill_s: float = 0.0
    first: Operation | None = None
    whole: Operation | None = None
    again: Operation | None = None
    same: Operation | None = None
    fresh: list[Operation] = field(default_factory=list)
    read: list[float] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Times in seconds; ratio: prefill over restore; share: reading over restoring, both as medians."""
        restore = median(operation.seconds for operation in self.fresh)
        return asdict(self) | {"ratio": self.prefill_s / restore, "share": median(self.read) / restore}


def slots(
    model: str,
    /,
    *,
    tokens: int = 32768,
    more: int = 200,
    store: str | None = None,
    store_endpoint: str | None = None,
    rounds: int = 3,
    json_output: Annotated[bool, Parameter(name="--json", negative=())] = False,
    placement: Placement = ANYWHERE,
) -> int:
    """Measure saving and restoring a conversation against reading it again.

    A random prompt is read, its slot saved, saved again after some more tokens, and restored: by the
    same worker, whose pages still hold it, and by fresh ones. Before that the objects in the store are
    read and nothing else, by as many threads: of a store in a folder, what the page cache holds of
    them is dropped each time.

    Parameters
    ----------
    model
        The GGUF file; of a split model, any part.
    tokens
        Tokens of the conversation.
    more
        Tokens by which it grows before it is saved again.
    store
        Where it is saved, as for `numoe serve`; a folder for temporary files if not given. Must hold no chunks yet.
    store_endpoint
        URL of the s3://, gs:// or az:// server, where it is not Amazon's, Google's or Microsoft's.
    rounds
        How often a fresh worker is started.
    json_output
        Print one JSON object instead of the table.
    placement
        Where the model runs.

    """
    with one_line_errors():
        for flag, value in (("--tokens", tokens), ("--more", more), ("--rounds", rounds)):
            if value < 1:
                raise InputError(f"{flag} {value} is not possible: give at least 1")
        with ExitStack() as stack:
            url = store or stack.enter_context(tempfile.TemporaryDirectory(prefix="numoe-bench-"))
            figures = _measure(model, Figures(tokens, more), url, store_endpoint, rounds, placement)
        print(json.dumps(figures.to_json()) if json_output else table(figures))
    return 0


def _measure(
    model: str, figures: Figures, url: str, endpoint: str | None, rounds: int, placement: Placement
) -> Figures:
    from numoe.cluster.plan import CacheOptions
    from numoe.deploy.signals import StopSignals
    from numoe.engine.store import open_store

    where: dict[str, Any] = {"endpoint": endpoint} if endpoint else {}
    store = open_store(url, **where)
    if store.list("chunks"):
        raise InputError(f"--store {url} holds chunks already: give an empty one")
    cache = CacheOptions(store_url=url, store_endpoint=endpoint or "")
    options = placement.plan_options(context=figures.tokens + figures.more + 8, slots=2, cache=cache)
    with StopSignals():
        with _serving(model, options) as client:
            ids = _conversation(client, figures)
            figures.first = _save(client)
            for entry in store.list("chunks"):
                store.delete(entry.key)
            figures.whole = _save(client)
            _ask(client, ids, 0)
            figures.again = _save(client)
            figures.same = _restore(client, 1)
        for _ in range(rounds):
            figures.read.append(_read(store))
            with _serving(model, options) as client:
                _forget(store)
                figures.fresh.append(_restore(client, 0))
                answer, _ = _ask(client, ids, 0)
                if answer.cached_tokens != len(ids) - 1:
                    raise NumoeError(f"a restored conversation of {len(ids)} tokens had {answer.cached_tokens} cached")
    return figures


@contextmanager
def _serving(model: str, options: PlanOptions) -> Iterator[Client]:
    from numoe.cluster.endpoint import ANY_PORT
    from numoe.deploy.launch import running_server

    with running_server(model, options, ANY_PORT) as server, Client(server.address) as client:
        yield client


def _conversation(client: Client, figures: Figures) -> list[int]:
    """Read the prompt into slot 0; its tokens, and those that come later."""
    ids = random.Random(0).choices(range(client.model().vocab_size), k=figures.tokens + figures.more)  # noqa: S311
    _ask(client, ids[:8], 1)  # what is slow the first time only
    figures.prefill_s = _ask(client, ids[: figures.tokens], 0)[1]
    return ids


def _ask(client: Client, ids: Sequence[int], slot: int) -> tuple[Answer, float]:
    """One token after a prompt; the answer and the seconds until it came."""
    request = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=ids), sampling=pb.SamplingOptions(temperature=0.0),
        stopping=pb.StopOptions(max_tokens=1, ignore_eos=True), slot_id=slot,
    )  # fmt: skip
    answer, start = Answer(), time.perf_counter()
    for response in client.generate(request):
        answer.add(response)
    return answer, time.perf_counter() - start


def _save(client: Client) -> Operation:
    return _timed(lambda: client.save_slot(slots_pb2.SaveSlotRequest(slot=0, name=_NAME)))


def _restore(client: Client, slot: int) -> Operation:
    return _timed(lambda: client.restore_slot(slots_pb2.RestoreSlotRequest(slot=slot, name=_NAME)))


def _timed(call: Callable[[], Iterable[Any]]) -> Operation:
    start = time.perf_counter()
    report = next(message.report for message in call() if message.HasField("report"))
    return Operation(
        time.perf_counter() - start, report.chunks, report.bytes, report.moved_chunks, report.moved_bytes
    )


def _read(store: Store) -> float:
    """Seconds that it takes to read the snapshot's chunks and nothing else."""
    from numoe.engine.store.keys import chunk_path
    from numoe.engine.store.manifest import decode_manifest, manifest_path

    keys = decode_manifest(store.get(manifest_path(_NAME)), _NAME).keys
    _forget(store)
    with ThreadPoolExecutor(_READERS) as pool:
        start = time.perf_counter()
        for _ in pool.map(lambda key: store.get(chunk_path(key)).nbytes, keys):
            pass
        return time.perf_counter() - start


def _forget(store: Store) -> None:
    """Drop the objects of a store in a folder from the page cache."""
    if "://" in store.url:
        return
    for entry in store.list("chunks"):
        descriptor = os.open(Path(store.url, entry.key), os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def table(figures: Figures) -> str:
    """The figures as lines of a Markdown table."""
    values, lines = figures.to_json(), ["| what | seconds | MB moved | chunks moved |", "|---|---:|---:|---:|"]
    lines.append(f"| prompt of {figures.tokens} tokens | {figures.prefill_s:.2f} | | |")
    rows = [
        ("save", figures.first),
        ("save, nothing in the store", figures.whole),
        (f"save after {figures.more} more", figures.again),
        ("restore, same worker", figures.same),
        *((f"restore, fresh worker {number}", operation) for number, operation in enumerate(figures.fresh, 1)),
    ]
    for name, operation in rows:
        if operation is not None:
            moved = f"{operation.moved_bytes / 1e6:.1f} | {operation.moved_chunks} of {operation.chunks}"
            lines.append(f"| {name} | {operation.seconds:.3f} | {moved} |")
    lines += [f"| only reading {number} | {seconds:.3f} | | |" for number, seconds in enumerate(figures.read, 1)]
    share = values["share"]
    lines.append(f"\nA restore is {values['ratio']:.1f} × as fast as the prompt. It takes {1 / share:.2f} × as long as")
    lines[-1] += f" reading alone: {100 * share:.0f} % of the store's bandwidth."
    return "\n".join(lines)
