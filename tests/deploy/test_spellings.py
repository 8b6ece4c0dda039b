"""Who types another program's options is told what to write here."""

from __future__ import annotations

import re

import pytest

from numoe.deploy import cli
from numoe.deploy.spellings import _SPELLINGS
from tests.system.harness import numoe

OPTIONS = {
    name
    for command in ("serve", "generate", "status")
    for argument in cli.app[command].assemble_argument_collection()
    for name in argument.names
}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("serve m.gguf -c 512", "numoe: -c: write --ctx-size (see `numoe serve --help`)"),
        ("serve m.gguf --ctx-size 8 --port=8080", "numoe: --port: write --listen HOST:PORT (see `numoe serve --help`)"),
        ("generate hello -n 5", "numoe: -n: write --max-tokens (see `numoe generate --help`)"),
        ("serve m.gguf --ctx-sice 4", "Did you mean --ctx-size?"),
    ],
)
def test_an_error_names_the_spelling(arguments: str, said: str) -> None:
    result = numoe(*arguments.split())
    assert result.returncode == cli.WRONG_USAGE
    assert said in result.stderr


def test_what_is_named_exists_and_what_exists_is_not_refused() -> None:
    assert OPTIONS.isdisjoint(name for names in _SPELLINGS for name in names)
    assert OPTIONS.issuperset(re.findall(r"(?<!\S)--[a-z-]+", " ".join(_SPELLINGS.values())))
