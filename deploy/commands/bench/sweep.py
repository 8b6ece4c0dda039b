"""`numoe bench sweep`: speed of prompt and answer over context depth, through the actors that serve."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from numoe.deploy.commands.placement import ANYWHERE, Placement
from numoe.deploy.console import one_line_errors
from numoe.engine.errors import InputError

if TYPE_CHECKING:
    from numoe.cluster.plan import PlanOptions
    from numoe.engine.worker.engine import Measurement
    from numoe.engine.worker.kv_pool import KvType

PARTS = {"attention": "attn", "experts": "exp", "wait": "wait", "other": "other"}
"""The parts of a step, and what a column of the table calls them."""
PLOT_SUFFIXES = (".png", ".svg", ".pdf")
_WARM_UP_TOKENS = 4


@dataclass(frozen=True)
class Window:
    """One row of the sweep: an answer behind `n_kv` tokens, and a prompt in its place; `kv_type` of keys and values."""

    kv_type: str
    n_kv: int
    prefill: Measurement
    decode: Measurement

    def to_json(self) -> dict[str, Any]:
        """llama-sweep-bench's keys, times in seconds, and milliseconds a token by parts."""
        pp, tg = self.prefill, self.decode
        return {
            "kv_type": self.kv_type,
            "n_kv": self.n_kv,
            "pp": pp.tokens,
            "tg": tg.tokens,
            "t_pp": pp.seconds,
            "speed_pp": pp.tokens / pp.seconds,
            "t_tg": tg.seconds,
            "speed_tg": tg.tokens / tg.seconds,
            "ms_pp": ms_per_token(pp),
            "ms_tg": ms_per_token(tg),
        }


def sweep(
    model: str,
    /,
    *,
    ctx_size: int | None = None,
    pp: int = 512,
    tg: int = 32,
    chunk: int | None = None,
    kv_types: str | None = None,
    json_output: Annotated[bool, Parameter(name="--json", negative=())] = False,
    plot: Path | None = None,
    placement: Placement = ANYWHERE,
) -> int:
    """Measure prefill and decode at growing depth, in the form of llama-sweep-bench.

    For N_KV = 0, PP, 2 PP and so on: TG tokens are generated behind N_KV random others (T_TG) and
    forgotten, then PP tokens are read in their place (T_PP). Attention worker and expert
    shards are those of `numoe serve`; gateway and scheduler take no part. A token's milliseconds
    are split into what the attention side computes, what the slowest shard computes, waiting for
    it, and the rest of a step.

    Parameters
    ----------
    model
        The GGUF file; of a split model, any part.
    ctx_size
        Tokens up to which prompts go; as for `numoe serve` if not given.
    pp
        Prompt tokens of a row, and the step from row to row.
    tg
        Tokens that are generated in each row.
    chunk
        Prompt tokens of one step; as for `numoe serve` if not given.
    kv_types
        Types of the KV cache to measure one after the other, with commas between, e.g. f16,q8_0: each of keys and
        values, instead of --cache-type-k and --cache-type-v.
    json_output
        Print one JSON object a line instead of the table.
    plot
        Draw milliseconds a token over depth into this file (.png, .svg, .pdf): the parts of a token if there is one
        type of KV cache; if there are several, for each all of it and what of it is attention's side.
    placement
        Where the model runs.

    """
    with one_line_errors():
        from numoe.deploy.signals import StopSignals

        for flag, value in (("--pp", pp), ("--tg", tg)):
            if value < 1:
                raise InputError(f"{flag} {value} is not possible: give at least 1")
        if plot is not None:
            require_plot(plot)
        windows = list[Window]()
        with StopSignals():
            measured = _options(placement, kv_types, chunk)
            for options in measured:
                for window in _windows(model, ctx_size, pp, tg, options):
                    if not json_output and (not windows or windows[-1].kv_type != window.kv_type):
                        print(header() if len(measured) == 1 else f"KV cache {window.kv_type}\n{header()}")
                    windows.append(window)
                    print(json.dumps(window.to_json()) if json_output else row(window), flush=True)
        if plot is not None:
            draw(windows, plot, Path(model).stem)
    return 0


def _options(placement: Placement, kv_types: str | None, chunk: int | None) -> list[PlanOptions]:
    """What to measure with, for each type of KV cache."""
    from numoe.engine.gpu.kv_pool import GPU_KV_TYPES
    from numoe.engine.worker.kv_pool import KvType

    options = placement.plan_options(slots=1, chunk=chunk)
    if kv_types is None:
        return [options]
    names = [name.strip() for name in kv_types.split(",")]
    if not set(names) <= set(GPU_KV_TYPES):
        raise InputError(f"--kv-types {kv_types}: give some of {', '.join(GPU_KV_TYPES)} with commas between")
    return [replace(options, kv_type=KvType(name, name)) for name in names]


def _windows(model: str, ctx_size: int | None, pp: int, tg: int, options: PlanOptions) -> Iterator[Window]:
    """Start the actors, and measure from depth to depth."""
    import numpy as np
    import ray

    from numoe.cluster.plan import DEFAULT_CONTEXT
    from numoe.deploy.launch import running_server
    from numoe.engine.gguf import GgufFile
    from numoe.engine.models.config import ModelConfig

    with GgufFile.open(model) as gguf:
        config = ModelConfig.from_gguf(gguf)
    size = min(config.context, DEFAULT_CONTEXT) if ctx_size is None else ctx_size
    # The answer of the last row may go beyond --ctx-size, where the model allows it.
    context = size if size > config.context else min(size + tg, config.context)
    depths = depths_of(context, size, pp, tg)
    options = replace(options, context=context)
    tokens = np.random.default_rng(0).integers(0, config.vocab, depths[-1] + pp).tolist()
    with running_server(model, options, None) as server:
        worker = server.worker()
        ray.get(worker.measure_prefill.remote(tokens[:pp], 0))
        ray.get(worker.measure_decode.remote(tokens[0], pp, min(tg, _WARM_UP_TOKENS)))
        for n_kv in depths:
            decode = ray.get(worker.measure_decode.remote(tokens[0], n_kv, tg))
            prefill = ray.get(worker.measure_prefill.remote(tokens[n_kv : n_kv + pp], n_kv))
            yield Window(_name_of(options.kv_type), n_kv, prefill, decode)


def _name_of(kv_type: KvType) -> str:
    return kv_type.keys if kv_type.keys == kv_type.values else f"{kv_type.keys}/{kv_type.values}"


def depths_of(context: int, size: int, pp: int, tg: int) -> Sequence[int]:
    """The depths of the rows; InputError if there is room for none."""
    last = min(size - pp, context - pp - tg)
    if last < 0:
        raise InputError(f"--pp {pp} and --tg {tg} do not fit into {context} tokens: raise --ctx-size or lower them")
    return range(0, last + 1, pp)


def ms_per_token(measurement: Measurement) -> dict[str, float]:
    """Milliseconds a token by parts, which add up to all of it."""
    return {part: ms / measurement.tokens for part, ms in measurement.parts_ms.items()}


def header() -> str:
    """The two head lines of the table."""
    names = ["   PP", "    TG", "  N_KV", "  T_PP s", "S_PP t/s", "  T_TG s", "S_TG t/s"]
    names += [f"{mode} {short:>5} ms" for mode in ("PP", "TG") for short in PARTS.values()]
    return table_line(names) + "\n|" + "|".join("-" * (len(name) + 2) for name in names) + "|"


def row(window: Window) -> str:
    """One line of the table."""
    pp, tg = window.prefill, window.decode
    cells = [
        f"{pp.tokens:5}", f"{tg.tokens:6}", f"{window.n_kv:6}", f"{pp.seconds:8.3f}", f"{pp.tokens / pp.seconds:8.2f}",
        f"{tg.seconds:8.3f}", f"{tg.tokens / tg.seconds:8.2f}",
    ]  # fmt: skip
    cells += [f"{ms_per_token(m)[part]:11.3f}" for m in (pp, tg) for part in PARTS]
    return table_line(cells)


def table_line(cells: Sequence[str]) -> str:
    """A line of a Markdown table."""
    return "|" + "|".join(f" {cell} " for cell in cells) + "|"


def require_plot(path: Path) -> None:
    """Raise InputError unless a plot can be drawn into `path`: a sweep takes minutes."""
    from importlib.util import find_spec

    if path.suffix.lower() not in PLOT_SUFFIXES:
        raise InputError(f"--plot {path}: give a name that ends in {', '.join(PLOT_SUFFIXES)}")
    if not path.absolute().parent.is_dir():
        raise InputError(f"--plot {path}: there is no folder {path.absolute().parent}")
    if find_spec("matplotlib") is None:
        raise InputError("--plot needs matplotlib: pip install 'numoe[plot]'")


def draw(windows: Sequence[Window], path: Path, title: str) -> None:
    """Draw milliseconds a token over depth, of answers and of prompts: stacked parts, or lines for each KV type."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    answer, prompt = figure.subplots(1, 2)
    kinds = list(dict.fromkeys(window.kv_type for window in windows))
    for axes, name in ((answer, "decode"), (prompt, "prefill")):
        for kind in kinds:
            depths = [window.n_kv for window in windows if window.kv_type == kind]
            found = [ms_per_token(getattr(window, name)) for window in windows if window.kv_type == kind]
            if len(kinds) == 1:
                axes.stackplot(depths, *([ms[part] for ms in found] for part in PARTS), labels=list(PARTS))
            else:
                line = axes.plot(depths, [sum(ms.values()) for ms in found], marker="o", markersize=3, label=kind)[0]
                attention = [ms["attention"] for ms in found]
                axes.plot(depths, attention, "--", color=line.get_color(), label=f"{kind}, attention's side of it")
        axes.set(title=f"{title}: {name}", xlabel="tokens in the context", ylabel="ms a token", ylim=(0, None))
        axes.legend(loc="best")
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise InputError(f"the plot cannot be written to {path}: {error}") from None
