"""The `numoe` command."""

from __future__ import annotations

import importlib.metadata
import os
import sys

# Read by gRPC when it is imported: its own log lines would mix with the command's one-line errors.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

from cyclopts import App, CycloptsError, UnknownOptionError, UnusedCliTokensError

from numoe.deploy.commands.bench import bench
from numoe.deploy.commands.demo import demo
from numoe.deploy.commands.doctor import doctor
from numoe.deploy.commands.generate import generate
from numoe.deploy.commands.logits import logits
from numoe.deploy.commands.plan import plan
from numoe.deploy.commands.serve import serve
from numoe.deploy.commands.slots import slots
from numoe.deploy.commands.status import status
from numoe.deploy.commands.stop import stop
from numoe.deploy.commands.tokenize import tokenize
from numoe.deploy.commands.version import version
from numoe.deploy.commands.weights import weights
from numoe.deploy.spellings import hint_for

WRONG_USAGE = 2

app = App(
    name="numoe",
    help="Serve giant Mixture-of-Experts models on hardware that people own.",
    version=lambda: importlib.metadata.version("numoe"),
)
for command in (demo, doctor, plan, serve, generate, slots, status, stop, weights, logits, tokenize, bench, version):
    app.command(command)


def main() -> None:
    """Run the command line; the exit status is the command's, 2 for wrong usage."""
    try:
        code = app(exit_on_error=False, print_error=False)
    except CycloptsError as error:
        reason = " ".join(str(error).split())
        if isinstance(error, UnusedCliTokensError):  # a prompt may begin with a hyphen, so this may be an option
            reason = f"too many arguments, or an unknown option, in: {' '.join(sys.argv[1:])}"
        if isinstance(error, UnusedCliTokensError | UnknownOptionError):
            reason = hint_for(sys.argv[2:]) or reason
        print(f"numoe: {reason} (see `{' '.join(('numoe', *(error.command_chain or ())))} --help`)", file=sys.stderr)
        code = WRONG_USAGE
    sys.exit(code)
