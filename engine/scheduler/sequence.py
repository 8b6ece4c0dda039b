"""A request while it lives in the scheduler."""

from __future__ import annotations

from dataclasses import dataclass, field

from numoe.engine.kv.pages import PageTable
from numoe.engine.kv.prefix import ChunkKeys
from numoe.engine.requests import GenerationRequest, Timings
from numoe.engine.sampling import Sampler
from numoe.engine.scheduler.load import Load


@dataclass(eq=False)
class Sequence:
    """A request's tokens and how far they are computed.

    tokens:   the prompt and what was generated, unless the context was full and the middle was
              dropped. generated: how many. computed: how many of `tokens` are in the KV cache.
    read:     so many of the tokens are read, in long steps: of the prompt, or of all when the middle was dropped,
              all but the last one. The others are computed in short ones, where that makes a difference
              (`SchedulerConfig.few_rows`).
    number:   counts submissions: the lower, the older, and the older goes first.
    keys:     of its full pages, None if it neither uses nor leaves cached pages.
    loadable: chunks from the first on that the prompt cache is known to have; None while that is
              being found out, since `asked`. load: chunks on their way into its pages.
    foreign:  the numbers of its chunks that were computed, or begun, where sums are rounded otherwise. When it
              has begun it takes no others of them any more, whatever happens to its pages: it would go on
              with other words.
    stepped:  the number of its last short step.
    slot:     None while it waits. announced: whether its start was told. Times are
              the scheduler's clock, seconds; None before they happen.
    """

    request: GenerationRequest
    sampler: Sampler
    table: PageTable
    number: int
    submitted: float
    keys: ChunkKeys | None = None
    tokens: list[int] = field(default_factory=list)
    generated: int = 0
    computed: int = 0
    read: int = 0
    stepped: int = 0
    loadable: int | None = 0
    asked: float = 0.0
    load: Load | None = None
    foreign: set[int] = field(default_factory=set)
    slot: int | None = None
    announced: bool = False
    admitted: float | None = None
    first_token: float | None = None

    def __post_init__(self) -> None:
        self.tokens = list(self.request.token_ids)
        self.foreign = set(self.request.foreign or ())
        self.read = len(self.tokens) - 1

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.token_ids)

    @property
    def has_begun(self) -> bool:
        """Whether it has computed something, here or with a worker that died."""
        return self.announced or self.request.foreign is not None

    def takes(self, number: int) -> bool:
        """Whether it takes a chunk that was computed where sums are rounded otherwise."""
        return not self.has_begun or number in self.foreign

    @property
    def pending(self) -> int:
        """Tokens that are not in the KV cache yet: one in decode, more in prefill."""
        return len(self.tokens) - self.computed

    @property
    def is_decoding(self) -> bool:
        """Whether the next step only needs the token generated last."""
        return self.generated > 0 and self.pending == 1

    def timings(self, now: float) -> Timings:
        """Milliseconds spent so far, by phase."""
        admitted = now if self.admitted is None else self.admitted
        first_token = now if self.first_token is None else self.first_token
        return Timings(
            queued_ms=1e3 * (admitted - self.submitted),
            prefill_ms=1e3 * (first_token - admitted),
            decode_ms=1e3 * (now - first_token),
        )
