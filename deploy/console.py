"""How every command reports failure, one line on stderr and an exit code; counts in words; where tables are printed."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from numoe.engine.errors import NumoeError

if TYPE_CHECKING:
    from rich.console import Console

INTERRUPTED = 130  # 128 + SIGINT, as shells report it
_PIPE_WIDTH = 1000


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn a NumoeError into one line on stderr and exit code 1, Ctrl-C into exit code 130."""
    try:
        yield
    except KeyboardInterrupt:
        print("numoe: interrupted", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    except (NumoeError, OSError) as error:
        print(f"numoe: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(1) from None


def count(number: int, what: str) -> str:
    """For people: "1 node", "2 nodes"."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def result_console() -> Console:
    """Where tables are printed: in a pipe or a file, which `grep` reads, no line is folded."""
    from rich.console import Console

    is_pipe = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    return Console(highlight=False, markup=False, width=_PIPE_WIDTH if is_pipe else None)
