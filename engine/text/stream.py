"""Token ids to text while they are generated."""

from __future__ import annotations

import codecs

from numoe.engine.text.tokenizer import Tokenizer


class StreamDecoder:
    """Text of a growing sequence of ids, given out as soon as it is final.

    A character whose bytes come in several tokens is held back until it is whole; bytes that can
    no longer become a character are given out as U+FFFD. All the pieces together are what
    `tokenizer.decode(ids, skip_special=..., continuation=...)` gives.

    continuation: the ids go on after a prompt, as generated ones do: a leading space is text.
                  False for ids that are a text of their own.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = False, continuation: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._drop_space = tokenizer.adds_space_prefix and not continuation

    def push(self, token_id: int) -> str:
        """The text that this id completes, often empty. InputError if it is outside the vocabulary."""
        data = self._tokenizer.token_bytes(token_id)
        if self._skip_special and self._tokenizer.is_special(token_id):
            return ""
        if self._drop_space and data:
            data = data.removeprefix(b" ")
            self._drop_space = False
        return self._utf8.decode(data)

    def flush(self) -> str:
        """What was held back, as U+FFFD; then the decoder is as new, but for the leading space."""
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text
