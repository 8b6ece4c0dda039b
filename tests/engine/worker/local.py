"""The forward pass with its shards in this process: no Ray, the real mailbox and the real kernels."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np

from numoe.engine import shm
from numoe.engine.experts.mailbox import Mailbox, MailboxLayout
from numoe.engine.experts.shard import ExpertShard, ShardSlice, expert_layers
from numoe.engine.gguf import GgufFile
from numoe.engine.kv.pages import pages_for
from numoe.engine.models.config import ModelConfig
from numoe.engine.progress import Progress
from numoe.engine.scheduler import Batch
from numoe.engine.weights import free_weights
from numoe.engine.worker.forward import CpuForward
from numoe.engine.worker.kv_pool import F16, KvType
from numoe.engine.worker.options import Forward, ForwardOptions

Made = TypeVar("Made", bound=Forward)


@contextmanager
def local_forward(
    path: Path, *, shards: int = 1, threads: int = 2, max_rows: int = 96, slots: int = 8, context: int = 512,
    absent: Collection[int] = (), late: list[ExpertShard] | None = None, bound_s: float = 30.0, kv_type: KvType = F16,
    n_pages: int | None = None, gpu_layers: int = 0,
    make: Callable[[ModelConfig, GgufFile, Mailbox | None, ForwardOptions, Progress], Made] = CpuForward,
) -> Iterator[Made]:  # fmt: skip
    """A forward pass over the model at `path`; shards in `absent` are not started but added to `late`."""
    folder = shm.create_folder(f"test-{secrets.token_hex(4)}")
    gguf = GgufFile.open(path)
    config, running, mailbox = ModelConfig.from_gguf(gguf), [], None
    try:
        if config.moe is not None and gpu_layers < len(expert_layers(config, gguf)):
            layout = MailboxLayout(shards, max_rows, config.moe.n_used, config.hidden)
            mailbox = Mailbox.create(str(folder / "mailbox"), layout)
            for index in range(shards):
                cut = ShardSlice(index, shards, gpu_layers)
                shard = ExpertShard(config, gguf, mailbox, cut, folder=folder, threads=threads, threads_on_host=99)
                shard.load()
                running.append(shard)
                if index not in absent:
                    shard.start()
                elif late is not None:
                    late.append(shard)
        options = ForwardOptions(
            max_rows=max_rows, slots=slots, n_pages=n_pages or slots * pages_for(context), context=context,
            threads=threads, threads_on_host=99, shard_bound_s=bound_s, kv_type=kv_type, gpu_layers=gpu_layers,
        )  # fmt: skip
        forward = make(config, gguf, mailbox, options, Progress(1))
        forward.attach_experts(folder)
        yield forward
        forward.close()
    finally:
        if mailbox is not None:
            mailbox.stop_shards()
            for shard in running:
                shard.join()
                shard.close()
        free_weights(folder)
        shm.remove_folder(folder)


def batch(forward: Forward, rows: Sequence[tuple[int, int, int]], logit_rows: Sequence[int]) -> Batch:
    """A batch of (token, position, slot) rows; each slot has pages of its own, in descending order."""
    tokens, positions, slots = np.array(rows, np.int32).reshape(-1, 3).T
    options = forward.options
    pages = np.arange(options.n_pages, dtype=np.int32)[::-1].reshape(options.slots, -1)
    return Batch(
        *(np.ascontiguousarray(values) for values in (tokens, positions, slots)),
        np.array(logit_rows, np.int32), np.ascontiguousarray(pages),
    )  # fmt: skip


def sequence_logits(forward: Forward, tokens: Sequence[int], *, chunk: int = 64, slot: int = 0) -> np.ndarray:
    """Logits of every position, float32 [tokens, vocab], `chunk` tokens at a time."""
    parts = []
    for start in range(0, len(tokens), chunk):
        part = tokens[start : start + chunk]
        rows = [(token, start + i, slot) for i, token in enumerate(part)]
        parts.append(np.array(forward.run(batch(forward, rows, range(len(rows))))))
    return np.concatenate(parts)
