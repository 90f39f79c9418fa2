"""What the command line names: one input or many, files or URLs, and where the output of each goes."""

from __future__ import annotations

import glob
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from batch.inputs import LocalInput
from batch.journal import SUFFIX
from batch.remote import is_url, list_objects, local_path
from l4tool.core.atomic import PART_SUFFIX
from l4tool.core.errors import InputMissing, L4Error, UsageError, WriteError

LINE_FILES = (".jsonl", ".ndjson")  # what is taken from a folder, compressed or not
PACKED = (".gz", ".zst", ".zstd")
UNFINISHED = (PART_SUFFIX, ".tmp", SUFFIX)
SETTLED_S = 60.0  # a file whose last line has no end yet is left alone while it is younger than this


@dataclass(frozen=True)
class Places:
    """Inputs and outputs as they were typed: paths or URLs. `spool` None: in the user's cache."""

    input: str
    output: str
    errors: str | None = None
    spool: Path | None = None


def is_many(text: str) -> bool:
    """True for a folder and for a pattern. A file that is really called so is a file."""
    if is_url(text) and local_path(text) is None:
        return not text.startswith("http") and (text.endswith("/") or glob.has_magic(text))
    path = local_path(text) or Path(text)
    return path.is_dir() or (glob.has_magic(text) and not path.exists())


def find_inputs(text: str) -> list[str]:
    """The inputs that a folder or pattern means, sorted. Raises L4Error when there is no such place."""
    if is_url(text) and local_path(text) is None:
        return [url for url in list_objects(text) if _is_taken(url.rpartition("/")[2], glob.has_magic(text))]
    path = local_path(text) or Path(text)
    if path.is_dir():
        try:
            return sorted(str(each) for each in path.iterdir() if each.is_file() and _is_taken(each.name, False))
        except OSError as error:
            raise InputMissing(f"cannot list {path}: {error.strerror}") from None
    root = Path(*_before_magic(path.parts))
    if not root.is_dir():
        raise InputMissing(f"no such folder: {root}")
    found = glob.glob(str(path), recursive=True)
    return sorted(name for name in found if os.path.isfile(name) and _is_taken(os.path.basename(name), True))


def _before_magic(parts: Sequence[str]) -> Iterator[str]:
    for part in parts[:-1]:
        if glob.has_magic(part):
            return
        yield part


def _is_taken(name: str, is_pattern: bool) -> bool:
    """A pattern takes what it matches, a folder what is called like lines; neither takes what is being written."""
    return (
        not name.startswith(".") and not name.endswith(UNFINISHED) and (is_pattern or _plain(name).endswith(LINE_FILES))
    )


def _plain(name: str) -> str:
    """A file's name without what says that it is compressed."""
    return next((name.removesuffix(end) for end in PACKED if name.endswith(end)), name)


def pair_up(places: Places, inputs: Sequence[str]) -> list[Places]:
    """Each input with its output, and its error file. Raises UsageError where names clash."""
    taken: dict[str, str] = {}
    resolved = {os.path.realpath(name) for name in inputs}
    pairs = []
    for source in inputs:
        name = _plain(source.rpartition("/")[2])
        if name in taken:
            raise UsageError(
                f"{taken[name]} and {source} would both be answered in {name}", hint="rename one, or run them apart"
            )
        taken[name] = source
        pair = Places(
            source, _inside(places.output, name), places.errors and _inside(places.errors, name), places.spool
        )
        if os.path.realpath(pair.output) in resolved:
            raise UsageError(f"{pair.output} is an input", hint="choose another folder for the outputs")
        pairs.append(pair)
    return pairs


def _inside(folder: str, name: str) -> str:
    return f"{folder.rstrip('/')}/{name}" if is_url(folder) else str(Path(folder) / name)


def check_folders(places: Places) -> None:
    """The folders for outputs are there, or made. Raises UsageError, WriteError."""
    if places.output == "-":
        raise UsageError("many inputs have an output each; standard output is one", hint="name a folder instead of -")
    if places.errors is not None and os.path.realpath(places.errors) == os.path.realpath(places.output):
        raise UsageError("with many inputs --errors is a folder, and not that of the outputs", hint="name another one")
    for name in (places.output, places.errors):
        if name is None or is_url(name):
            continue
        folder = Path(name)
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"{folder} is a file; many inputs need a folder for their outputs", hint="name a folder")
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise WriteError(f"cannot make the folder {folder}: {error.strerror}", hint=f"mkdir -p {folder}") from None


def is_being_written(name: str) -> bool:
    """A local file whose last line has no end yet, though it was changed a moment ago. What is compressed has none."""
    if is_url(name):
        return False
    try:
        with open(name, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            if not size or time.time() - os.fstat(file.fileno()).st_mtime > SETTLED_S:
                return False
            file.seek(-1, os.SEEK_END)
            return file.read() != b"\n" and LocalInput(Path(name)).count_lines(1) is not None
    except (OSError, L4Error):
        return False  # the run says what is wrong
