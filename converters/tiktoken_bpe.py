"""Meta's tokenizer.model → Hugging Face's tokenizer.json; `tokenizer_json.py` has the way back.

tokenizer.model has one line for each token of the base vocabulary: its bytes in base64, and its rank, which is its id.

Why the merges of `merges_of` give exactly tiktoken's tokens. Both start from bytes and merge, again and again, the
pair that comes first: for tiktoken the one whose joined token has the lowest rank, for a tokenizer.json the one that
stands first in its list, and of equals the leftmost. The list has every way to split every token in two, ordered by
the joined token's rank, so the two can only differ between different splits of one token. But a token's own bytes are
merged in the same order wherever it stands (no merge has crossed its ends, or it could not come about), so there is
only one split by which it ever comes about, its last one, and the others never matter. A piece of text that is a
token as a whole is not merged at all by tiktoken: `ignore_merges` says the same.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Sequence
from typing import Any

from l4tool.core.byte_level import spell
from l4tool.core.errors import CheckpointError
from l4tool.core.prompt import BOS, SPLIT, special_tokens

PRE_TOKENIZER: dict[str, Any] = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    ],
}
DECODER: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
MAX_TOKENS = 1 << 22  # twenty times the published vocabulary
_SHOWN_BYTES = 40
_HINT = "take the tokenizer.model of Meta's download again; its lines are BASE64 RANK, with ranks 0, 1, 2, …"


def read_ranks(data: bytes, where: str = "tokenizer.model") -> list[bytes]:
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


def write_ranks(tokens: Sequence[bytes]) -> bytes:
    """The file for a base vocabulary in the order of its ids, as Meta writes it."""
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens))


def tokenizer_json(model: bytes, where: str = "tokenizer.model") -> str:
    """tokenizer.model's contents → tokenizer.json's, with Llama 4's special tokens behind the vocabulary.

    Raises CheckpointError as `read_ranks` does.
    """
    return tokenizer_json_of(read_ranks(model, where))


def tokenizer_json_of(tokens: Sequence[bytes]) -> str:
    """tokenizer.json for a base vocabulary in the order of its ids."""
    spelled = [spell(token) for token in tokens]
    merges = [(spelled[left], spelled[right]) for left, right in merges_of(tokens)]
    return bpe_json(spelled, merges, special_tokens(), ignore_merges=True)


def merges_of(tokens: Sequence[bytes]) -> list[tuple[int, int]]:
    """Every split of every token into two tokens, as their ids: by the token's id, then by the left and right one's."""
    rank_of = {token: rank for rank, token in enumerate(tokens)}
    return [pair for token in tokens for pair in splits(token, rank_of)]


def splits(token: bytes, rank_of: dict[bytes, int]) -> list[tuple[int, int]]:
    """(rank of the left part, rank of the right part), sorted."""
    pairs = []
    for at in range(1, len(token)):
        left, right = rank_of.get(token[:at]), rank_of.get(token[at:])
        if left is not None and right is not None:
            pairs.append((left, right))
    return sorted(pairs) if len(pairs) > 1 else pairs


def bpe_json(tokens: list[str], merges: list[tuple[str, str]], special: list[str], ignore_merges: bool) -> str:
    """tokenizer.json of a byte-level BPE with Llama 4's pre-tokenizer; `special` tokens follow the vocabulary."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    first = len(tokens)
    contents = {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": first + place, "content": token, **flags} for place, token in enumerate(special)],
        "normalizer": None, "pre_tokenizer": PRE_TOKENIZER,
        "post_processor": _post_processor(first + special.index(BOS)), "decoder": DECODER,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": ignore_merges,
            "vocab": {token: rank for rank, token in enumerate(tokens)}, "merges": merges,
        },
    }  # fmt: skip
    return json.dumps(contents, ensure_ascii=False, separators=(",", ":"))


def _post_processor(bos_id: int) -> dict[str, Any]:
    """`<|begin_of_text|>` before every text, where special tokens are asked for."""

    def begin(type_id: int) -> dict[str, Any]:
        return {"SpecialToken": {"id": BOS, "type_id": type_id}}

    def text(name: str, type_id: int) -> dict[str, Any]:
        return {"Sequence": {"id": name, "type_id": type_id}}

    template = {
        "type": "TemplateProcessing",
        "single": [begin(0), text("A", 0)],
        "pair": [begin(0), text("A", 0), begin(1), text("B", 1)],
        "special_tokens": {BOS: {"id": BOS, "ids": [bos_id], "tokens": [BOS]}},
    }
    byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    return {"type": "Sequence", "processors": [byte_level, template]}
