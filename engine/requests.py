"""What passes between the gateway and the attention worker: requests in, events out.

Everything here is an immutable value that pickles cheaply. The gateway owns text (tokenizing, stop
strings, streaming); the worker knows only token ids.
"""

from __future__ import annotations

from typing import Literal

import msgspec

FinishReason = Literal["stop", "length", "cancelled", "deadline", "error", "unavailable", "slot_busy"]


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How the next token is chosen. Defaults are greedy and penalty-free.

    temperature:        0 is greedy; otherwise logits are divided by it.
    top_k:              keep the k likeliest tokens; 0 keeps all.
    top_p, min_p:       nucleus, and a floor relative to the likeliest token; 1 and 0 keep all.
    repetition_penalty: Keskar et al. 2019 (CTRL): positive logits of seen tokens divided by it,
                        negative ones multiplied; 1 is off.
    presence_penalty, frequency_penalty: subtracted once, and per occurrence, from the logits of
                        tokens generated or prompted within `penalty_window`; 0 is off.
    penalty_window:     tokens looked back on; 0 is off, -1 the whole sequence.
    logit_bias:         (token id, value added to its logit) pairs; -inf bans a token.
    seed:               equal seeds give equal choices for equal logits, whatever else runs.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    penalty_window: int = 64
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0


class GenerationRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One prompt to continue.

    token_ids:   the prompt, at least one token.
    max_tokens:  tokens to generate at most, at least one.
    stop_ids:    ids that end the generation (end-of-generation tokens included unless ignored).
    logprobs:    None, or how many of the likeliest tokens to report beside each chosen one.
    deadline:    `time.time()` after which the request is given up, or None.
    cache_salt:  only requests with the same salt share cached keys and values.
    bypass_cache: cached keys and values are neither used nor left behind.
    slot:        run in this slot, going on from what it holds, or None for any.
    slot_deadline: `time.time()` until which to wait while others use that slot; None: not at all.
    generated:   the first tokens of the answer, where a worker that died has made them: the next one goes
                 on behind them as if nothing had happened, and only what follows is told.
    foreign:     of a request that goes on: see `Started.foreign`. It takes only these from where sums are rounded
                 otherwise, for what it says must not change; None takes any.
    """

    request_id: str
    token_ids: tuple[int, ...]
    max_tokens: int
    sampling: SamplingParams = SamplingParams()
    stop_ids: frozenset[int] = frozenset()
    logprobs: int | None = None
    deadline: float | None = None
    cache_salt: bytes = b""
    bypass_cache: bool = False
    slot: int | None = None
    slot_deadline: float | None = None
    generated: tuple[int, ...] = ()
    foreign: tuple[int, ...] | None = None


class Timings(msgspec.Struct, frozen=True, kw_only=True):
    """Milliseconds a request spent: waiting for a slot, in its prompt, generating."""

    queued_ms: float = 0.0
    prefill_ms: float = 0.0
    decode_ms: float = 0.0


class TokenLogprob(msgspec.Struct, frozen=True):
    """A token and the natural logarithm of its probability before sampling filters."""

    token_id: int
    logprob: float


class Started(msgspec.Struct, frozen=True, tag=True):
    """The request has a slot; `cached_tokens` of its prompt need no prefill.

    foreign: the numbers of the cached chunks that were computed where sums are rounded otherwise than here.
    """

    request_id: str
    prompt_tokens: int
    cached_tokens: int
    foreign: tuple[int, ...] = ()


class PrefillProgress(msgspec.Struct, frozen=True, tag=True):
    """`done_tokens` of `prompt_tokens` are in the KV cache."""

    request_id: str
    done_tokens: int
    prompt_tokens: int


class TokenGenerated(msgspec.Struct, frozen=True, tag=True):
    """One more token; with its logprob and the likeliest alternatives if asked for."""

    request_id: str
    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[TokenLogprob, ...] = ()


class Finished(msgspec.Struct, frozen=True, tag=True):
    """The last event of a request.

    With reason "error", with "unavailable" where the same request may succeed later, and with
    "slot_busy" where its slot was in use for too long, `error` says what happened.

    A stop token ends the stream with reason "stop" and is itself not sent as a TokenGenerated.
    """

    request_id: str
    reason: FinishReason
    completion_tokens: int
    timings: Timings
    error: str = ""


class SlotProgress(msgspec.Struct, frozen=True, tag=True):
    """A save or restore goes on: `request_id` is that of the operation; chunks and bytes of the snapshot."""

    request_id: str
    done_chunks: int
    chunks: int
    done_bytes: int
    bytes: int


Event = Started | PrefillProgress | TokenGenerated | Finished | SlotProgress

SlotState = Literal["idle", "loading", "prefill", "decode", "saving", "restoring"]


class SlotStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One slot as `numoe slots list` shows it.

    state: "idle" with or without tokens; "loading" while cached keys and values are fetched.
    tokens: of the conversation it holds; computed: how many of them have keys and values.
    cached: how many of those are in the attention worker's memory now; the others come from the
    prompt cache when they are needed. snapshot: the one it was saved to or restored from last.
    last_used: seconds since 1970, 0 for never.
    """

    slot: int
    state: SlotState
    request_id: str = ""
    tokens: int = 0
    computed: int = 0
    cached: int = 0
    snapshot: str = ""
    last_used: float = 0.0


class SlotReport(msgspec.Struct, frozen=True, kw_only=True):
    """What an operation on a slot did.

    tokens, computed: of the slot afterwards. chunks, bytes: of the snapshot; moved_chunks,
    moved_bytes: what was uploaded (save) or read (restore) for it, the rest being there already.
    """

    slot: int
    snapshot: str = ""
    tokens: int = 0
    computed: int = 0
    chunks: int = 0
    bytes: int = 0
    moved_chunks: int = 0
    moved_bytes: int = 0
    seconds: float = 0.0


class SnapshotInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot in the store; created: seconds since 1970; mismatch: why it cannot be restored here, if so."""

    name: str
    tokens: int
    computed: int
    bytes: int
    created: float
    mismatch: str = ""


class CacheStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The prompt cache beyond the KV pages.

    ram_bytes, ram_limit: chunks in host memory. store_bytes, store_limit: chunks in the store, as
    far as this server knows. pending: chunks to be written yet. hits_*, misses: chunks looked up.
    store_error: why the store is not used at the moment, if so.
    """

    ram_bytes: int = 0
    ram_limit: int = 0
    store_url: str = ""
    store_bytes: int = 0
    store_limit: int = 0
    pending: int = 0
    dropped: int = 0
    hits_pages: int = 0
    hits_ram: int = 0
    hits_store: int = 0
    misses: int = 0
    store_error: str = ""


class WorkerStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What the attention worker is doing.

    kv_pages_used, kv_pages_cached, kv_pages_total: pages of the KV cache: that sequences hold, that
    nobody holds but a prompt may find again, and all. step_ms: the last step's milliseconds by
    part ("attention", "experts", "wait", "sampling", "total").
    """

    slots: tuple[SlotStatus, ...]
    queued: int
    queue_limit: int
    kv_pages_used: int
    kv_pages_cached: int
    kv_pages_total: int
    steps: int
    step_ms: dict[str, float]
    cache: CacheStatus = CacheStatus()
