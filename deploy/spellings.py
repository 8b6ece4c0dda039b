"""Options of llama-server and ik_llama.cpp that people will type, and what to say instead."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

_MODEL: Final = "the model is the first argument: numoe serve MODEL.gguf"
_EXPERTS: Final = "experts are on the CPUs anyway, but for the layers that --gpu-experts puts on the GPU"
_BATCH: Final = "--chunk says how many prompt tokens a step takes in"
_NEEDLESS: Final = "leave it out, numoe always does that"
_GRPC: Final = "numoe answers gRPC, with reflection: see proto/numoe/v1"
_SPELLINGS: Final = {
    ("-m", "--model"): _MODEL,
    ("-c",): "write --ctx-size",
    ("-np",): "write --parallel",
    ("-t", "-tb", "--threads-batch"): "--threads is for all that computes",
    ("-b", "--batch-size", "-ub", "--ubatch-size"): _BATCH,
    ("-ctk",): "write --cache-type-k",
    ("-ctv",): "write --cache-type-v",
    ("--host", "--port"): "write --listen HOST:PORT",
    ("--api-key", "--api-key-file"): "--token-file names a file of tokens, one a line",
    ("--ssl-cert-file",): "write --tls-cert",
    ("--ssl-key-file",): "write --tls-key",
    ("-ngl", "--gpu-layers", "--n-gpu-layers"): "attention is on the GPU as a whole, or not: --device gpu or cpu",
    ("-ot", "--override-tensor", "-cmoe", "--cpu-moe", "-ncmoe", "--n-cpu-moe"): _EXPERTS,
    ("-fa", "--flash-attn", "-fmoe", "--fused-moe", "-rtr", "--run-time-repack", "-cb", "--cont-batching"): _NEEDLESS,
    ("--no-mmap", "--mlock"): "leave it out, weights always lie packed in shared memory",
    ("--metrics",): "numoe status --json has the figures",
    ("--jinja", "--chat-template", "-a", "--alias"): _GRPC,
    ("-n", "--predict", "--n-predict"): "write --max-tokens",
    ("--temp",): "write --temperature",
    ("-s",): "write --seed",
    ("-p", "--prompt"): 'the prompt is the first argument: numoe generate "Once upon a time"',
    ("-sys", "--system-prompt"): "write --system",
    ("--repeat-penalty",): "write --repetition-penalty",
}


def hint_for(tokens: Iterable[str]) -> str:
    """What to say instead of the first of these command-line arguments that is another program's option, or nothing."""
    hints = {name: f"{name}: {hint}" for names, hint in _SPELLINGS.items() for name in names}
    return next((hints[name] for token in tokens if (name := token.split("=", 1)[0]) in hints), "")
