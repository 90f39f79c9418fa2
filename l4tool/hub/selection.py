"""Which files of a repository are wanted, and which names a repository may not use on our disk."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from l4tool.core.atomic import PART_SUFFIX
from l4tool.core.errors import CheckpointError, InputMissing, UsageError
from l4tool.core.lock import LOCK
from l4tool.core.placeholder import MARK_SUFFIX

if TYPE_CHECKING:
    from l4tool.hub.client import RemoteFile, Snapshot

LAYOUTS = ("hf", "meta")
ORIGINAL = "original/"
STATE = ".l4tool-fetch"
OUR_SUFFIXES = (
    PART_SUFFIX,
    PART_SUFFIX + ".ledger",
    PART_SUFFIX + ".ledger.new",
    PART_SUFFIX + ".l4tool-xet",
    MARK_SUFFIX,
)
OURS = ("l4tool-manifest.json", LOCK, STATE)
LICENCE_FILES = ("LICENSE*", "LICENCE*", "USE_POLICY*", "NOTICE*", "README.md")
HF_SKIPS = (
    "*/*", ".*", "consolidated*", "*.pth", "*.pt", "*.bin", "*.ckpt", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.ot",
    "*.tflite", "*.png", "*.jpg", "*.jpeg", "*.gif", "*.svg", "*.webp", "*.mp4", "*.pdf", "*.zip",
)  # fmt: skip
META_FILES = ("*.pth", "*.pt", "*.json", "*.model", "*.chk")


def wanted_files(
    snapshot: Snapshot, layout: str = "hf", include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> tuple[RemoteFile, ...]:
    """The files to fetch, small ones first.

    `layout`: "hf" takes what the tool needs of a Hugging Face checkpoint, "meta" the files in Meta's own layout (in
    `original/` where the repository has that folder). `include` patterns choose among all files instead. Licence files
    come along unless a pattern of `exclude` names them; `exclude` wins over everything. Patterns are globs whose `*`
    crosses slashes; one that ends in a slash means the folder. Raises UsageError, InputMissing when nothing is left,
    and CheckpointError for names that cannot be stored safely.
    """
    if layout not in LAYOUTS:
        raise UsageError(f"not a layout: {layout!r}", hint="write hf or meta")
    files = [file for file in snapshot.files if file.path not in OURS]
    chosen = [file for file in files if _fits(file.path, include)] if include else _of_layout(files, layout)
    licences = [file for file in files if _fits(file.path, LICENCE_FILES)]
    wanted = {file.path: file for file in [*chosen, *licences] if not _fits(file.path, exclude)}
    if not chosen or not wanted:
        raise _nothing(snapshot, layout, bool(include or exclude))
    check_paths(list(wanted))
    return tuple(sorted(wanted.values(), key=lambda file: (file.sha256 is not None, file.path)))


def _of_layout(files: list[RemoteFile], layout: str) -> list[RemoteFile]:
    if layout == "hf":
        return [file for file in files if not _fits(file.path, HF_SKIPS)]
    folder = ORIGINAL if any(file.path.startswith(ORIGINAL) for file in files) else ""
    inside = [file for file in files if file.path.startswith(folder) and "/" not in file.path[len(folder) :]]
    return [file for file in inside if _fits(file.path, META_FILES)]


def _nothing(snapshot: Snapshot, layout: str, has_patterns: bool) -> InputMissing:
    if has_patterns:
        return InputMissing(f"{snapshot.repo_id}: no file fits the patterns", hint="see them with --dry-run")
    other = "meta" if layout == "hf" else "hf"
    return InputMissing(f"{snapshot.repo_id} holds no files of layout {layout}", hint=f"try --layout {other}")


def _fits(path: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(path, pattern + "*" if pattern.endswith("/") else pattern) for pattern in patterns)


def path_problem(path: str) -> str | None:
    """Why a name from elsewhere cannot be a path below our folder; None when it can."""
    parts = path.split("/")
    if not path or any(part in ("", ".", "..") for part in parts):
        return "leads out of the folder or is no path"
    if "\\" in path or not path.isprintable():
        return "holds characters that are not allowed"
    if any(len(part.encode()) > 230 for part in parts) or len(path.encode()) > 2000:
        return "is too long"
    if parts[0].casefold() in OURS or path.casefold().endswith(OUR_SUFFIXES):
        return "is a name that l4tool uses itself"
    return None


def check_paths(paths: Sequence[str]) -> None:
    """Raise CheckpointError for a name that is unsafe, or two that are one on some file systems."""
    seen: dict[str, str] = {}
    for path in paths:
        if (problem := path_problem(path)) is not None:
            raise CheckpointError(
                f"the repository has a file {path!r}, which {problem}", hint="leave it out: --exclude"
            )
        key = _key(path)
        if key in seen:
            message = f"{seen[key]!r} and {path!r} are the same file on some file systems"
            raise CheckpointError(message, hint="leave one out: --exclude")
        seen[key] = path
    for key, path in seen.items():
        parts = key.split("/")
        for depth in range(1, len(parts)):
            if (file := seen.get("/".join(parts[:depth]))) is not None:
                raise CheckpointError(f"{file!r} is a file and also the folder of {path!r}", hint="leave one out")


def _key(path: str) -> str:
    return unicodedata.normalize("NFC", path.casefold())
