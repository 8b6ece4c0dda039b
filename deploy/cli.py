"""The `numoe` command."""

from __future__ import annotations

import importlib.metadata
import sys

from cyclopts import App

from numoe.deploy.commands.demo import demo
from numoe.deploy.commands.generate import generate
from numoe.deploy.commands.logits import logits
from numoe.deploy.commands.serve import serve
from numoe.deploy.commands.status import status
from numoe.deploy.commands.stop import stop
from numoe.deploy.commands.tokenize import tokenize
from numoe.deploy.commands.version import version

app = App(
    name="numoe",
    help="Serve giant Mixture-of-Experts models on hardware that people own.",
    version=lambda: importlib.metadata.version("numoe"),
)
for command in (demo, serve, generate, status, stop, logits, tokenize, version):
    app.command(command)


def main() -> None:
    """Run the command line; the exit status is the command's, 2 for wrong usage."""
    sys.exit(app())
