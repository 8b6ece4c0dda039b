"""Weights that do not lie where they should are told, with what helps, and only then."""

from __future__ import annotations

import errno
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from numoe.engine import numa
from numoe.engine.weights import SliceReporter, report
from tests.engine.weights.support import load
from tests.models import make_model

pytestmark = pytest.mark.usefixtures("shm_root")


@pytest.fixture
def weights(tmp_path: Path) -> Any:
    return load(make_model(tmp_path / "m.gguf", "llama"))


def lie(monkeypatch: pytest.MonkeyPatch, share: float | None) -> None:
    """Have the kernel tell which part of all pages is on node 0; None for one that does not tell."""

    def page_nodes(*_: Any, at_most: int) -> Counter[int]:
        if share is None:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        return Counter({0: share * at_most, 1: (1 - share) * at_most})  # type: ignore[dict-item]

    monkeypatch.setattr(report, "page_nodes", page_nodes)


def forbid(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a container does without the right to it."""

    def refuse(*_: Any) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(numa, "bind_memory", refuse)


@pytest.mark.parametrize("share", [0.5, None])
def test_memory_that_may_not_be_bound_is_told_with_the_cure(
    weights: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, share: float | None
) -> None:
    lie(monkeypatch, share)
    forbid(monkeypatch)
    reporter = SliceReporter(weights, [0], bound=True)
    found = reporter.report()
    assert found.on_nodes == share
    assert "node 0: Operation not permitted" in found.problem
    assert "SYS_NICE" in found.problem
    reporter.check()
    assert [line.getMessage() for line in caplog.records] == [found.problem]


def test_weights_that_lie_elsewhere_are_told_with_the_cure(weights: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lie(monkeypatch, 0.5)
    monkeypatch.setattr(report, "why_unbound", lambda _: {})
    assert "numoe weights rm" in SliceReporter(weights, [0], bound=True).report().problem


def test_there_is_nothing_to_tell_of_what_lies_right_or_anywhere(
    weights: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    forbid(monkeypatch)
    lie(monkeypatch, 0.99)
    reporter = SliceReporter(weights, [0], bound=True)
    assert reporter.report().problem == ""
    reporter.check()
    lie(monkeypatch, 0.5)
    assert SliceReporter(weights, [0], bound=False).report().problem == ""
    assert caplog.records == []
