"""Where a checkpoint comes from and under which licence it is: what its folder says about itself."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from l4tool.core import licence
from l4tool.core.errors import CheckpointError
from l4tool.hub.manifest import read_manifest

CARD = "README.md"
_HUB_CACHE = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/([0-9a-f]{40})$")
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{7,64}")
_HEAD_BYTES = 64 * 1024  # of a model card or a licence: more than their front matter or title needs


@dataclass(frozen=True)
class Origin:
    """`name`: what the model is called; `repo` ("org/name") and `commit` where known; `card`: model card metadata."""

    name: str
    repo: str | None = None
    commit: str | None = None
    is_llama: bool = False
    licence_id: str = ""  # as on the hub: "llama4", "apache-2.0"; "" where nothing names one
    card: dict[str, Any] = field(default_factory=dict)

    @property
    def licence_name(self) -> str:
        """For people: "Llama 4 Community License", "apache-2.0" or "unknown"."""
        return licence.NAME if self.is_llama else self.licence_id or "unknown"


def read_origin(folder: Path, config: Mapping[str, Any] | None = None, source: str = "") -> Origin:
    """Gather it from `source` ("org/name" or "org/name@commit"), the fetch manifest, the path inside the Hugging Face
    cache, config.json's `_name_or_path`, and the model card; the folder's own name comes last. Never fails: what
    cannot be read says nothing. `config` is config.json of a Llama 4 architecture, None where there is none.
    """
    repo, commit = _repo(folder, config or {}, source)
    card = licence.front_matter(_head(folder / CARD))
    texts = "\n".join(_head(path) for path in sorted(folder.glob("LICENSE*")) if path.is_file())
    return Origin(
        name=repo.split("/")[1] if repo else Path(os.path.abspath(folder)).name,
        repo=repo,
        commit=commit,
        is_llama=licence.is_llama(card, repo or "", texts, llama_architecture=config is not None),
        licence_id=licence.licence_id(card),
        card=card,
    )


def _repo(folder: Path, config: Mapping[str, Any], source: str) -> tuple[str | None, str | None]:
    """(repository, commit), each None where nothing tells."""
    try:
        manifest = read_manifest(folder)
    except CheckpointError:
        manifest = None
    cached = _HUB_CACHE.search(os.path.abspath(folder))
    found: list[tuple[Any, Any]] = [source.partition("@")[::2]]
    found += [(manifest.repo_id, manifest.commit)] if manifest else []
    found += [(f"{cached[1]}/{cached[2]}", cached[3])] if cached else []
    named = config.get("_name_or_path")
    found += [(named, None)] if isinstance(named, str) and not os.path.exists(named) else []  # a path is no repository
    for repo, commit in found:
        if isinstance(repo, str) and _REPO.fullmatch(repo):
            return repo, commit if isinstance(commit, str) and _COMMIT.fullmatch(commit) else None
    return None, None


def _head(path: Path) -> str:
    """The beginning of a text file; "" where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read(_HEAD_BYTES).decode(errors="replace")
    except OSError:
        return ""
