"""Tiny random checkpoints for tests, and ways to spoil copies of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from examples.make_checkpoint import make_checkpoint


def make(folder: Path, **options: Any) -> Path:
    """A checkpoint made by examples/make_checkpoint.py (its options by name) in `folder`."""
    make_checkpoint(folder, **options)
    return folder


def edit_config(folder: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    """Change config.json in place."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    edit(config)
    path.write_text(json.dumps(config))
    return folder


def copy(source: Path, folder: Path) -> Path:
    """A writable copy of a shared checkpoint."""
    shutil.copytree(source, folder)
    return folder


def shards(folder: Path) -> list[Path]:
    """The files that the index names, sorted."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return sorted({folder / name for name in index["weight_map"].values()})


def load(folder: Path) -> dict[str, torch.Tensor]:
    """Every stored tensor, read by the safetensors library."""
    return {name: tensor for path in shards(folder) for name, tensor in load_file(path).items()}


def save(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """Replace a checkpoint's weights by one shard with an index, written by the safetensors library."""
    for path in shards(folder):
        path.unlink()
    name = "model-00001-of-00001.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / name, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
