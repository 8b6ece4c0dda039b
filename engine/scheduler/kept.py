"""What ran when the worker before died: each run waits for its request, in the slot and the pages that it had."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq

from numoe.engine.kv.journal import KeptRun, PageJournal, digest_of
from numoe.engine.scheduler.sequence import Sequence
from numoe.engine.scheduler.slots import Slots


class KeptRuns:
    """The runs of a journal, none if nobody died.

    give_back: is told which pages nobody waits for any more; until then they are to be held (`pages`).
    """

    def __init__(self, journal: PageJournal, slots: Slots, give_back: Callable[[Seq[int]], None]) -> None:
        self._journal, self._slots, self._give_back = journal, slots, give_back
        self._runs = journal.runs()
        slots.reserved.update(run.slot for run in self._runs.values())

    @property
    def pages(self) -> Iterator[int]:
        """Pages of runs that wait, each as often as it belongs to one."""
        return (page for run in self._runs.values() for page in run.pages)

    def take(self, sequence: Sequence) -> KeptRun | None:
        """The run of a request, if it holds its tokens and can go on in its slot; its pages are still to be held."""
        run = self._runs.pop(digest_of(sequence.request.request_id), None)
        if run is None:
            return None
        self._slots.reserved.discard(run.slot)
        agrees = self._journal.agrees(run, sequence.tokens) and self._slots.is_free(run.slot)
        if not agrees or sequence.request.slot not in (None, run.slot):
            self._let_go(run)
            return None
        return run

    def forget(self) -> None:
        """Whoever has not come by now does not come any more."""
        for run in self._runs.values():
            self._let_go(run)
        self._runs.clear()
        self._slots.reserved.clear()

    def _let_go(self, run: KeptRun) -> None:
        """Nobody goes on with a run: its pages may be given out, so the journal must not name them."""
        if self._slots.sequences[run.slot] is None:  # else what it says of the slot is of that one
            self._journal.clear(run.slot)
        self._give_back(run.pages)
