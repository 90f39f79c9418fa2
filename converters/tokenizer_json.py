"""Meta's tokenizer.model ↔ Hugging Face's tokenizer.json.

Why the merges of `all_merges` give exactly tiktoken's tokens. Both start from bytes and merge, again and again, the
pair that comes first: for tiktoken the one whose joined token has the lowest rank, for a tokenizer.json the one that
stands first in its list, and of equals the leftmost. The list has every way to split every token in two, ordered by
the joined token's rank, so the two can only differ between different splits of one token. But a token's own bytes are
merged in the same order wherever it stands (no merge has crossed its ends, or it could not come about), so there is
only one split by which it ever comes about, its last one, and the others never matter. A piece of text that is a
token as a whole is not merged at all by tiktoken: `ignore_merges` says the same.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from typing import Any

from converters.fields import parse_json
from converters.llama4_tokens import BOS, NUM_SPECIAL, SPLIT, is_reserved, special_ids
from converters.tiktoken_file import MAX_TOKENS, read_tokens, write_tokens
from l4tool.core.byte_level import BYTE_OF_CHAR, spell, unspell
from l4tool.core.errors import CheckpointError

_HINT = "Meta's tokenizer.model holds a byte-level vocabulary only; give the tokenizer.json of a Llama 4 checkpoint"
PRE_TOKENIZER: dict[str, Any] = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    ],
}
DECODER: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
_TAKES_NEIGHBOURS = ("single_word", "lstrip", "rstrip")
# What changes the tokens of a BPE model, and its neutral values.
_PLAIN_MODEL: dict[str, tuple[Any, ...]] = {
    "dropout": (None, 0, 0.0),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
    "byte_fallback": (None, False),
}


def tokenizer_json(model: bytes, where: str = "tokenizer.model") -> bytes:
    """The contents of tokenizer.json for those of Meta's tokenizer.model. CheckpointError: see `read_tokens`."""
    return tokenizer_json_of(read_tokens(model, where))


def tokenizer_json_of(tokens: Sequence[bytes]) -> bytes:
    """tokenizer.json for a base vocabulary in the order of its ids; Llama 4's 2048 special tokens follow it."""
    ids = special_ids(len(tokens))
    spelled = [spell(token) for token in tokens]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    contents = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": index, "content": token, **flags} for token, index in ids.items()],
        "normalizer": None,
        "pre_tokenizer": PRE_TOKENIZER,
        "post_processor": _post_processor(ids[BOS]),
        "decoder": DECODER,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": {token: rank for rank, token in enumerate(spelled)},
            "merges": [(spelled[left], spelled[right]) for left, right in all_merges(tokens)],
        },
    }
    return json.dumps(contents, ensure_ascii=False, separators=(",", ":")).encode()


def all_merges(tokens: Sequence[bytes]) -> list[tuple[int, int]]:
    """Every split of every token into two tokens, as their ids: by the token's id, then by the left and right one's."""
    rank_of = {token: rank for rank, token in enumerate(tokens)}
    return [pair for token in tokens for pair in _splits(token, rank_of)]


def _splits(token: bytes, rank_of: dict[bytes, int]) -> list[tuple[int, int]]:
    """(rank of the left part, rank of the right part), sorted."""
    pairs = []
    for at in range(1, len(token)):
        left, right = rank_of.get(token[:at]), rank_of.get(token[at:])
        if left is not None and right is not None:
            pairs.append((left, right))
    return sorted(pairs) if len(pairs) > 1 else pairs


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


def tokenizer_model(contents: bytes | str, where: str = "tokenizer.json") -> bytes:
    """The contents of Meta's tokenizer.model for those of a Llama 4 tokenizer.json.

    Raises CheckpointError, with `where`, for a tokenizer that would give other tokens in Meta's code: not a byte-level
    BPE with Llama 4's pattern, ids with gaps, merges in another order than the ids, or special tokens that are not
    Llama 4's, behind the base vocabulary (those named reserved may be missing or numbered otherwise).
    """
    return write_tokens(base_tokens(contents, where))


def base_tokens(contents: bytes | str, where: str = "tokenizer.json") -> list[bytes]:
    """The base vocabulary of a tokenizer.json in the order of its ids. Raises as `tokenizer_model` does."""
    try:
        whole = parse_json(contents.decode("utf-8") if isinstance(contents, bytes) else contents)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not valid JSON: {error}", hint="download this file again") from None
    model = whole.get("model") if isinstance(whole, dict) else None
    if not isinstance(model, dict):
        raise _unfit(where, "it has no model")
    _check_byte_level(whole, model, where)
    added = _added_tokens(whole.get("added_tokens"), where)
    tokens = _vocabulary(model.get("vocab"), added, where)
    _check_special(added, len(tokens), where)
    _check_merges(model, tokens, where)
    return tokens


def _unfit(where: str, why: str) -> CheckpointError:
    return CheckpointError(f"{where}: {why}", hint=_HINT)


def _check_byte_level(whole: dict[str, Any], model: dict[str, Any], where: str) -> None:
    """Everything before the vocabulary is what Meta's code does."""
    if model.get("type", "BPE") != "BPE":
        raise _unfit(where, f"its model is {str(model.get('type'))[:40]!r}, not BPE")
    for name, neutral in _PLAIN_MODEL.items():
        if not any(model.get(name) == value for value in neutral):
            raise _unfit(where, f"model.{name} is {str(model.get(name))[:40]!r}; tiktoken has no such thing")
    if whole.get("normalizer") is not None:
        raise _unfit(where, "it has a normalizer; tiktoken has none")
    steps = whole.get("pre_tokenizer")
    steps = steps.get("pretokenizers") if isinstance(steps, dict) else None
    expected = PRE_TOKENIZER["pretokenizers"]
    if not isinstance(steps, list) or [_without_offsets(step) for step in steps] != list(
        map(_without_offsets, expected)
    ):
        raise _unfit(where, "its pre-tokenizer is not Llama 4's: the pattern of Meta's code, then byte level")
    decoder = whole.get("decoder")
    if not isinstance(decoder, dict) or decoder.get("type") != "ByteLevel":
        raise _unfit(where, "its decoder is not ByteLevel")


def _without_offsets(step: Any) -> Any:
    """A pre-tokenizer's step without what only matters for the places of tokens in the text."""
    return {key: value for key, value in step.items() if key != "trim_offsets"} if isinstance(step, dict) else step


def _added_tokens(entries: Any, where: str) -> dict[str, int]:
    """Spelling → id of the added tokens."""
    added: dict[str, int] = {}
    for entry in entries if isinstance(entries, list) else [None]:
        token, index = (entry.get("content"), entry.get("id")) if isinstance(entry, dict) else (None, None)
        if not isinstance(token, str) or not isinstance(index, int) or isinstance(index, bool) or token in added:
            raise _unfit(where, f"added_tokens holds {str(entry)[:80]!r}")
        if any(entry.get(flag) for flag in _TAKES_NEIGHBOURS):
            raise _unfit(
                where, f"the added token {token[:40]!r} takes or wants white space beside it; tiktoken's do not"
            )
        added[token] = index
    return added


def _vocabulary(vocab: Any, added: dict[str, int], where: str) -> list[bytes]:
    """The base vocabulary: dense ids from 0, every token in the byte alphabet, every single byte a token."""
    if (
        not isinstance(vocab, dict)
        or len(vocab) > MAX_TOKENS
        or any(type(index) is not int for index in vocab.values())
    ):
        raise _unfit(where, "model.vocab is not an object of tokens and their ids")
    token_of = {index: token for token, index in vocab.items() if token not in added}
    if len(token_of) != sum(token not in added for token in vocab):
        raise _unfit(where, "two tokens of model.vocab have the same id")
    for token, index in vocab.items():
        if added.get(token, index) != index:
            raise _unfit(where, f"the token {token[:40]!r} has the ids {index} and {added[token]}")
    tokens = []
    for rank in range(len(token_of)):
        if rank not in token_of:
            raise _unfit(where, f"no token of model.vocab has the id {rank}; ranks have no gaps")
        try:
            tokens.append(unspell(token_of[rank]))
        except KeyError:
            raise _unfit(where, f"the token {token_of[rank][:40]!r} (id {rank}) is not spelled in bytes") from None
    if b"" in tokens:
        raise _unfit(where, f"the token with the id {tokens.index(b'')} is empty")
    missing = [char for char in BYTE_OF_CHAR if char not in vocab]
    if missing:
        raise _unfit(where, f"the single byte 0x{BYTE_OF_CHAR[missing[0]]:02x} is no token")
    return tokens


def _check_special(added: dict[str, int], num_base: int, where: str) -> None:
    """Meta's code makes the special tokens itself: the same names, at the ids behind the base vocabulary."""
    ids = special_ids(num_base)
    names = {index: token for token, index in ids.items()}
    for token, index in added.items():
        expected = names.get(index)
        if expected is None:
            raise _unfit(
                where,
                f"the added token {token[:40]!r} has the id {index}; Llama 4's special tokens are "
                f"{num_base} to {num_base + NUM_SPECIAL - 1} behind {num_base} others",
            )
        if token != expected and not (is_reserved(token) and is_reserved(expected)):
            raise _unfit(where, f"the id {index} is {token[:40]!r}; in Llama 4 it is {expected!r}")
    for token, index in ids.items():
        if token not in added and not is_reserved(token):
            raise _unfit(where, f"the special token {token} (id {index}) is missing")


def _check_merges(model: dict[str, Any], tokens: list[bytes], where: str) -> None:
    """The merges stand in the order of the ranks, and have for each token the split by which tiktoken makes it."""
    rank_of = {token: rank for rank, token in enumerate(tokens)}
    spelled = {spell(token): rank for rank, token in enumerate(tokens)}
    listed: set[tuple[int, int]] = set()
    last = 0
    for place, entry in enumerate(_merges(model, where)):
        try:
            left, right = entry
            pair, joined = (spelled[left], spelled[right]), spelled[left + right]
        except (KeyError, ValueError, TypeError):
            raise _unfit(where, f"model.merges[{place}] is {str(entry)[:60]!r}, not two tokens that make one") from None
        if joined < last:
            raise _unfit(where, f"model.merges[{place}] makes the token {joined} after the token {last}: not by rank")
        listed.add(pair)
        last = joined
    whole_pieces = model.get("ignore_merges") is True
    for rank, token in enumerate(tokens):
        splits = _splits(token, rank_of)
        if len(token) == 1 or (whole_pieces and listed.issuperset(splits)):
            continue
        parts = _last_split(token, rank_of)
        if parts is None and not whole_pieces:
            raise _unfit(where, f"no merges make the token {rank}, which tiktoken finds as a whole (ignore_merges)")
        if parts is not None and parts not in listed:
            raise _unfit(where, f"model.merges lacks the pair {parts[0]} {parts[1]} that makes the token {rank}")


def _merges(model: dict[str, Any], where: str) -> list[Any]:
    """Each merge as a list of two spellings; older files have them in one string."""
    merges = model.get("merges")
    if not isinstance(merges, list):
        raise _unfit(where, "model.merges is not a list")
    return [entry.split(" ") if isinstance(entry, str) else entry for entry in merges]


def _last_split(token: bytes, rank_of: dict[bytes, int]) -> tuple[int, int] | None:
    """The ranks of the two parts that tiktoken merges last to make a token; None where merging never makes it."""
    parts = [token[at : at + 1] for at in range(len(token))]
    while len(parts) > 2:
        ranks = [rank_of.get(left + right, MAX_TOKENS) for left, right in itertools.pairwise(parts)]
        at = ranks.index(min(ranks))
        if ranks[at] == MAX_TOKENS:
            return None
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return rank_of[parts[0]], rank_of[parts[1]]
