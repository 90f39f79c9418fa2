"""What people type for a model: a short name, `org/name`, and `@revision` behind either."""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from l4tool.core.errors import UsageError


@dataclass(frozen=True)
class Model:
    """One of Meta's checkpoints. `size_bytes`: weights of the Hugging Face layout, rounded, for the listing."""

    name: str
    repo_id: str
    text: str
    size_bytes: int

    @property
    def meta_repo_id(self) -> str:
        """The repository of the same weights in Meta's own layout."""
        return f"{self.repo_id}-Original"


MODELS = (
    Model("scout", "meta-llama/Llama-4-Scout-17B-16E", "Scout, base, bf16", 217_000_000_000),
    Model("scout-instruct", "meta-llama/Llama-4-Scout-17B-16E-Instruct", "Scout, chat, bf16", 217_000_000_000),
    Model("maverick", "meta-llama/Llama-4-Maverick-17B-128E", "Maverick, base, bf16", 803_000_000_000),
    Model(
        "maverick-instruct", "meta-llama/Llama-4-Maverick-17B-128E-Instruct", "Maverick, chat, bf16", 803_000_000_000
    ),
    Model(
        "maverick-instruct-fp8",
        "meta-llama/Llama-4-Maverick-17B-128E-Instruct-FP8",
        "Maverick, chat, FP8 experts",
        415_000_000_000,
    ),
)
ALIASES = {"maverick-fp8": "maverick-instruct-fp8"}
LICENCE = "Llama 4 Community"

_SHORT = {model.name: model for model in MODELS} | {
    alias: m for m in MODELS for alias, n in ALIASES.items() if n == m.name
}
_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?"
_REPO_ID = re.compile(rf"{_PART}/{_PART}")
_REVISION = re.compile(r"[A-Za-z0-9._][A-Za-z0-9._/+-]*")
_FORMS = "write a short name (`l4tool fetch --list`), org/name or org/name@revision"


@dataclass(frozen=True)
class RepoSpec:
    """A repository and a branch, tag or commit in it; revision None is the default branch."""

    repo_id: str
    revision: str | None = None


def parse_repo(text: str, layout: str = "hf") -> RepoSpec:
    """'scout', 'scout-instruct@main', 'org/name', 'org/name@rev' → RepoSpec. Raises UsageError.

    `layout="meta"` maps short names to the repositories in Meta's own layout. HF_ENDPOINT is looked at here, before
    huggingface_hub is imported, which fails with a traceback for some that are no addresses.
    """
    check_endpoint(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    name, at, revision = text.partition("@")
    if at and not _is_revision(revision):
        raise UsageError(f"not a revision: {revision!r}", hint="write a branch, a tag or a commit behind the @")
    model = _SHORT.get(name.lower())
    if model is not None:
        return RepoSpec(model.meta_repo_id if layout == "meta" else model.repo_id, revision or None)
    if not _is_repo_id(name):
        close = difflib.get_close_matches(name.lower(), _SHORT, n=1)
        raise UsageError(f"not a repository: {text!r}", hint=f"did you mean {close[0]}?" if close else _FORMS)
    return RepoSpec(name, revision or None)


def check_endpoint(address: str) -> None:
    """Raises UsageError for what cannot be the address of a hub."""
    try:
        parts = urlsplit(address)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_address = False
    if not is_address:
        raise UsageError(f"HF_ENDPOINT is not an address: {address!r}", hint="unset it, or write https://HOST[:PORT]")


def is_repo(text: str) -> bool:
    """True for a short name or an org/name form, unless something of that name exists on disk: local paths win."""
    if os.path.exists(text):
        return False
    name, at, revision = text.partition("@")
    return (name.lower() in _SHORT or _is_repo_id(name)) and (not at or _is_revision(revision))


def _is_revision(text: str) -> bool:
    return bool(_REVISION.fullmatch(text)) and ".." not in text and not text.endswith("/")


def _is_repo_id(name: str) -> bool:
    """The hub's own rules: one slash, no `--` or `..`, at most 96 characters a part, not ending in .git."""
    parts_fit = all(len(part) <= 96 for part in name.split("/"))
    return bool(_REPO_ID.fullmatch(name)) and parts_fit and not re.search(r"--|\.\.|\.git$", name)
