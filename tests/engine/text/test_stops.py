"""Stop strings are found as in the whole text, however it is cut into pieces."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from numoe.engine.errors import InputError
from numoe.engine.text import StopMatcher

letters = st.text("ab", max_size=30)
stops = st.lists(st.text("ab", min_size=1, max_size=5), max_size=4)


def cut(text: str, places: list[int]) -> list[str]:
    bounds = sorted({0, len(text), *(place % (len(text) + 1) for place in places)})
    return [text[start:stop] for start, stop in pairwise(bounds)]


def expected(text: str, stop_strings: list[str]) -> tuple[str, str | None]:
    """The first to be completed; of those completed together, the longest."""
    found = [(text.find(stop) + len(stop), -len(stop), stop) for stop in stop_strings if stop in text]
    if not found:
        return text, None
    end, length, stop = min(found)
    return text[: end + length], stop


@given(text=letters, stop_strings=stops, places=st.lists(st.integers(0, 30)))
def test_any_cutting_gives_what_the_whole_text_gives(text: str, stop_strings: list[str], places: list[int]) -> None:
    matcher = StopMatcher(stop_strings)
    emitted, matched = "", None
    for piece in cut(text, places):
        more, matched = matcher.push(piece)
        emitted += more
        assert expected(text, stop_strings)[0].startswith(emitted)
    assert (emitted + matcher.flush(), matched) == expected(text, stop_strings)


@given(text=letters, stop=st.text("ab", min_size=1, max_size=5))
def test_one_stop_string_is_str_find(text: str, stop: str) -> None:
    emitted, matched = StopMatcher([stop]).push(text)
    at = text.find(stop)
    assert (matched is not None) == (at >= 0)
    if at >= 0:
        assert emitted == text[:at]


def test_only_what_could_begin_a_stop_string_is_held_back() -> None:
    matcher = StopMatcher(["\n\nUser:", "END"])
    assert matcher.push("Hello\n") == ("Hello", None)
    assert matcher.push("\nUs") == ("", None)
    assert matcher.push("e of E") == ("\n\nUse of ", None)
    assert matcher.push("ND and more") == ("", "END")
    assert matcher.push("after") == ("", "END")
    assert matcher.flush() == ""


def test_without_stop_strings_nothing_is_held_back() -> None:
    assert StopMatcher([]).push("text") == ("text", None)


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(InputError, match="empty"):
        StopMatcher(["a", ""])
