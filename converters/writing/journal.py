"""What makes a run resumable: a fingerprint of the job, and a journal of what is finished.

The journal is JSON lines in the output folder, each fsynced: first the job, then tensors that are durable in a shard's
`.part`, with their error sums and hashes, and one line per finished shard. It goes away when the run is complete; then
`l4tool-report.json` tells what the folder is.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from converters.folder import INDEX
from converters.reader import Reader
from l4tool import __version__
from l4tool.core.atomic import part_path, write_errors
from l4tool.core.lock import LOCK

JOURNAL = "l4tool-journal.jsonl"
REPORT = "l4tool-report.json"
STAGING = ".source"  # shards of a streamed source, until they are used up
FORM = 2  # of the journal; 1 knew whole shards only
CONFIGS = ("config.json", INDEX, "params.json", "tokenizer.model")
PAPERS = ("LICENSE", "NOTICE", "USE_POLICY", "README")
SAMPLES, SAMPLE_BYTES = 16, 2**16
FORCE_HINT = "add --force to start afresh, or choose another output"


def fingerprint(tool: str, recipe: dict[str, Any], source: dict[str, Any]) -> dict[str, Any]:
    """The job: command, tool version, all that decides the output's bytes, the source as its supply describes it."""
    return {"tool": tool, "version": __version__, "recipe": recipe, "source": source}


def describe_folder(reader: Reader) -> dict[str, Any]:
    """Of each file that the output is made from: size, mtime, and SHA-256 of samples.

    The sample is 64 KiB at each of 16 evenly spaced places, the header among them: a full hash would cost more than
    quantizing. Small files are hashed whole. Licence files and model card are left out: they may come later.
    """
    described: dict[str, Any] = {}
    for path in source_files(reader):
        if not path.name.startswith(PAPERS):
            name = path.name if path.name not in described else f"{path.parent.name}/{path.name}"  # of two folders
            described[name] = _describe(path)
    return described


def source_files(reader: Reader) -> list[Path]:
    """Every file that the output is made from: configs, side files, weights."""
    small = [*(reader.path / name for name in CONFIGS), *reader.side_files()]
    return list(dict.fromkeys([path for path in small if path.is_file()] + reader.weight_files()))


def _describe(path: Path) -> dict[str, Any]:
    stat = path.stat()
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        if stat.st_size <= SAMPLES * SAMPLE_BYTES:
            digest.update(file.read())
        else:
            for number in range(SAMPLES):
                file.seek(number * (stat.st_size - SAMPLE_BYTES) // (SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sample_sha256": digest.hexdigest()}


def difference(old: dict[str, Any], new: dict[str, Any]) -> str | None:
    """What changed between two fingerprints, in words; None when nothing did."""
    if old.get("tool", new["tool"]) != new["tool"]:
        return f"it was begun by l4tool {old['tool']}"
    if old.get("version") != new["version"]:
        return f"it was begun by version {old.get('version')}, this is {new['version']}"
    if old.get("recipe") != new["recipe"]:
        before = old.get("recipe") or {}
        changed = [key for key, value in new["recipe"].items() if before.get(key) != value]
        return f"it was begun with other options ({', '.join(changed)})"
    before, after = old.get("source") or {}, new["source"]
    named = [describe_repo(source) for source in (before, after)]
    if named[0] != named[1]:
        return f"its source was {named[0] or 'a folder'}, now it is {named[1] or 'a folder'}"
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    return f"the source has changed since ({', '.join(changed[:5])})" if changed else None


def describe_repo(source: dict[str, Any]) -> str | None:
    """A streamed source in words; None for a folder."""
    return f"{source['repo']} at {source['commit'][:12]}" if "repo" in source else None


@dataclass(frozen=True)
class Journaled:
    """What a journal says. `size` is the length of its sound part in bytes; a torn last line is not in it.

    `tensors`: shard → item → {"sums": [squared error, squared weight] or None, "sha256": of each part}, durable in
    the shard or in its `.part`. `shards`: finished shard → {"size", "mtime_ns", "digest"}.
    """

    job: dict[str, Any] | None = None
    tensors: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    shards: dict[str, dict[str, Any]] = field(default_factory=dict)
    size: int = 0
    form: int = FORM


class Journal:
    """The open journal of one run. `tensors` and `shards` as in `Journaled`, from earlier runs too."""

    def __init__(self, folder: Path, job: dict[str, Any], before: Journaled) -> None:
        self.path = folder / JOURNAL
        self.tensors, self.shards = before.tensors, before.shards
        with write_errors(self.path):
            self._file = open(self.path, "ab")
            self._file.truncate(before.size)
        if before.size == 0:
            self._append({"form": FORM, "job": job})

    def add_tensors(self, shard: str, entries: dict[str, dict[str, Any]]) -> None:
        """Record tensors that are durable in a shard or its `.part`."""
        self.tensors.setdefault(shard, {}).update(entries)
        self._append({"tensors": entries, "of": shard})

    def add_shard(self, name: str, entry: dict[str, Any]) -> None:
        """Record a shard that is durable under its final name."""
        self.shards[name] = entry
        self._append({"shard": name, **entry})

    def _append(self, record: dict[str, Any]) -> None:
        with write_errors(self.path):
            self._file.write(json.dumps(record, separators=(",", ":")).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()


def read_journal(folder: Path) -> Journaled:
    """The journal in `folder`, up to its first line that is torn; an empty one where there is none that can be used."""
    try:
        raw = (folder / JOURNAL).read_bytes()
    except OSError:
        return Journaled()
    job, form, size = None, 1, 0
    tensors: dict[str, dict[str, dict[str, Any]]] = {}
    shards: dict[str, dict[str, Any]] = {}
    for line in raw.splitlines(keepends=True):
        try:
            record = json.loads(line)
        except ValueError:
            break
        if not line.endswith(b"\n") or not isinstance(record, dict):
            break
        if "job" in record:
            job, form = record["job"], record.get("form", 1)
        elif "of" in record:
            tensors.setdefault(record["of"], {}).update(record["tensors"])
        elif "shard" in record:
            shards[record.pop("shard")] = record
        size += len(line)
    return Journaled(job, tensors, shards, size, form) if isinstance(job, dict) else Journaled()


def read_report(folder: Path) -> dict[str, Any] | None:
    """The report of a complete output, or None."""
    try:
        report = json.loads((folder / REPORT).read_bytes())
    except (OSError, ValueError):
        return None
    complete = isinstance(report, dict) and "job" in report and (folder / report.get("last", "config.json")).is_file()
    return report if complete else None


def begun_job(folder: Path) -> dict[str, Any]:
    """The job that the folder's unfinished or complete run was made for; {} where there is none."""
    report = read_report(folder)
    return read_journal(folder).job or (report["job"] if report is not None else {})


def begun_from_repo(folder: Path) -> bool:
    """True where that job streams from a repository."""
    return "repo" in begun_job(folder).get("source", {})


def is_ours(folder: Path) -> bool:
    """True for a folder that a run has written or begun."""
    return (folder / JOURNAL).is_file() or read_report(folder) is not None


def is_empty(folder: Path) -> bool:
    return not folder.exists() or all(entry.name in (LOCK, STAGING) for entry in folder.iterdir())


def remove_output(folder: Path, job: dict[str, Any], keep_staging: bool) -> None:
    """Delete what a run of `job` wrote (files and their `.part`), config.json first; nothing else."""
    names = ["config.json", INDEX, *job.get("files", []), REPORT, JOURNAL]
    with write_errors(folder):
        for name in names:
            path = folder / Path(name).name
            path.unlink(missing_ok=True)
            part_path(path).unlink(missing_ok=True)
        if not keep_staging and (folder / STAGING).is_dir():
            shutil.rmtree(folder / STAGING)
