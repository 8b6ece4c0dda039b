"""`numoe logits`: a model's logits for given tokens, through the same actors that serve."""

from __future__ import annotations

import json
from pathlib import Path

from numoe.deploy.commands.placement import ANYWHERE, Placement
from numoe.deploy.console import one_line_errors
from numoe.deploy.signals import StopSignals
from numoe.engine.errors import InputError

_ROWS_AT_ONCE = 64


def logits(
    model: str, /, *, tokens_file: Path, out: Path, chunk: int = _ROWS_AT_ONCE, placement: Placement = ANYWHERE,
) -> int:  # fmt: skip
    """Write the logits of every position of a token sequence.

    Parameters
    ----------
    model
        The GGUF file.
    tokens_file
        A JSON file holding a list of token ids.
    out
        The .npz file to write: float32 `logits` [tokens, vocab] and int32 `tokens` [tokens].
    chunk
        Tokens of a step.
    placement
        Where the model runs.

    """
    with one_line_errors(), StopSignals():
        import numpy as np

        from numoe.cluster.calls import get
        from numoe.deploy.launch import running_server

        tokens = _read_tokens(tokens_file)
        if not out.parent.is_dir():
            raise InputError(f"--out {out}: there is no folder {out.parent}; make it first")
        options = placement.plan_options(context=len(tokens), slots=1, chunk=min(chunk, len(tokens)))
        with running_server(model, options, None) as server:
            worker, parts = server.worker(), []
            get(worker.begin_logits.remote(tokens, options.chunk))
            while (part := get(worker.next_logits.remote())) is not None:
                parts.append(np.array(part))
        with out.open("wb") as file:
            np.savez(file, tokens=np.array(tokens, np.int32), logits=np.concatenate(parts))
        print(f"wrote {out}: logits float32 [{len(tokens)}, {parts[0].shape[1]}]")
    return 0


def _read_tokens(path: Path) -> list[int]:
    try:
        tokens = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as a JSON list of token ids: {error}") from None
    if not isinstance(tokens, list) or not tokens or not all(type(token) is int for token in tokens):
        raise InputError(f"{path} must hold a JSON list of at least one token id")
    return tokens
