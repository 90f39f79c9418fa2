"""A checkpoint folder as far as it can be understood: what is sound, and everything that is not."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converters.arch_io import read_arch
from converters.compressed import foreign_finding
from converters.detect import open_checkpoint
from converters.fields import read_json_object
from converters.findings import Collector, Finding, of_error
from converters.folder import Shards
from converters.gguf import is_gguf, open_gguf
from converters.mapped import MappedFile
from converters.meta import is_meta, open_meta
from converters.piece_reader import PieceReader
from converters.reader import Reader
from converters.table_reader import TableReader
from l4tool.core.arch import Arch
from l4tool.core.errors import EXIT_NO_INPUT, InputMissing, L4Error

META, GGUF, QUANTO, UNKNOWN = "meta", "gguf", "quanto", "unknown"
LAYOUTS = {
    "hf": "Hugging Face, multimodal",
    "hf-text": "Hugging Face, text only",
    "per-expert": "Hugging Face, one tensor per expert",
    "compressed-tensors": "compressed-tensors",
    QUANTO: "optimum-quanto",
    META: "Meta (params.json, consolidated.*.pth)",
    GGUF: "GGUF (llama.cpp)",
    UNKNOWN: "not recognised",
}
JOURNAL = "l4tool-journal.jsonl"


@dataclass(frozen=True)
class Survey:
    """`reader` where config.json and its quantization can be read; `arch` and `shards` as far as each alone can be.
    `config` is config.json, in Meta's layout params.json. `foreign`: the reader of a layout that is not Hugging Face's.

    `findings`: everything that is wrong with config, files, names, shapes and dtypes.
    """

    path: Path
    layout: str
    arch: Arch | None
    config: dict[str, Any]
    shards: Shards | None
    reader: TableReader | None
    findings: list[Finding]
    foreign: PieceReader | None = None

    @property
    def readable(self) -> Reader | None:
        """The reader, whatever the layout; None where it could not be opened."""
        return self.reader or self.foreign

    def weight_files(self) -> dict[Path, MappedFile]:
        """Every weight file that could be opened."""
        if self.foreign is not None:
            return self.foreign.mapped_files()
        return dict(self.shards.files) if self.shards is not None else {}

    def close(self) -> None:
        if self.foreign is not None:
            self.foreign.close()
        if self.shards is not None:
            self.shards.close()


def survey(path: Path) -> Survey:
    """Look at a folder through its headers; no weight is read. Raises InputMissing for what is no readable folder."""
    if is_gguf(path):
        return _foreign(path, GGUF)
    try:
        os.listdir(path)
    except OSError as error:
        what = f"cannot be read: {error.strerror or error}" if path.is_dir() else "is not a folder"
        raise InputMissing(f"{path} {what}", hint="give the folder that holds the checkpoint") from error
    noted = Collector()
    config, arch = _config(path, noted)
    if is_meta(path) and not config:
        return _foreign(path, META)
    if (path / "quantization_map.json").exists():
        shards = Shards(path, noted)
        _loose_ends(path, shards, noted)
        return Survey(path, QUANTO, arch, config, shards, None, noted.findings)
    reader = _open(path, noted) if arch is not None else None
    shards = reader.folder if reader is not None else Shards(path, noted)
    _loose_ends(path, shards, noted)
    layout = reader.layout if reader is not None else UNKNOWN
    return Survey(path, layout, arch, config, shards, reader, noted.findings)


def _foreign(path: Path, layout: str) -> Survey:
    """A layout that is read in one piece or not at all."""
    noted = Collector()
    reader: PieceReader | None = None
    try:
        reader = open_gguf(path) if layout == GGUF else open_meta(path)
    except L4Error as error:
        noted(error, [of_error(error, "checkpoint", path)])
    config = _params(path) if layout == META else reader.config if reader is not None else {}
    return Survey(path, layout, reader.arch if reader else None, config, None, None, noted.findings, reader)


def _params(path: Path) -> dict[str, Any]:
    try:
        return read_json_object(path / "params.json")
    except L4Error:
        return {}


def _config(path: Path, noted: Collector) -> tuple[dict[str, Any], Arch | None]:
    """config.json as it stands, and what it means; either may be lacking."""
    file = path / "config.json"
    try:
        arch, config = read_arch(path)
        return config, arch
    except L4Error as error:
        noted(error, [of_error(error, "config", file)])
    try:
        return read_json_object(file), None
    except L4Error:
        return {}, None


def _open(path: Path, noted: Collector) -> TableReader | None:
    try:
        reader = open_checkpoint(path, noted, foreign=True)
        noted.add(*filter(None, [foreign_finding(reader)]))
        return reader
    except L4Error as error:
        noted(error, [of_error(error, "config", path / "config.json")])
        return None


def _loose_ends(path: Path, shards: Shards, noted: Collector) -> None:
    """Signs of work that was not finished, and weight files that nothing names."""
    if (path / JOURNAL).exists():
        what = f"{path / JOURNAL} is there: a quantize run into this folder was not finished"
        noted.add(Finding("unfinished", what, JOURNAL, None, EXIT_NO_INPUT, "run the same l4tool quantize again"))
    for part in sorted(path.glob("*.part")):
        noted.add(Finding("unfinished", f"{part} is an unfinished file", part.name, exit_code=0))
    known = {file.name for file in shards.files}
    bad = {finding.file for finding in noted.findings}
    for file in sorted(path.glob("*.safetensors")):
        if file.name not in known and file.name not in bad:
            noted.add(Finding("stray-file", f"{file} is named by no index", file.name, exit_code=0))
