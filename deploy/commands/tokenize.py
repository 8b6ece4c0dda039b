"""`numoe tokenize`: the token ids of a text, by a model file's tokenizer."""

from __future__ import annotations

import json
import sys
from typing import Annotated

from cyclopts import Parameter

from numoe.deploy.console import one_line_errors
from numoe.engine.errors import InputError


def tokenize(model: str, /, *, no_special: Annotated[bool, Parameter(negative=())] = False) -> int:
    """Print the token ids of standard input as a JSON list.

    Parameters
    ----------
    model
        A GGUF file; one that holds only a vocabulary will do.
    no_special
        Add no beginning- or end-of-text token.

    """
    with one_line_errors():
        from numoe.engine.gguf import GgufFile
        from numoe.engine.text import Tokenizer

        try:
            text = sys.stdin.buffer.read().decode()
        except UnicodeDecodeError as error:
            raise InputError(f"standard input is not UTF-8: {error}") from None
        with GgufFile.open(model) as gguf:
            tokenizer = Tokenizer.from_metadata(gguf.metadata)
        print(json.dumps(tokenizer.encode(text, add_special=not no_special)))
    return 0
