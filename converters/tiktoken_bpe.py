"""Meta's tokenizer.model (tiktoken's ranks) ↔ Hugging Face's tokenizer.json (a byte-level BPE with merges).

tiktoken takes a piece that is a token as it is; otherwise it joins, again and again, the two neighbours whose
concatenation has the lowest rank, the leftmost first (`tiktoken/src/lib.rs`, `byte_pair_merge`). A BPE with
`ignore_merges` does the same when every way to split a token into two tokens is a merge, in the order of the ranks of
what they make.
"""

from __future__ import annotations

import base64
import binascii
import json
from typing import Any

from l4tool.core.errors import CheckpointError
from l4tool.core.prompt import NUM_SPECIAL, SPLIT, special_tokens

MAX_TOKENS = 4_000_000
BOS = "<|begin_of_text|>"


def _alphabet() -> dict[int, str]:
    """Byte → the printable character that stands for it (GPT-2's `bytes_to_unicode`)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}


ALPHABET = _alphabet()
BYTES = {char: byte for byte, char in ALPHABET.items()}


def read_ranks(model: bytes, where: str) -> list[bytes]:
    """tokenizer.model's contents → tokens in the order of their ranks. `where` names the file in errors.

    Raises CheckpointError for a line that is not base64 and a rank, ranks that are not 0, 1, 2, …, a token that occurs
    twice, and a single byte that is no token.
    """
    tokens: list[bytes] = []
    for number, line in enumerate(model.splitlines(), 1):
        fields = line.split()
        if not fields:
            continue
        try:
            token, rank = base64.b64decode(fields[0], validate=True), int(fields[1])
        except (binascii.Error, ValueError, IndexError):
            raise _bad(where, f"line {number} is not a token in base64 and its rank") from None
        if len(fields) != 2 or rank != len(tokens) or not token or rank > MAX_TOKENS:
            raise _bad(where, f"line {number} must give a token the rank {len(tokens)}")
        tokens.append(token)
    if len(set(tokens)) != len(tokens):
        raise _bad(where, "a token occurs twice")
    missing = set(range(256)) - {token[0] for token in tokens if len(token) == 1}
    if missing:
        raise _bad(where, f"byte {min(missing)} is no token")
    return tokens


def _bad(where: str, what: str) -> CheckpointError:
    return CheckpointError(f"{where} is not Meta's tokenizer: {what}", hint="copy tokenizer.model from Meta's download")


def merges_of(tokens: list[bytes]) -> list[tuple[bytes, bytes]]:
    """Every split of a token into two tokens, by the rank of the whole, then of the left and right half."""
    ranks = {token: rank for rank, token in enumerate(tokens)}
    merges: list[tuple[bytes, bytes]] = []
    for token in tokens:
        pairs = [(token[:at], token[at:]) for at in range(1, len(token)) if token[:at] in ranks and token[at:] in ranks]
        merges += sorted(pairs, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    return merges


def spell(token: bytes) -> str:
    """A token in the byte-level alphabet."""
    return "".join([ALPHABET[byte] for byte in token])


def tokenizer_json(model: bytes, where: str = "tokenizer.model") -> str:
    """tokenizer.model's contents → tokenizer.json's, with Llama 4's special tokens behind the vocabulary.

    Raises CheckpointError as `read_ranks` does.
    """
    tokens = read_ranks(model, where)
    merges = [(spell(left), spell(right)) for left, right in merges_of(tokens)]
    return bpe_json([spell(token) for token in tokens], merges, special_tokens(), ignore_merges=True)


def bpe_json(tokens: list[str], merges: list[tuple[str, str]], special: list[str], ignore_merges: bool) -> str:
    """tokenizer.json of a byte-level BPE with Llama 4's pre-tokenizer; `special` tokens follow the vocabulary."""
    first = len(tokens)
    added = [
        {
            "id": first + n, "content": content, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": True,
        }
        for n, content in enumerate(special)
    ]  # fmt: skip
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    bos = first + special.index(BOS)
    template = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": BOS, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [
            {"SpecialToken": {"id": BOS, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
            {"SpecialToken": {"id": BOS, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}},
        ],
        "special_tokens": {BOS: {"id": BOS, "ids": [bos], "tokens": [BOS]}},
    }  # fmt: skip
    tokenizer: dict[str, Any] = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": False}, byte_level
            ],
        },
        "post_processor": {"type": "Sequence", "processors": [byte_level | {"trim_offsets": False}, template]},
        "decoder": byte_level | {"add_prefix_space": True, "use_regex": True},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": ignore_merges,
            "vocab": {token: rank for rank, token in enumerate(tokens)}, "merges": merges,
        },
    }  # fmt: skip
    return json.dumps(tokenizer, ensure_ascii=False)


def tokenizer_model(tokenizer: str, where: str = "tokenizer.json") -> bytes:
    """tokenizer.json's contents → tokenizer.model's.

    Raises CheckpointError for what tiktoken would tokenize otherwise: another kind of model or pre-tokenizer, ids with
    gaps, merges that are not every split of every token, special tokens that are not Llama 4's.
    """
    try:
        data = json.loads(tokenizer)
        model, added = data["model"], data["added_tokens"]
        vocab = {str(token): int(rank) for token, rank in model["vocab"].items()}
        merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
        contents = {int(token["id"]): str(token["content"]) for token in added}
        pattern = SPLIT in json.dumps(data["pre_tokenizer"]).encode().decode("unicode_escape")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{where} is not a byte-level BPE tokenizer ({error!r})", hint=_HINT) from None
    if model.get("type") != "BPE" or "ByteLevel" not in json.dumps(data["pre_tokenizer"]) or not pattern:
        raise CheckpointError(f"{where} is not a byte-level BPE with Llama 4's pre-tokenizer", hint=_HINT)
    tokens = _tokens(vocab, contents, where)
    wanted = {(spell(left), spell(right)) for left, right in merges_of(tokens)}
    if not model.get("ignore_merges") or set(merges) != wanted:
        raise CheckpointError(f"{where}: its merges are not those that Meta's tokenizer makes", hint=_HINT)
    return write_ranks(tokens)


def write_ranks(tokens: list[bytes]) -> bytes:
    """Tokens in the order of their ranks → tokenizer.model's contents."""
    return b"".join(base64.b64encode(token) + f" {rank}\n".encode() for rank, token in enumerate(tokens))


_HINT = "put Meta's tokenizer.model into the source's folder: it is then copied as it is"


def _tokens(vocab: dict[str, int], added: dict[int, str], where: str) -> list[bytes]:
    """The base vocabulary in the order of its ids. Raises CheckpointError for gaps and for other special tokens."""
    base = {rank: token for token, rank in vocab.items() if rank not in added}
    if sorted(base) != list(range(len(base))):
        raise CheckpointError(f"{where}: the ids of its vocabulary have gaps", hint=_HINT)
    if [added.get(len(base) + n) for n in range(NUM_SPECIAL)] != special_tokens() or len(added) != NUM_SPECIAL:
        raise CheckpointError(f"{where}: its special tokens are not Llama 4's", hint=_HINT)
    try:
        return [bytes(BYTES[char] for char in base[rank]) for rank in range(len(base))]
    except KeyError as error:
        raise CheckpointError(f"{where}: {error.args[0]!r} stands for no byte", hint=_HINT) from None
