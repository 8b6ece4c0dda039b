"""numoe: the experts of a model alone (backend "experts"), or the read bandwidth (backend "read")."""

from __future__ import annotations

import secrets
from statistics import median

import numpy as np

from numoe.deploy.commands.bench.stand import Stand
from numoe.engine import shm
from numoe.engine.cpu.sync import await_counter
from numoe.engine.experts.exchange import publish_request
from numoe.engine.experts.mailbox import (
    REPLY_SLEEPERS,
    REQUEST_LAYER,
    REQUEST_ROWS,
    Mailbox,
    MailboxLayout,
)
from numoe.engine.experts.shard import ExpertShard, ShardSlice
from numoe.engine.gguf import GgufFile
from numoe.engine.models.config import ModelConfig
from numoe.engine.weights import free_weights
from peers.job import Ids, Job, Result, time_experts

_READ_BYTES, _READS = 600_000_000, 5
_PARK_NS = 100_000_000


class Client:
    """Asks the shard as the attention worker does, and sleeps until the reply is there."""

    def __init__(self, mailbox: Mailbox) -> None:
        self._mailbox, self._sequence = mailbox, 0

    def ask(self, layer: int, ids: Ids) -> None:
        """One request: `ids` are experts of the layer, [rows, top_k]. The activations are what lies there."""
        array, layout, base = self._mailbox.segment.array, self._mailbox.layout, self._mailbox.base
        array[layout.ids : layout.ids + 4 * ids.size].view(np.int32)[:] = ids.reshape(-1)
        array[REQUEST_LAYER : REQUEST_LAYER + 8].view(np.int64)[0] = layer
        array[REQUEST_ROWS : REQUEST_ROWS + 8].view(np.int64)[0] = len(ids)
        self._sequence += 1
        publish_request(base, layout.shards, self._sequence)
        reply = base + layout.reply(0)
        while not await_counter(reply, reply + REPLY_SLEEPERS, np.uint32(self._sequence), 0, _PARK_NS):
            pass


def experts(job: Job) -> Result:
    """One shard that holds all experts of the model, in the formats of the file."""
    folder = shm.create_folder(f"peers-{secrets.token_hex(4)}")
    try:
        with GgufFile.open(job.model) as gguf:
            config = ModelConfig.from_gguf(gguf)
            mailbox = Mailbox.create(
                str(folder / "mailbox"), MailboxLayout(1, max(job.prompt, 1), job.top_k, job.hidden)
            )
            shard = ExpertShard(
                config, gguf, mailbox, ShardSlice(0, 1),
                folder=folder, threads=job.workers, threads_on_host=job.workers,
            )  # fmt: skip
            shard.load()
            routed = [layer for layer in range(config.n_layers) if f"blk.{layer}.ffn_gate_exps.weight" in gguf.tensors]
            kinds = {info.qtype.name for name, info in gguf.tensors.items() if "_exps." in name}
        shard.start()
        try:
            client = Client(mailbox)
            one, many = time_experts(job, len(routed), lambda at, ids: client.ask(routed[at], ids))
        finally:
            mailbox.stop_shards()
            shard.join()
            shard.close()
    finally:
        free_weights(folder)
        shm.remove_folder(folder)
    return Result(
        format="+".join(sorted(kinds)),
        one_row_us=one,
        many_rows_ms=many,
        expert_bytes=shard.nbytes / (len(routed) * job.experts),
    )


def read(job: Job) -> Result:
    """The bandwidth of plain reading with as many threads."""
    with Stand(_READ_BYTES, job.workers, 1) as stand:
        return Result(read_gb_s=median(stand.read() for _ in range(_READS)) / 1e9)


if __name__ == "__main__":
    given = Job.from_command_line()
    (read if given.backend == "read" else experts)(given).print()
