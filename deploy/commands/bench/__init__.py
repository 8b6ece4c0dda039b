"""`numoe bench`: measurements of the kernels, of the actors, and of a whole server."""

from __future__ import annotations

from cyclopts import App

from numoe.deploy.commands.bench.chaos import chaos
from numoe.deploy.commands.bench.concurrency import concurrency
from numoe.deploy.commands.bench.kernels import kernels
from numoe.deploy.commands.bench.slots import slots
from numoe.deploy.commands.bench.sweep import sweep

__all__ = ["bench"]

bench = App(name="bench", help="Measure speed, of kernels, over depth, of streams and slots; and what deaths do.")
for _command in (sweep, kernels, concurrency, slots, chaos):
    bench.command(_command)
