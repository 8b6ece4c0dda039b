"""How every command reports failure: one line on stderr, and an exit code."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from numoe.engine.errors import NumoeError

INTERRUPTED = 130  # 128 + SIGINT, as shells report it


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
