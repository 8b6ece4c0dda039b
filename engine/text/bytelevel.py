"""GPT-2's way to write any byte as a printable character, in which its vocabularies are spelled.

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.2: the 188
bytes that are printable Latin-1 characters stand for themselves, the other 68 are U+0100 onwards.
"""

from __future__ import annotations

_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_OTHERS = tuple(byte for byte in range(256) if byte not in _PRINTABLE)

BYTE_TO_CHAR = {byte: chr(byte) for byte in _PRINTABLE} | {
    byte: chr(0x100 + index) for index, byte in enumerate(_OTHERS)
}
CHAR_TO_BYTE = {char: byte for byte, char in BYTE_TO_CHAR.items()}


def to_bytes(token: str) -> bytes:
    """The bytes that a token's spelling stands for.

    A token that is not spelled in this alphabet (some files have such added tokens) is taken as it is.
    """
    try:
        return bytes([CHAR_TO_BYTE[char] for char in token])
    except KeyError:
        return token.encode()
