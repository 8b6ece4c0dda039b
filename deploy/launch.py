"""From a model file to a running server, with everything checked first and progress shown."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from numoe.actors.gateway.actor import server_context
from numoe.actors.gateway.server import check_endpoint
from numoe.cluster.bandwidth import bandwidth, remembered
from numoe.cluster.endpoint import Endpoint
from numoe.cluster.plan import Plan, PlanOptions, check_memory, fit_cache, make_plan
from numoe.cluster.status import LoadProgress
from numoe.cluster.topology import Topology
from numoe.deploy.cluster import Server, start_ray, stop_ray
from numoe.deploy.kernels import KernelBuild
from numoe.engine import shm
from numoe.engine.errors import ResourceError
from numoe.engine.gguf import GgufFile
from numoe.engine.gpu.device import find_gpu
from numoe.engine.models.config import ModelConfig
from numoe.engine.worker.requirements import check_kernel_shapes

_console = Console(stderr=True)


@contextmanager
def place_model(path: str | Path, options: PlanOptions) -> Iterator[tuple[ModelConfig, GgufFile, Plan]]:
    """A model file that is open inside the block, and its plan on this host.

    Raises NumoeError for a file that cannot be served, and options that make no sense.
    """
    with GgufFile.open(path) as gguf:
        gguf.check_weight_types()
        config = ModelConfig.from_gguf(gguf)
        check_kernel_shapes(config)
        shm.remove_stale()
        gpu = find_gpu(options.device)
        yield config, gguf, make_plan(config, gguf, Topology.read(), options, gpu)


def plan_model(path: str | Path, options: PlanOptions) -> tuple[Plan, KernelBuild]:
    """Check a model file and this host, and begin to compile what it needs.

    Raises NumoeError for a file that cannot be served, options that make no sense, too little memory.
    """
    with place_model(path, options) as (_, gguf, plan):
        check_memory(plan)
        return fit_cache(plan), KernelBuild(gguf)


@contextmanager
def running_server(
    path: str | Path, options: PlanOptions, endpoint: Endpoint | None, *, keep_weights: bool = False
) -> Iterator[Server]:
    """A server that is up inside the block and gone after it; without an endpoint, one without a gateway.

    keep_weights: they stay in shared memory.
    """
    if endpoint is not None:
        check_endpoint(endpoint)
    plan, build = plan_model(path, options)
    server = None
    try:
        if endpoint is not None:
            server_context(plan)  # a tokenizer or template that is broken ends it here
        started_here = True
        try:
            started_here = start_ray()
            _show_compiling(build)
            if endpoint is not None:
                measure_bandwidth(plan)
            server = Server(plan, endpoint, keep_weights=keep_weights)
            _show_loading(server)
            yield server
        finally:
            if server is not None:
                server.close()
            if started_here:
                stop_ray()
    finally:
        build.cancel()


def _show_compiling(build: KernelBuild) -> None:
    if not build.missing:
        return
    columns = (TextColumn("compiling kernels (once on this machine)"), BarColumn(), TextColumn("{task.fields[name]}"))
    with Progress(*columns, console=_console, transient=True) as bars:
        task = bars.add_task("", total=len(build.missing), name="")

        def on_done(name: str) -> None:
            bars.update(task, advance=1, name=f"{int(bars.tasks[0].completed) + 1}/{len(build.missing)} {name}")

        build.wait(on_done)


def measure_bandwidth(plan: Plan) -> None:
    """Have it measured, once on this host, how fast its memory is read: `numoe status` tells the share that shards use.

    Not while another server of this user runs, which it would slow down.
    """
    topology = Topology.read()
    if not plan.shards or remembered(topology) is not None or any(shm.ROOT.glob("*")):
        return
    columns = (TextColumn("measuring memory bandwidth (once on this machine)"), BarColumn())
    with Progress(*columns, console=_console, transient=True) as bars:
        task = bars.add_task("", total=None)
        try:
            bandwidth(topology, progress=lambda done, of: bars.update(task, completed=done, total=of))
        except ResourceError as error:
            bars.console.print(f"numoe: {error}")


def _show_loading(server: Server) -> None:
    """One bar for each actor that loads: bytes, GB/s."""
    columns = (TextColumn("{task.description:<12}"), BarColumn(), TextColumn("{task.fields[speed]}"))
    start, interactive = time.monotonic(), sys.stderr.isatty()
    with Progress(*columns, console=_console, transient=interactive) as bars:
        tasks: dict[str, TaskID] = {}
        for actors in server.loading():
            for actor in actors:
                if actor.name not in tasks:
                    tasks[actor.name] = bars.add_task(f"loading {actor.name}", total=None, speed="")
                bars.update(
                    tasks[actor.name], completed=actor.done, total=actor.total or None, speed=_loaded(actor)
                )
    if not interactive:
        _console.print(f"loaded {server.plan.total_bytes / 1e9:.2f} GB in {time.monotonic() - start:.1f} s")


def _loaded(actor: LoadProgress) -> str:
    if actor.note:
        return actor.note
    if actor.done and not actor.seconds:
        return f"{actor.done / 1e9:.2f} GB lay in shared memory"
    rate = actor.done / actor.seconds / 1e9 if actor.seconds else 0.0
    return f"{actor.done / 1e9:.2f} of {actor.total / 1e9:.2f} GB, {rate:.2f} GB/s"
