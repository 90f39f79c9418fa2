"""GPT-2's byte alphabet, in which byte-level tokenizers spell their tokens: one printable character for each byte."""

from __future__ import annotations

_PRINTABLE = (*range(33, 127), *range(161, 173), *range(174, 256))  # these Latin-1 characters stand for themselves
_OTHERS = [byte for byte in range(256) if byte not in set(_PRINTABLE)]  # the rest follow from U+0100 on

BYTE_OF_CHAR = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + at): byte for at, byte in enumerate(_OTHERS)}
_SPELLING = {byte: char for char, byte in BYTE_OF_CHAR.items()}


def spell(token: bytes) -> str:
    """A token's bytes → its spelling."""
    return token.decode("latin-1").translate(_SPELLING)


def unspell(text: str) -> bytes:
    """A spelling → the token's bytes. KeyError for a character outside of the alphabet."""
    return bytes([BYTE_OF_CHAR[char] for char in text])
