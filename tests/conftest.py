"""Tests marked `gpu` are skipped where there is no GPU, with the reason."""

from __future__ import annotations

import functools

import pytest

from numoe.engine.errors import NumoeError
from numoe.engine.gpu import device


@functools.cache
def why_not() -> str:
    try:
        device.current()
    except NumoeError as error:
        return str(error)
    return ""


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and (reason := why_not()):
        pytest.skip(reason)
