"""A checkpoint folder: config, shards and index, checked against each other before any tensor is read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from converters.arch_io import read_arch
from converters.fields import read_json_object
from converters.findings import Finding, Report, of_error, raise_first
from converters.safetensors_io import DTYPE_NAMES, SafetensorsFile, StoredTensor
from l4tool.core.arch import Arch
from l4tool.core.errors import EXIT_NO_INPUT, CheckpointError, InputMissing, L4Error

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_NAMED = 5
# What a user expects beside the weights of a derived checkpoint.
SIDE_FILES = (
    "tokenizer*", "chat_template*", "special_tokens_map.json", "added_tokens.json", "preprocessor_config.json",
    "processor_config.json", "video_preprocessor_config.json", "generation_config.json", "LICENSE*", "NOTICE*",
    "USE_POLICY*", "README*",
)  # fmt: skip
Expected = tuple[tuple[int, ...], tuple[torch.dtype, ...]]  # shape, allowed dtypes


class Shards:
    """The weight files as they are: every stored tensor by its stored name, with its open file.

    With a `report` that does not raise, whatever can be read is there; `lost` are the tensors that the index names and
    no sound file holds.
    """

    def __init__(self, path: Path, report: Report = raise_first) -> None:
        self.path = path
        self.report = report
        self.stored: dict[str, StoredTensor] = {}
        self.files: dict[Path, SafetensorsFile] = {}
        self.lost: set[str] = set()
        if (path / INDEX).exists():
            self._open_index(path / INDEX)
        elif (path / SINGLE).exists():
            self._open_file(path / SINGLE)
        else:
            self.report(
                CheckpointError(
                    f"{path} has neither {INDEX} nor {SINGLE}",
                    hint="give a checkpoint in safetensors; if this is an unfinished download, finish it first",
                ),
                [Finding("no-index", f"{path} has neither {INDEX} nor {SINGLE}", exit_code=EXIT_NO_INPUT)],
            )
            self._open_present()

    def _open_present(self) -> None:
        for path in sorted(self.path.glob("*.safetensors")):
            self._open_file(path)

    def _open_file(self, path: Path) -> SafetensorsFile | None:
        try:
            file = SafetensorsFile(path)
        except L4Error as error:
            self.report(error, [of_error(error, "header", path)])
            return None
        for name, tensor in file.tensors.items():
            if name in self.stored:
                both = f"tensor {name!r} is in both {self.stored[name].file} and {path}"
                self.report(CheckpointError(both), [Finding("twice", both, path.name, name)])
            self.stored[name] = tensor
        self.files[path] = file
        return file

    def _open_index(self, index: Path) -> None:
        try:
            weight_map = read_json_object(index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise CheckpointError(f"{index}: weight_map must be an object of tensor names and file names")
        except L4Error as error:
            self.report(error, [of_error(error, "index", index)])
            self._open_present()
            return
        names_by_file: dict[str, set[str]] = {}
        for name, file_name in weight_map.items():
            error_or_none = _file_name_error(index, name, file_name)
            if error_or_none is not None:
                self.report(error_or_none, [Finding("index", error_or_none.message, index.name, name)])
                self.lost.add(name)
            else:
                names_by_file.setdefault(file_name, set()).add(name)
        self._require_files(index, names_by_file)
        for file_name in sorted(names_by_file):
            file = self._open_file(self.path / file_name)
            if file is None:
                self.lost |= names_by_file[file_name]
            else:
                self._check_against_index(index, file, names_by_file[file_name])

    def _require_files(self, index: Path, names_by_file: dict[str, set[str]]) -> None:
        """Report the files that are not there, and take them out of the map."""
        missing = [file_name for file_name in names_by_file if not os.path.isfile(self.path / file_name)]
        if missing:
            error = InputMissing(
                f"{index} names {len(missing)} file(s) that do not exist: {shorten(missing)}",
                hint="finish or repeat the download of this checkpoint",
            )
            self.report(error, [self._missing_shard(name, names_by_file[name]) for name in missing])
        for file_name in missing:
            self.lost |= names_by_file.pop(file_name)

    def _missing_shard(self, file_name: str, names: set[str]) -> Finding:
        what = f"{self.path / file_name} does not exist: {len(names)} tensor(s) are lost"
        return Finding("missing-file", what, file_name, exit_code=EXIT_NO_INPUT, hint="fetch it again")

    def _check_against_index(self, index: Path, file: SafetensorsFile, named: set[str]) -> None:
        lost = sorted(named - file.tensors.keys())
        if lost:
            self.lost |= set(lost)
            self.report(
                CheckpointError(
                    f"{file.path} lacks {len(lost)} tensor(s) that {index.name} places there: {shorten(lost)}"
                ),
                [Finding("index", f"{file.path} lacks {n!r}, which {index.name} places there", file.path.name, n)
                 for n in lost],
            )  # fmt: skip
        extra = sorted(file.tensors.keys() - named)
        if extra:
            self.report(
                CheckpointError(
                    f"{file.path} holds {len(extra)} tensor(s) that {index.name} does not name: {shorten(extra)}"
                ),
                [Finding("index", f"{file.path} holds {n!r}, which {index.name} does not place there",
                         file.path.name, n) for n in extra],
            )  # fmt: skip

    def view(self, stored_name: str) -> torch.Tensor:
        """A whole stored tensor, zero-copy."""
        return self.files[self.stored[stored_name].file].view(stored_name)

    def side_files(self) -> list[Path]:
        """Files that belong to the model but hold no weights, sorted by name; config.json is not among them."""
        found = {path for pattern in SIDE_FILES for path in self.path.glob(pattern) if path.is_file()}
        return sorted(found)

    def close(self) -> None:
        for file in self.files.values():
            file.close()


class CheckpointFolder(Shards):
    """The raw contents: `arch`, `config`, and every stored tensor. config.json must be sound whatever `report` does."""

    def __init__(self, path: Path, report: Report = raise_first) -> None:
        if not path.is_dir():
            raise InputMissing(f"{path} is not a checkpoint folder", hint="give the folder that holds config.json")
        self.arch: Arch
        self.config: dict[str, Any]
        self.arch, self.config = read_arch(path)
        quantization = self.config.get("quantization_config")
        if quantization is not None and not isinstance(quantization, dict):
            raise CheckpointError(f"{path / 'config.json'}: quantization_config must be an object")
        self.quantization: dict[str, Any] | None = quantization
        super().__init__(path, report)

    def check(self, expected: Mapping[str, Expected], optional: set[str]) -> set[str]:
        """Compare what is stored with what must be: names, shapes and allowed dtypes. Reports what is wrong.

        Returns the names of the tensors that are as they must be.
        """
        missing = [n for n in expected if n not in self.stored and n not in optional and n not in self.lost]
        unknown = [name for name in self.stored if name not in expected]
        if unknown:
            file = self.stored[unknown[0]].file
            self.report(
                CheckpointError(
                    f"{file}: {len(unknown)} tensor(s) that config.json's architecture does not have: "
                    f"{shorten(unknown)}",
                    hint=f"it also lacks {len(missing)}: {shorten(missing)}" if missing else None,
                ),
                [self._finding("unknown-tensor", name, "is not in config.json's architecture") for name in unknown],
            )
        if missing:
            self.report(
                CheckpointError(
                    f"{self.path} lacks {len(missing)} tensor(s) of this architecture: {shorten(missing)}",
                    hint="the download is incomplete, or config.json belongs to another checkpoint",
                ),
                [Finding("missing-tensor", f"{self.path} lacks tensor {name!r}", None, name) for name in missing],
            )
        return {name for name in self.stored if name in expected and self._fits(name, *expected[name])}

    def _fits(self, name: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> bool:
        tensor = self.stored[name]
        if tensor.shape != shape:
            finding = self._finding(
                "shape", name, f"has shape {list(tensor.shape)}, config.json asks for {list(shape)}"
            )
        elif tensor.dtype not in dtypes:
            allowed = " or ".join(DTYPE_NAMES[dtype] for dtype in dtypes)
            finding = self._finding("dtype", name, f"is {DTYPE_NAMES[tensor.dtype]}, config.json asks for {allowed}")
        else:
            return True
        self.report(CheckpointError(finding.message), [finding])
        return False

    def _finding(self, kind: str, name: str, what: str) -> Finding:
        file = self.stored[name].file
        return Finding(kind, f"{file}: tensor {name!r} {what}", file.name, name)


def _file_name_error(index: Path, tensor: str, file_name: object) -> CheckpointError | None:
    """A shard is a plain file name in the folder itself (it may be a symlink: the Hugging Face cache makes them)."""
    plain = isinstance(file_name, str) and file_name not in ("", ".", "..")
    if plain and not any(char in str(file_name) for char in "\0/\\"):
        return None
    return CheckpointError(
        f"{index}: tensor {tensor!r} is placed in {file_name!r}, which is not a file name inside the folder",
        hint="do not use this checkpoint: its index points outside its own folder",
    )


def shorten(names: list[str]) -> str:
    """A few names and how many more."""
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more
