"""Where a checkpoint lies on this machine, without asking the network."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from l4tool.core.errors import InputMissing, L4Error
from l4tool.hub.manifest import read_manifest
from l4tool.hub.names import RepoSpec, is_repo, parse_repo

COMMIT = re.compile(r"[0-9a-f]{40,64}")
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


def locate(text: str) -> Path | None:
    """An existing folder → itself; a short name or repo id that is complete in the shared cache → its folder; or None.

    Complete: config.json and every shard that the index names are there, and all files of the manifest, if there is
    one, in their sizes.
    """
    if os.path.isdir(text):
        return Path(text)
    if not is_repo(text):
        return None
    folder = cached_snapshot(parse_repo(text))
    return folder if folder is not None and is_complete(folder) else None


def require_local(text: str) -> Path:
    """`locate`, for commands that need the files: a path stays what it is. Raises InputMissing with what to type."""
    found = locate(text)
    if found is None and is_repo(text) and text.count("/") <= 1 and not text.startswith((".", "/")):
        raise InputMissing(f"{text} is not on this machine", hint=f"run `l4tool fetch {text}` first")
    return found or Path(text)


def cache_folder(repo_id: str) -> Path:
    """The repository's folder in the shared cache (HF_HUB_CACHE, else below HF_HOME), there or not."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / "--".join(["models", *repo_id.split("/")])


def cached_snapshot(spec: RepoSpec) -> Path | None:
    """The snapshot folder that the cache has for a branch, tag or commit; None if it has none."""
    root, revision = cache_folder(spec.repo_id), spec.revision or "main"
    try:
        commit = revision if COMMIT.fullmatch(revision) else (root / "refs" / revision).read_text().strip()
    except OSError:
        return None
    folder = root / "snapshots" / commit
    return folder if COMMIT.fullmatch(commit) and folder.is_dir() else None


def is_complete(folder: Path) -> bool:
    """Config and weights are there, and nothing of the manifest, if there is one, is missing or of another size."""
    try:
        manifest = read_manifest(folder)
        if manifest is not None and any(_size(folder / path) != entry.size for path, entry in manifest.files.items()):
            return False
        if (folder / INDEX).is_file():
            names = set(json.loads((folder / INDEX).read_bytes())["weight_map"].values())
        else:
            names = {SINGLE}
        return all((folder / name).is_file() for name in {"config.json", *names})
    except (L4Error, OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None
