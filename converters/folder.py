"""A checkpoint folder: config, shards and index, checked against each other before any tensor is read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from converters.arch_io import read_arch
from converters.fields import read_json_object
from converters.safetensors_io import DTYPE_NAMES, SafetensorsFile, StoredTensor
from l4tool.core.arch import Arch
from l4tool.core.errors import CheckpointError, InputMissing

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_NAMED = 5
# What a user expects beside the weights of a derived checkpoint.
SIDE_FILES = (
    "tokenizer*", "chat_template*", "special_tokens_map.json", "added_tokens.json", "preprocessor_config.json",
    "processor_config.json", "video_preprocessor_config.json", "generation_config.json", "LICENSE*", "NOTICE*",
    "USE_POLICY*", "README*",
)  # fmt: skip


class CheckpointFolder:
    """The raw contents: `arch`, `config`, and every stored tensor by its stored name with its open file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_dir():
            raise InputMissing(f"{path} is not a checkpoint folder", hint="give the folder that holds config.json")
        self.arch: Arch
        self.config: dict[str, Any]
        self.arch, self.config = read_arch(path)
        quantization = self.config.get("quantization_config")
        if quantization is not None and not isinstance(quantization, dict):
            raise CheckpointError(f"{path / 'config.json'}: quantization_config must be an object")
        self.quantization: dict[str, Any] | None = quantization
        self.stored: dict[str, StoredTensor] = {}
        self.files: dict[Path, SafetensorsFile] = {}
        if (path / INDEX).exists():
            self._open_index(path / INDEX)
        elif (path / SINGLE).exists():
            self._open_file(path / SINGLE)
        else:
            raise CheckpointError(
                f"{path} has neither {INDEX} nor {SINGLE}",
                hint="give a checkpoint in safetensors; if this is an unfinished download, finish it first",
            )

    def _open_file(self, path: Path) -> SafetensorsFile:
        file = SafetensorsFile(path)
        for name, tensor in file.tensors.items():
            if name in self.stored:
                raise CheckpointError(f"tensor {name!r} is in both {self.stored[name].file} and {path}")
            self.stored[name] = tensor
        self.files[path] = file
        return file

    def _open_index(self, index: Path) -> None:
        weight_map = read_json_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index}: weight_map must be an object of tensor names and file names")
        names_by_file: dict[str, set[str]] = {}
        for name, file_name in weight_map.items():
            _check_file_name(index, name, file_name)
            names_by_file.setdefault(file_name, set()).add(name)
        missing = [file_name for file_name in names_by_file if not os.path.isfile(self.path / file_name)]
        if missing:
            raise InputMissing(
                f"{index} names {len(missing)} file(s) that do not exist: {shorten(missing)}",
                hint="finish or repeat the download of this checkpoint",
            )
        for file_name in sorted(names_by_file):
            file = self._open_file(self.path / file_name)
            self._check_against_index(index, file, names_by_file[file_name])

    def _check_against_index(self, index: Path, file: SafetensorsFile, named: set[str]) -> None:
        lost = sorted(named - file.tensors.keys())
        if lost:
            raise CheckpointError(
                f"{file.path} lacks {len(lost)} tensor(s) that {index.name} places there: {shorten(lost)}"
            )
        extra = sorted(file.tensors.keys() - named)
        if extra:
            raise CheckpointError(
                f"{file.path} holds {len(extra)} tensor(s) that {index.name} does not name: {shorten(extra)}"
            )

    def check(
        self, expected: Mapping[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]], optional: set[str]
    ) -> None:
        """Compare what is stored with what must be: names, shapes and allowed dtypes. Raises one CheckpointError."""
        missing = [name for name in expected if name not in self.stored and name not in optional]
        unknown = [name for name in self.stored if name not in expected]
        if unknown:
            file = self.stored[unknown[0]].file
            raise CheckpointError(
                f"{file}: {len(unknown)} tensor(s) that config.json's architecture does not have: {shorten(unknown)}",
                hint=f"it also lacks {len(missing)}: {shorten(missing)}" if missing else None,
            )
        if missing:
            raise CheckpointError(
                f"{self.path} lacks {len(missing)} tensor(s) of this architecture: {shorten(missing)}",
                hint="the download is incomplete, or config.json belongs to another checkpoint",
            )
        for name, tensor in self.stored.items():
            shape, dtypes = expected[name]
            if tensor.shape != shape:
                found, wanted = list(tensor.shape), list(shape)
                raise CheckpointError(
                    f"{tensor.file}: tensor {name!r} has shape {found}, config.json asks for {wanted}"
                )
            if tensor.dtype not in dtypes:
                allowed = " or ".join(DTYPE_NAMES[dtype] for dtype in dtypes)
                raise CheckpointError(
                    f"{tensor.file}: tensor {name!r} is {DTYPE_NAMES[tensor.dtype]}, config.json asks for {allowed}"
                )

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


def _check_file_name(index: Path, tensor: str, file_name: object) -> None:
    """A shard is a plain file name in the folder itself (it may be a symlink: the Hugging Face cache makes them)."""
    plain = isinstance(file_name, str) and file_name not in ("", ".", "..")
    if not plain or "\0" in str(file_name) or "/" in str(file_name) or "\\" in str(file_name):
        raise CheckpointError(
            f"{index}: tensor {tensor!r} is placed in {file_name!r}, which is not a file name inside the folder",
            hint="do not use this checkpoint: its index points outside its own folder",
        )


def shorten(names: list[str]) -> str:
    """A few names and how many more."""
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more
