"""The checkpoint's tokenizer.json: text to ids and back, special tokens only where we put them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as HFTokenizer

from l4tool.core.byte_level import unspell
from l4tool.core.errors import CheckpointError

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # texts come one by one, from threads of our own
_CACHED_CHARS = 32  # short strings of templates ("user", "\n\n") recur in every prompt


class Tokenizer:
    """Encodes plain text (special tokens spelled in it stay text) and knows the special tokens by name.

    `control_tokens` maps every added token's spelling to its id. `bos_token` and the like come from
    tokenizer_config.json, else special_tokens_map.json.
    """

    def __init__(self, model: HFTokenizer, named_tokens: dict[str, str], folder: Path | None = None) -> None:
        self._model = model
        self.folder = folder
        self.named_tokens = named_tokens
        added = model.get_added_tokens_decoder()
        plain = [token for token in added.values() if not token.special]
        if plain:  # only special tokens can be switched off below
            model.add_special_tokens([_as_special(token) for token in plain])
        model.encode_special_tokens = True
        self.control_tokens: dict[str, int] = {token.content: index for index, token in added.items()}
        self.special_ids = frozenset(added)
        self._control = re.compile(f"({_any_of(token for token in self.control_tokens if len(token) > 1)})")
        self.vocab_size = max([model.get_vocab_size(with_added_tokens=False) - 1, *added]) + 1
        self._encode_short = lru_cache(maxsize=1024)(self._encode)

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Read tokenizer.json and its companions. Raises CheckpointError."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(f"no tokenizer.json in {folder}", hint="copy the tokenizer files of the source model")
        try:
            model = HFTokenizer.from_file(str(path))
        except Exception as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        model.no_truncation()
        model.no_padding()
        named: dict[str, str] = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            named.update(_token_names(read_json_object(folder / name)))
        return cls(model, named, folder)

    @property
    def bos_token(self) -> str | None:
        return self.named_tokens.get("bos_token")

    def encode(self, text: str) -> list[int]:
        """Text → ids; whatever the text spells, no special token comes out and none is added."""
        return list(self._encode_short(text)) if len(text) <= _CACHED_CHARS else self._encode(text)

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._model.encode_batch_fast([text], add_special_tokens=False)[0].ids  # no offsets
        return ids

    def vocabulary(self) -> dict[str, int]:
        """Every token as it is spelled in tokenizer.json, with its id."""
        return self._model.get_vocab(with_added_tokens=True)

    def split_control(self, text: str) -> list[str]:
        """Split a rendered template: text at even places, special tokens as spelled at odd places."""
        return self._control.split(text)

    def control_id(self, token: str) -> int:
        """The id of a special token. Raises CheckpointError when the tokenizer lacks it."""
        try:
            return self.control_tokens[token]
        except KeyError:
            raise CheckpointError(
                f"the tokenizer has no token {token}", hint="is this the tokenizer of a Llama 4 checkpoint?"
            ) from None

    def decode(self, ids: list[int], skip_special: bool = True) -> str:
        """Ids → text; bytes that are not valid UTF-8 become U+FFFD."""
        return self._model.decode(ids, skip_special_tokens=skip_special)

    def text_tokens(self, size: int) -> list[bytes]:
        """The bytes of tokens 0 … size - 1; b"" for special tokens and where there is none."""
        return [b"" if index in self.special_ids else self.token_bytes(index) for index in range(size)]

    def token_bytes(self, index: int) -> bytes:
        """The exact bytes of one token: a byte-level BPE piece, or a special token's spelling; b"" when unknown."""
        piece = self._model.id_to_token(index)
        if piece is None:
            return b""
        if index in self.special_ids:
            return piece.encode("utf-8")
        try:
            return unspell(piece)
        except KeyError:
            return piece.encode("utf-8")


def _any_of(words: Iterable[str]) -> str:
    """A regex for any of the words, the longest first, as a trie: the 2048 special tokens share "<|"."""
    root: dict[str, Any] = {}
    for word in words:
        node = root
        for char in word:
            node = node.setdefault(char, {})
        node[""] = {}  # a word may end here
    return _trie_regex(root) if root else "(?!)"


def _trie_regex(node: dict[str, Any]) -> str:
    branches = [re.escape(char) + _trie_regex(child) for char, child in node.items() if char]
    if not branches:
        return ""
    if len(branches) == 1 and "" not in node:
        return branches[0]
    return f"(?:{'|'.join(branches)})" + ("?" if "" in node else "")


def _as_special(token: AddedToken) -> AddedToken:
    return AddedToken(
        token.content, single_word=token.single_word, lstrip=token.lstrip, rstrip=token.rstrip,
        normalized=token.normalized, special=True,
    )  # fmt: skip


def read_json_object(path: Path) -> dict[str, Any]:
    """A small JSON file of the checkpoint, {} when it is not there. Raises CheckpointError when it is broken."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return value


def _token_names(config: dict[str, Any]) -> dict[str, str]:
    """bos_token, eos_token, … → spelling; values are strings or {"content": …}."""
    names = {}
    for key, value in config.items():
        if key.endswith("_token"):
            content = value.get("content") if isinstance(value, dict) else value
            if isinstance(content, str):
                names[key] = content
    return names
