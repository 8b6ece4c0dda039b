"""A scheduler with a forward pass that only remembers: what attention would read can be looked at."""

from __future__ import annotations

import numpy as np

from numoe.engine.kv import PAGE_TOKENS
from numoe.engine.kv.journal import PageJournal, journal_layout
from numoe.engine.requests import GenerationRequest
from numoe.engine.sampling import SampledToken
from numoe.engine.scheduler import Batch, Scheduler, SchedulerConfig


class Clock:
    """Seconds that pass only when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def make(
    slots=2, context=600, chunk_tokens=64, queue_limit=4, n_pages=None, clock=None, memory=None, **rest
) -> Scheduler:
    """A scheduler; memory: of its journal, which may be that of one before (`journal_memory`)."""
    pages = slots * -(-context // PAGE_TOKENS) if n_pages is None else n_pages
    config = SchedulerConfig(
        slots=slots, context=context, chunk_tokens=chunk_tokens, queue_limit=queue_limit, n_pages=pages, **rest
    )
    return Scheduler(config, clock or Clock(), PageJournal(pages, slots, context, memory))


def journal_memory(n_pages: int, slots: int, context: int) -> np.ndarray:
    """Memory of a journal that outlives its scheduler."""
    return np.zeros(journal_layout(n_pages, slots, context).itemsize, np.uint8)


def request(name="a", prompt=3, max_tokens=100, **rest) -> GenerationRequest:
    """A request; `prompt` is its length or its ids."""
    ids = tuple(range(1000, 1000 + prompt)) if isinstance(prompt, int) else tuple(prompt)
    return GenerationRequest(request_id=name, token_ids=ids, max_tokens=max_tokens, **rest)


class Cache:
    """KV pages that hold token ids in place of keys and values."""

    def __init__(self, n_pages: int) -> None:
        self._ids = np.full((n_pages, PAGE_TOKENS), -1)

    def run(self, batch: Batch) -> None:
        """What a forward pass does to the cache: every row goes to its place."""
        pages = batch.page_tables[batch.slots, batch.positions // PAGE_TOKENS]
        self._ids[pages, batch.positions % PAGE_TOKENS] = batch.token_ids

    def copy(self, source: int, target: int) -> None:
        """What the tail of a load does."""
        self._ids[target] = self._ids[source]

    def page(self, page: int) -> np.ndarray:
        """The token ids in a page, to be read or written."""
        return self._ids[page]

    def read(self, batch: Batch, row: int) -> list[int]:
        """What attention reads for a row: the tokens from position 0 to its own."""
        length = int(batch.positions[row]) + 1
        pages = batch.page_tables[batch.slots[row], : -(-length // PAGE_TOKENS)]
        return self._ids[pages].reshape(-1)[:length].tolist()


def names(batch: Batch | None) -> list[str]:
    """Whose rows a batch holds, in order."""
    return [] if batch is None else [part.sequence.request.request_id for part in batch.parts]


def rows(batch: Batch) -> dict[str, int]:
    """How many rows of whom."""
    return {part.sequence.request.request_id: part.rows for part in batch.parts}


def step(scheduler: Scheduler, token_id: int = 7, now: float = 0.0) -> Batch | None:
    """One step in which every sequence that wants a token gets the same."""
    batch = scheduler.schedule(now)
    if loads := scheduler.ledger.drain_loads():  # tails that are copied from page to page
        for load in loads:
            scheduler.loaded(load, 0, tail=True)
        batch = scheduler.schedule(now)
    if batch is not None:
        scheduler.postprocess(batch, [SampledToken(token_id)] * len(batch.logit_rows))
    scheduler.check_integrity()
    return batch
