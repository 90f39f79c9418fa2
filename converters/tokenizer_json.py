"""Hugging Face's tokenizer.json → Meta's tokenizer.model, where tiktoken gives the same tokens with it."""

from __future__ import annotations

import itertools
from typing import Any

from converters.fields import parse_json
from converters.tiktoken_bpe import MAX_TOKENS, PRE_TOKENIZER, splits, write_ranks
from l4tool.core.byte_level import BYTE_OF_CHAR, spell, unspell
from l4tool.core.errors import CheckpointError
from l4tool.core.prompt import NUM_SPECIAL, is_reserved, special_ids

_HINT = "Meta's tokenizer.model holds a byte-level vocabulary only; give the tokenizer.json of a Llama 4 checkpoint"
_TAKES_NEIGHBOURS = ("single_word", "lstrip", "rstrip")
# What changes the tokens of a BPE model, and its neutral values.
_PLAIN_MODEL: dict[str, tuple[Any, ...]] = {
    "dropout": (None, 0, 0.0),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
    "byte_fallback": (None, False),
}


def tokenizer_model(contents: bytes | str, where: str = "tokenizer.json") -> bytes:
    """The contents of Meta's tokenizer.model for those of a Llama 4 tokenizer.json.

    Raises CheckpointError, with `where`, for a tokenizer that would give other tokens in Meta's code: not a byte-level
    BPE with Llama 4's pattern, ids with gaps, merges in another order than the ids, or special tokens that are not
    Llama 4's, behind the base vocabulary (those named reserved may be missing or numbered otherwise).
    """
    return write_ranks(base_tokens(contents, where))


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
        fields = entry if isinstance(entry, dict) else {}
        token, index = fields.get("content"), fields.get("id")
        if not isinstance(token, str) or not isinstance(index, int) or isinstance(index, bool) or token in added:
            raise _unfit(where, f"added_tokens holds {str(entry)[:80]!r}")
        if any(fields.get(flag) for flag in _TAKES_NEIGHBOURS):
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
        if len(token) == 1 or (whole_pieces and listed.issuperset(splits(token, rank_of))):
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
