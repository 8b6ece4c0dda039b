"""What commands print, and where."""

from __future__ import annotations

import pytest

from numoe.deploy.console import result_console


def test_lines_are_whole_where_no_terminal_shows_them(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = " ".join(["word"] * 50)
    monkeypatch.delenv("COLUMNS", raising=False)
    result_console().print(line)
    monkeypatch.setenv("COLUMNS", "80")
    result_console().print(line)
    whole, *folded = capsys.readouterr().out.splitlines()
    assert whole == line
    assert max(map(len, folded)) <= 80
