"""`convert`: a target's files planned from headers, written by the one writing mechanism, with what lies beside."""

from __future__ import annotations

import fnmatch
import json
import platform
import re
import time
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from converters import papers
from converters.names import Row
from converters.origin import read_origin
from converters.papers import LICENCE, NOTICE
from converters.reader import Reader
from converters.targets import TARGETS, Options, Output
from converters.view import LayoutView
from converters.writer import write_index
from converters.writing import journal, run
from converters.writing.checks import paths_apart
from converters.writing.plan import Item, Plan, make_budget
from converters.writing.supply import Folder
from l4tool.core import licence
from l4tool.core.atomic import write_file
from l4tool.core.errors import UsageError

MEMORY_BYTES = 2**30
SUFFIXES = {"hf": "", "hf-experts": "-Experts", "meta": "-Original", "gguf": "-GGUF", "compressed-tensors": ""}


@dataclass(frozen=True)
class How:
    """How to run, as opposed to what to make. None of it changes the output's bytes."""

    memory_bytes: int = MEMORY_BYTES
    jobs: int | None = None
    force: bool = False
    command: str = ""
    licence: Path | None = None  # the licence's text, where the source does not hold it


def convert(reader: Reader, out: Path, options: Options, how: How) -> dict[str, Any]:
    """Write the checkpoint in another layout to `out`, or carry on where an interrupted run of the same job stopped.

    Returns the report. Raises UsageError, CheckpointError, WriteError or LockHeld; what was finished until then stays
    and counts.
    """
    started_s = time.monotonic()
    paths_apart(reader.path, out)
    job = Conversion(reader, options, how)
    budget = make_budget(job.plan, how.memory_bytes, how.jobs)
    with run.claim(out):
        return run.run(job, out, budget, Folder(reader.path), started_s, how.force)


class Conversion:
    """The job of one convert run; see `converters.writing.run.Job`."""

    tool = "convert"

    def __init__(self, reader: Reader, options: Options, how: How) -> None:
        self.reader, self.options, self.how = reader, options, how
        self.output = TARGETS[options.to].make(reader, options)
        self.rows = _keys(self.output)
        self.source = LayoutView(reader, self.rows)
        self.plan = self._plan()
        self.origin = read_origin(reader.path, reader.config)
        self._licence = papers.read_licence(how.licence, self.origin.is_llama) if how.licence else None

    def _plan(self) -> Plan:
        """Every piece of every file, with the view that reads it."""
        items: list[list[Item]] = []
        keys = iter(self.rows)
        for file in self.output.files:
            inside = []
            for piece in file.pieces:
                info = self.source.info(next(keys))
                parts = piece.encoder.parts(info, piece.row.stored)
                nbytes = sum(part.nbytes for part in parts)
                names, step = tuple(part.name for part in parts), _step(piece.row) if self.reader.computes else 1
                inside.append(Item(info, piece.row.stored, piece.encoder, names, nbytes, step))
            items.append(inside)
        everything = [item for inside in items for item in inside]
        source_bytes = sum(item.info.nbytes for item in everything)
        output_bytes = sum(item.nbytes_out for item in everything)
        return Plan([file.plan for file in self.output.files], items, source_bytes, output_bytes)

    def recipe(self) -> dict[str, Any]:
        return asdict(self.options)

    def files(self) -> list[str]:
        """Every file beside the weights."""
        names = {*self._copies(), *self.reader.made_files(), *self.output.made}
        names |= {NOTICE} if self.origin.is_llama else set()
        names |= {LICENCE} if self._licence is not None else set()
        return sorted(name for name in names if not self._dropped(name))

    def begin(self, out: Path) -> None:
        base = re.sub(r"[^A-Za-z0-9._-]+", "-", self.origin.name).strip("-.") or "model"
        base = base if base.startswith(licence.NAME_PREFIX) else f"{licence.NAME_PREFIX}-{base}"
        suggestion = base + SUFFIXES[self.options.to]
        papers.tell(self.origin, self.files(), out, suggestion, str(self.reader.path), is_folder=True)

    def mend(self, out: Path, report: dict[str, Any]) -> dict[str, Any]:
        """Add licence files that are there by now; nothing else is touched."""
        if set(report.get("license", {}).get("missing", [])) - set(papers.missing(self.origin, self.files())):
            self._write_side_files(out)
            report["license"] = papers.facts(self.origin, self.files())
            write_file(out / journal.REPORT, json.dumps(report, indent=2) + "\n")
        return report

    def complete(self, out: Path, finished: run.Finished) -> dict[str, Any]:
        report = self._report(finished)
        self._write_side_files(out)
        write_file(out / journal.REPORT, json.dumps(report, indent=2) + "\n")
        if self.output.has_index:
            write_index(out, self.plan.shards)
        if self.output.last is not None:
            write_file(out / self.output.last, self.output.made[self.output.last])
        return report

    def _copies(self) -> dict[str, Path]:
        return {path.name: path for path in self.reader.side_files()}

    def _dropped(self, name: str) -> bool:
        return name not in self.output.made and any(fnmatch.fnmatch(name, pattern) for pattern in self.output.drop)

    def _write_side_files(self, out: Path) -> None:
        """The source's own, those that its layout holds in another form, the target's; the last one wins."""
        copies = self._copies()
        contents = {name: path.read_bytes() for name, path in copies.items()} | self.reader.made_files()
        if self._licence is not None:
            contents[LICENCE] = self._licence
        if self.origin.is_llama:
            contents[NOTICE] = papers.notice(contents.get(NOTICE, b""))
        contents |= dict(self.output.made)
        for name, data in contents.items():
            if name != self.output.last and not self._dropped(name):
                write_file(out / name, data)

    def _report(self, finished: run.Finished) -> dict[str, Any]:
        shards = sorted(finished.log.shards.items())
        return {
            "tool": "l4tool convert",
            "versions": {"python": platform.python_version(), "torch": metadata.version("torch")},
            "job": finished.job,
            "last": self.output.last or self.plan.shards[0].file_name,
            "totals": {
                "source_bytes": self.plan.source_bytes,
                "output_bytes": self.plan.output_bytes,
                "tensors": sum(map(len, self.plan.items)),
            },
            "output": {name: {"size": entry["size"], "digest": entry["digest"]} for name, entry in shards},
            "license": papers.facts(self.origin, self.files()),
            "run": {
                "command": self.how.command, "seconds": round(finished.seconds, 3), "resumed": finished.resumed
            },
        }  # fmt: skip


def _step(row: Row) -> int:
    """Where ranges of rows begin, so that a turned tensor that must be computed is computed once."""
    return max((part.stored_size[0] for part in row.parts if part.transposed), default=1)


def _keys(output: Output) -> dict[str, Row]:
    """Rows by keys that differ: their names, after that of their file where several files hold the same name."""
    names = [piece.row.stored for file in output.files for piece in file.pieces]
    unique = len(set(names)) == len(names)
    return {
        piece.row.stored if unique else f"{file.plan.file_name}/{piece.row.stored}": piece.row
        for file in output.files
        for piece in file.pieces
    }


SPELLED = {"dtype": "--dtype", "text_only": "--text-only", "shards": "--shards", "shard_bytes": "--shard-size"}


def check_options(options: Options) -> Options:
    """Raises UsageError for an option that the target does not take, and for a dtype that it does not have."""
    target = TARGETS[options.to]
    for field, option in SPELLED.items():
        if getattr(options, field) and field not in target.options:
            taken = ", ".join(SPELLED[name] for name in target.options)
            raise UsageError(f"{option} does not go with --to {options.to}", hint=f"it takes {taken}")
    if options.dtype is not None and options.dtype not in target.dtypes:
        raise UsageError(f"--to {options.to} --dtype takes {', '.join(target.dtypes)}, not {options.dtype}")
    return options
