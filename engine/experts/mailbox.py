"""The mailbox: one shared-memory segment through which the attention worker asks the shards.

    offset        word                          written by
    0             magic, layout version         the worker, once
    64            request sequence (uint32)     the worker
    192           request: layer, rows          the worker, before the sequence
    256           stop (uint32)                 the worker
    320           a step is under way (uint32)  a worker that cannot wake sleepers: a GPU
    328           since when, CLOCK_MONOTONIC   that worker
    4096 + 256 s  shard s: reply sequence       shard s
      + 64        sleepers on the reply         the worker
      + 128       heartbeat (uint32)            shard s
      + 192       nanoseconds the request took  shard s
      + 200       bytes of weights that requests of few rows read, and the nanoseconds they took, in all
      + 216       sleepers on the request       shard s
    then          expert ids int32 [max_rows, top_k], routing weights float32 [max_rows, top_k],
                  activations as 8-bit rows and as float32 rows, [max_rows] each,
                  partial sums float32 [shards, max_rows, hidden]

A request is valid once its sequence number is there; a reply likewise. Sequence numbers only grow
(and wrap around at 2^32). One request is under way at a time, and nothing of it changes before every shard
has answered: so each shard's reply is the request or the one before, and a shard that takes a dead one's place
goes on behind the dead one's reply. A worker that takes another's place waits until all have answered.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from numoe.engine.cpu.memory import address, align
from numoe.engine.cpu.rows import activation_bytes
from numoe.engine.cpu.sync import wake_word
from numoe.engine.errors import UnavailableError
from numoe.engine.shm import SharedSegment

MAGIC = 0x6E756D6F65_02
REQUEST_SEQUENCE, REQUEST_LAYER, REQUEST_ROWS, STOP, STEPPING = 64, 192, 200, 256, 320
STEP_START = 328
SHARDS_AT, SHARD_STRIDE = 4096, 256
REPLY_SLEEPERS, HEARTBEAT, BUSY_NS, READ_BYTES, READ_NS, REQUEST_SLEEPERS = 64, 128, 192, 200, 208, 216
FEW_ROWS = 4
"""Requests of so many rows at most are as fast as weights are read."""
_WAKE_S = 0.01  # more than sleepers need to get up
_LOOK_S = 0.001


class LateShardError(UnavailableError):
    """A shard that shows no sign of life; the step can be run again when it, or another in its place, does."""

    def __init__(self, shard: int) -> None:
        super().__init__(f"expert shard {shard} did not answer; it may have died")


@dataclass(frozen=True)
class MailboxLayout:
    """Offsets, in bytes, of a mailbox for `shards` shards and at most `max_rows` rows a request."""

    shards: int
    max_rows: int
    top_k: int
    hidden: int

    @property
    def ids(self) -> int:
        """Expert ids int32 [max_rows, top_k]."""
        return align(SHARDS_AT + SHARD_STRIDE * self.shards, 4096)

    @property
    def weights(self) -> int:
        """Routing weights float32 [max_rows, top_k]."""
        return align(self.ids + 4 * self.max_rows * self.top_k)

    @property
    def q8_rows(self) -> int:
        """8-bit activation rows."""
        return align(self.weights + 4 * self.max_rows * self.top_k)

    @property
    def f32_rows(self) -> int:
        """float32 activation rows."""
        return align(self.q8_rows + self.max_rows * activation_bytes(self.hidden, "q8"))

    @property
    def partials(self) -> int:
        """Partial sums float32 [shards, max_rows, hidden]."""
        return align(self.f32_rows + self.max_rows * activation_bytes(self.hidden, "f32"), 4096)

    @property
    def partial_bytes(self) -> int:
        """Bytes of one shard's partial sums."""
        return 4 * self.max_rows * self.hidden

    @property
    def nbytes(self) -> int:
        """Bytes of the whole segment."""
        return align(self.partials + self.shards * self.partial_bytes, 4096)

    def reply(self, shard: int) -> int:
        """Where shard number `shard` has its words."""
        return SHARDS_AT + SHARD_STRIDE * shard


class Mailbox:
    """A mapped mailbox; the worker creates it, shards attach."""

    def __init__(self, segment: SharedSegment, layout: MailboxLayout) -> None:
        self.segment, self.layout = segment, layout
        self.base = address(segment.array)

    @classmethod
    def create(cls, path: str, layout: MailboxLayout) -> Mailbox:
        """Make the segment; ResourceError if /dev/shm has no room for it."""
        segment = SharedSegment.create(path, layout.nbytes)
        segment.array[:8].view(np.int64)[0] = MAGIC
        return cls(segment, layout)

    @classmethod
    def attach(cls, path: str, layout: MailboxLayout) -> Mailbox:
        """Map an existing segment."""
        return cls(SharedSegment.attach(path, layout.nbytes), layout)

    def partials(self) -> npt.NDArray[np.float32]:
        """The partial sums, float32 [shards, max_rows, hidden]."""
        at, size = self.layout.partials, self.layout.shards * self.layout.partial_bytes
        flat = self.segment.array[at : at + size].view(np.float32)
        return flat.reshape(self.layout.shards, self.layout.max_rows, self.layout.hidden)

    def reading(self, shard: int) -> tuple[int, int]:
        """Bytes of weights that a shard has read for requests of few rows, and the nanoseconds that they took."""
        at = self.layout.reply(shard) + READ_BYTES
        nbytes, nanoseconds = self.segment.array[at : at + 16].view(np.int64)
        return int(nbytes), int(nanoseconds)

    def word(self, at: int) -> npt.NDArray[np.uint32]:
        """The uint32 at offset `at`, as a view [1]."""
        return self.segment.array[at : at + 4].view(np.uint32)

    def shard_words(self, at: int) -> npt.NDArray[np.uint32]:
        """The uint32 at offset `at` in the words of each shard, as a view [shards]."""
        every = self.segment.array[SHARDS_AT : SHARDS_AT + SHARD_STRIDE * self.layout.shards].view(np.uint32)
        return every.reshape(self.layout.shards, -1)[:, at // 4]

    @property
    def sequence(self) -> int:
        """The last request's number."""
        return int(self.word(REQUEST_SEQUENCE)[0])

    def take_over(self) -> None:
        """Forget the waiters and the step of a worker that has died; for its successor, before anything else."""
        self.shard_words(REPLY_SLEEPERS)[:] = 0
        self.end_step()

    def await_replies(self, bound_s: float) -> None:
        """Return when every shard has answered the last request, so that the next one may be written.

        Raises LateShardError for one that has not after `bound_s` seconds.
        """
        until = time.monotonic() + bound_s
        while (behind := (self.shard_words(0) - self.word(REQUEST_SEQUENCE)).view(np.int32) < 0).any():
            if time.monotonic() > until:
                raise LateShardError(int(behind.argmax()))
            time.sleep(_LOOK_S)

    def begin_step(self) -> None:
        """Keep the shards' threads from sleeping until `end_step`: requests come from one who cannot wake them."""
        words = self.segment.array
        words[STEP_START : STEP_START + 8].view(np.int64)[0] = time.monotonic_ns()
        self.word(STEPPING)[0] = 1

    def wake_shards(self) -> None:
        """Wake those who were asleep when the step began."""
        sleepers, until = self.shard_words(REQUEST_SLEEPERS), time.monotonic() + _WAKE_S
        while sleepers.any() and time.monotonic() < until:
            wake_word(self.base + REQUEST_SEQUENCE)

    def end_step(self) -> None:
        """Let the shards' threads park again."""
        self.word(STEPPING)[0] = 0

    def stop_shards(self) -> None:
        """Tell every shard to leave its loop."""
        self.word(STOP)[0] = 1
        wake_word(self.base + REQUEST_SEQUENCE)

    def close(self) -> None:
        """Unmap; the file stays until its owner removes it."""
        self.segment.close()
