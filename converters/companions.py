"""What lies beside the weights: tokenizer, chat template, licence. Facts for people, none of them checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from converters.fields import read_json_object
from l4tool.core.errors import L4Error
from l4tool.core.licence import front_matter, licence_id

TEMPLATES = ("chat_template.jinja", "chat_template.json")
NAMED = ("bos_token", "eos_token", "pad_token")


def tokenizer_facts(folder: Path) -> dict[str, Any] | None:
    """kind, vocab_size, special_tokens (how many), bos/eos/pad as spelled, chat_template; None without a tokenizer."""
    side = {**_json(folder / "special_tokens_map.json"), **_json(folder / "tokenizer_config.json")}
    template = any((folder / name).is_file() for name in TEMPLATES) or "chat_template" in side
    facts: dict[str, Any] = {"kind": None, "file": None, "vocab_size": None, "special_tokens": None}
    if (folder / "tokenizer.json").is_file():
        facts |= {"file": "tokenizer.json", **_fast_tokenizer(_json(folder / "tokenizer.json"))}
    elif (folder / "tokenizer.model").is_file():
        facts |= {"file": "tokenizer.model", **_tiktoken(folder / "tokenizer.model")}
    elif not side:
        return None
    return facts | {name: _spelling(side.get(name)) for name in NAMED} | {"chat_template": template}


def _fast_tokenizer(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """The facts of a tokenizer.json; None for what it does not say."""
    model, added = tokenizer.get("model"), tokenizer.get("added_tokens")
    if not isinstance(model, dict) or not isinstance(added, list):
        return {"kind": "cannot be read"}
    vocab = model.get("vocab")
    ids = [token["id"] for token in added if isinstance(token, dict) and isinstance(token.get("id"), int)]
    size = max([len(vocab) - 1, *ids]) + 1 if isinstance(vocab, dict | list) else None
    kind = str(model.get("type"))
    if "ByteLevel" in str(tokenizer.get("pre_tokenizer")):
        kind = f"byte-level {kind}"
    special = sum(1 for token in added if isinstance(token, dict) and token.get("special"))
    return {"kind": kind, "vocab_size": size, "special_tokens": special}


def _tiktoken(path: Path) -> dict[str, Any]:
    """Meta's tokenizer.model: one base64 token and its rank per line; special tokens are in code."""
    try:
        with open(path, "rb") as file:
            return {"kind": "tiktoken", "vocab_size": sum(1 for line in file if line.strip())}
    except OSError:
        return {"kind": "cannot be read"}


def licence_facts(folder: Path) -> dict[str, Any]:
    """`id` and `base_model` as the model card's front matter names them, the licence `file` and its first line."""
    card = front_matter(_text(folder / "README.md"))
    base = card.get("base_model") or []
    files = sorted(path for path in folder.glob("LICENSE*") if path.is_file())
    lines = [line.strip() for line in _text(files[0]).splitlines() if line.strip()] if files else []
    return {
        "id": licence_id(card) or None,
        "base_model": [str(item) for item in (base if isinstance(base, list) else [base])],
        "file": files[0].name if files else None,
        "title": lines[0][:100] if lines else None,
        "notice": (folder / "NOTICE").is_file(),
    }


def _json(path: Path) -> dict[str, Any]:
    try:
        return read_json_object(path) if path.is_file() else {}
    except L4Error:
        return {}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")[:200_000]
    except OSError:
        return ""


def _spelling(token: Any) -> str | None:
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None
