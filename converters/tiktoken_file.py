"""Meta's tokenizer.model: one line for each token of the base vocabulary, its bytes in base64 and its rank.

A token's rank is its id, and of two merges that are possible the one that gives the lower rank comes first.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence

from l4tool.core.errors import CheckpointError

MAX_TOKENS = 1 << 22  # twenty times the published vocabulary
_SHOWN_BYTES = 40
_HINT = "take the tokenizer.model of Meta's download again; its lines are BASE64 RANK, with ranks 0, 1, 2, …"


def read_tokens(data: bytes, where: str = "tokenizer.model") -> list[bytes]:
    """The base vocabulary in the order of its ids; blank lines and CR LF are let pass, as Meta's loader does.

    Raises CheckpointError, with `where` and the line, for whatever is not a whole vocabulary: bad base64, a rank that
    is not the number of tokens before it, a token twice or empty, a single byte that is missing, no tokens at all.
    """
    line_of: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), 1):
        fields = line.split()
        if not fields:
            continue
        token = _token(fields, len(line_of), f"{where}, line {number}", line)
        if token in line_of:
            raise CheckpointError(f"{where}, line {number}: the token of line {line_of[token]} again", hint=_HINT)
        line_of[token] = number
        if len(line_of) > MAX_TOKENS:
            raise CheckpointError(f"{where}, line {number}: more than {MAX_TOKENS:,} tokens", hint=_HINT)
    if not line_of:
        raise CheckpointError(f"{where} holds no tokens", hint=_HINT)
    missing = [byte for byte in range(256) if bytes([byte]) not in line_of]
    if missing:
        raise CheckpointError(
            f"{where}: {len(missing)} of the 256 single bytes are no tokens, the first is 0x{missing[0]:02x}; "
            f"it ends at line {number}",
            hint=_HINT,
        )
    return list(line_of)


def _token(fields: list[bytes], rank: int, where: str, line: bytes) -> bytes:
    """One line's token, whose rank must be `rank`."""
    if len(fields) != 2:
        raise CheckpointError(f"{where}: {_show(line)} is not a base64 token and its rank", hint=_HINT)
    try:
        token = base64.b64decode(fields[0], validate=True)
    except binascii.Error as error:
        raise CheckpointError(f"{where}: {_show(fields[0])} is not base64: {error}", hint=_HINT) from None
    if not token or base64.b64encode(token) != fields[0]:
        raise CheckpointError(f"{where}: {_show(fields[0])} is not the base64 of a token", hint=_HINT)
    if fields[1] != b"%d" % rank:
        raise CheckpointError(f"{where}: the rank must be {rank}, not {_show(fields[1])}", hint=_HINT)
    return token


def _show(raw: bytes) -> str:
    shown = raw[:_SHOWN_BYTES].decode("ascii", errors="backslashreplace")
    return ascii(shown + "…" * (len(raw) > _SHOWN_BYTES))


def write_tokens(tokens: Sequence[bytes]) -> bytes:
    """The file for a base vocabulary in the order of its ids, as Meta writes it."""
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens))
