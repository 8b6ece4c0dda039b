"""An engine as a server has it, with real kernels and a real store, but without Ray and gRPC."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from numoe.engine.cache import RamTier, StoreTier
from numoe.engine.gguf import GgufFile
from numoe.engine.requests import (
    Event,
    Finished,
    GenerationRequest,
    SamplingParams,
    SlotProgress,
    Started,
    TokenGenerated,
)
from numoe.engine.scheduler import Scheduler, SchedulerConfig
from numoe.engine.store import Store
from numoe.engine.store.chunks import UNKNOWN_ROUNDING
from numoe.engine.store.fingerprint import ModelFingerprint
from numoe.engine.store.manifest import Origin
from numoe.engine.store.portable import kv_type_name
from numoe.engine.worker.engine import Engine
from numoe.engine.worker.kv_pool import F16, KvType
from tests.engine.worker.local import local_forward

PATIENCE_S = 30.0
CONTEXT = 1536


class Slow:
    """A store whose writes take some seconds longer."""

    def __init__(self, store: Store, seconds: float) -> None:
        self._store, self._seconds = store, seconds

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def put_new(self, key: str, data: bytes) -> bool:
        time.sleep(self._seconds)
        return self._store.put_new(key, data)


class Served:
    """An engine whose loop runs; `ask` is one request from its prompt to its end."""

    def __init__(self, engine: Engine, events: list[Event], arrived: threading.Condition) -> None:
        self.engine, self.events, self._arrived = engine, events, arrived
        self._numbers = 0

    def submit(self, tokens: Sequence[int], max_tokens: int = 8, **rest: Any) -> str:
        """Begin a request; its id."""
        self._numbers += 1
        name = str(self._numbers)
        sampling = SamplingParams(**rest.pop("sampling", {}))
        self.engine.submit(
            GenerationRequest(
                request_id=name, token_ids=tuple(tokens), max_tokens=max_tokens, sampling=sampling, **rest
            )
        )
        return name

    def started(self, name: str) -> None:
        """Wait until a request runs."""
        with self._arrived:
            assert self._arrived.wait_for(lambda: any(isinstance(e, Started) for e in self.of(name)), PATIENCE_S)

    def end(self, name: str) -> tuple[int, list[int], Finished]:
        """Wait for the end of a request: its cached tokens, what it generated, and how it ended."""
        with self._arrived:
            assert self._arrived.wait_for(lambda: any(isinstance(e, Finished) for e in self.of(name)), PATIENCE_S)
            mine = self.of(name)
        cached = next((e.cached_tokens for e in mine if isinstance(e, Started)), -1)
        return cached, [e.token_id for e in mine if isinstance(e, TokenGenerated)], mine[-1]  # type: ignore[return-value]

    def ask(self, tokens: Sequence[int], max_tokens: int = 8, **rest: Any) -> tuple[int, list[int]]:
        """The cached tokens of a request, and what it generated."""
        cached, generated, finished = self.end(self.submit(tokens, max_tokens, **rest))
        assert finished.reason in ("length", "stop"), finished
        return cached, generated

    def of(self, name: str) -> list[Event]:
        """The events of a request or an operation."""
        return [event for event in self.events if event.request_id == name]

    def progress(self, name: str) -> list[SlotProgress]:
        """How an operation went on."""
        return [event for event in self.of(name) if isinstance(event, SlotProgress)]

    def settle(self) -> None:
        """Wait until the prompt cache has saved everything."""
        cache = self.engine._caching.cache
        assert cache is not None
        assert cache.flush(time.monotonic() + PATIENCE_S)


@contextmanager
def served(
    path: Path, store: Store | None, *, ram: int = 1 << 30, limit: int | None = None, shards: int = 1, slots: int = 2,
    n_pages: int = 12, kv_type: KvType = F16, resume: bool = False, save: bool = False, keep: int | None = None,
    context: int = CONTEXT, rounding: bytes = UNKNOWN_ROUNDING,
) -> Iterator[Served]:  # fmt: skip
    """An engine over the model at `path`; save: conversations go to the store at the end, as at SIGTERM."""
    with GgufFile.open(path) as gguf:
        origin = Origin.of(ModelFingerprint.from_gguf(gguf), kv_type_name(kv_type))
    with local_forward(path, shards=shards, slots=slots, context=context, kv_type=kv_type, n_pages=n_pages) as forward:
        scheduler = Scheduler(
            SchedulerConfig(
                slots=slots, context=context, chunk_tokens=64, queue_limit=8, n_pages=n_pages, keep=keep,
                fingerprint=origin.fingerprint, kv_type=origin.kv_type, caches=bool(store or ram),
            )
        )  # fmt: skip
        events: list[Event] = []
        arrived = threading.Condition()

        def emit(new: list[Event]) -> None:
            with arrived:
                events.extend(new)
                arrived.notify_all()

        tier = None if store is None else StoreTier(store, limit)
        memory = RamTier(ram) if ram else None
        engine = Engine(scheduler, forward, emit, ram=memory, tier=tier, origin=origin, rounding=rounding)
        if resume:
            engine.resume()
        loop = threading.Thread(target=engine.run, daemon=True)
        loop.start()
        try:
            yield Served(engine, events, arrived)
        finally:
            engine.stop()
            engine.close(save_until=time.monotonic() + PATIENCE_S if save else None)
            loop.join(PATIENCE_S)
            assert not loop.is_alive()
            scheduler.check_integrity()
