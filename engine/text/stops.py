"""Stop strings in text that arrives in pieces."""

from __future__ import annotations

from collections.abc import Iterable

from numoe.engine.errors import InputError


class StopMatcher:
    """Finds the first stop string to be completed, however the text is cut into pieces.

    Text that could be the beginning of a stop string is held back until it is known not to be. Of
    stop strings completed by the same character, the longest is the match. Work is one step of
    Knuth, Morris and Pratt 1977 for each character and stop string.
    """

    def __init__(self, stop_strings: Iterable[str]) -> None:
        # The longest first, so that it wins among those completed together.
        self._stops = sorted(set(stop_strings), key=lambda stop: (-len(stop), stop))
        if "" in self._stops:
            raise InputError("a stop string must not be empty")
        self._borders = [_borders(stop) for stop in self._stops]
        self._seen = [0] * len(self._stops)  # characters of each stop string that end the text so far
        self._held = ""
        self._matched: str | None = None

    def push(self, text: str) -> tuple[str, str | None]:
        """(text that is final, the stop string completed or None).

        On a match the text ends before the stop string, and whatever follows it is dropped: later
        calls return ("", the same stop string).
        """
        if self._matched is not None or not self._stops:
            return ("" if self._matched is not None else text), self._matched
        pending = self._held + text
        for end, char in enumerate(text, len(self._held) + 1):
            stop = self._step(char)
            if stop is not None:
                self._matched, self._held = stop, ""
                return pending[: end - len(stop)], stop
        final = len(pending) - max(self._seen)
        self._held = pending[final:]
        return pending[:final], None

    def flush(self) -> str:
        """The text held back, at the end of the stream."""
        held, self._held = self._held, ""
        self._seen = [0] * len(self._stops)
        return held

    def _step(self, char: str) -> str | None:
        """Advance every stop string by one character; the one completed, if any."""
        for index, (stop, borders) in enumerate(zip(self._stops, self._borders, strict=True)):
            seen = self._seen[index]
            while seen and stop[seen] != char:
                seen = borders[seen]
            seen += stop[seen] == char
            self._seen[index] = seen
            if seen == len(stop):
                return stop
        return None


def _borders(stop: str) -> list[int]:
    """For each n: length of the longest proper prefix of stop[:n] that is also its suffix."""
    borders = [0, 0]
    for char in stop[1:]:
        length = borders[-1]
        while length and stop[length] != char:
            length = borders[length]
        borders.append(length + (stop[length] == char))
    return borders
