"""Meta's checkpoints: params.json, consolidated.*.pth, tokenizer.model; FP8 ones with fp8_scales_*.pt beside them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from converters.fields import read_json_object
from converters.hf_config import hf_config
from converters.mapped import StoredTensor
from converters.meta_names import META, file_name, is_dropped, meta_rows
from converters.meta_params import arch_from_params
from converters.names import Part
from converters.piece_reader import PieceReader, Source
from converters.pth_io import PthFile, load_small
from l4tool.core.errors import CheckpointError, InputMissing

PARAMS, TOKENIZER = "params.json", "tokenizer.model"
SIDE_FILES = ("LICENSE*", "NOTICE*", "USE_POLICY*", "README*")
FP8 = torch.float8_e4m3fn
# Meta's scale files name the weights as the model has them, the checkpoints as they were trained.
SCALE_NAMES = {"moe_w_in_eD_F": "w1", "moe_w_swiglu_eD_F": "w3", "moe_w_out_eF_D": "w2"}
_EXPERT = re.compile(r"(layers\.\d+\.feed_forward\.experts)\.(\w+)")
_CANONICAL_EXPERT = re.compile(r"\.experts\.(\d+)\.")


def is_meta(path: Path) -> bool:
    """Meta's own layout: params.json and pickled tensor-parallel shards."""
    return (path / PARAMS).is_file() and any(path.glob("consolidated.*.pth"))


class MetaReader(PieceReader):
    """Canonical tensors out of tensor-parallel files.

    FP8 experts (`torch.ops.fbgemm.quantize_fp8_per_row` of each expert turned to [out, in], by llama-models'
    `scripts/quantize.py`): value = weight · scale[expert, row], computed in float32 and rounded to the checkpoint's
    dtype.
    """

    def __init__(self, path: Path) -> None:
        names = _files(path)
        params = read_json_object(path / PARAMS)
        files = [PthFile(path / name) for name in names]
        arch = arch_from_params(params, str(path / PARAMS), _dtype(files[0]))
        sources = [
            Source(file, rows, is_dropped) for file, rows in zip(files, meta_rows(arch, len(files)), strict=True)
        ]
        self._scales = _scales(path, files)
        self.computes = bool(self._scales)
        super().__init__(path, META, arch, hf_config(arch), sources, self._hf_files, _side_files(path), self._allowed)

    def _allowed(self, name: str) -> tuple[torch.dtype, ...]:
        return (FP8,) if self._scales and _EXPERT.fullmatch(name) else ()

    def dtype_of(self, stored: StoredTensor) -> torch.dtype:
        return self.dtype if stored.dtype == FP8 else stored.dtype

    def values(self, piece: Part, stored: StoredTensor, view: torch.Tensor) -> torch.Tensor:
        if stored.dtype != FP8:
            return view
        expert = _CANONICAL_EXPERT.search(piece.name)
        assert expert is not None
        scale = self._scales[stored.file][stored.name][int(expert[1])]  # [rows of this file]
        first = (piece.rows or (0, 0))[0] % len(scale)  # rows are cut over the files as the scale is, or not at all
        rows = scale[first : first + view.shape[0]]
        return (view.float() * rows[:, None].float()).to(self.dtype)

    def weight_files(self) -> list[Path]:
        return super().weight_files() + sorted(self.path.glob("fp8_scales_*.pt") if self._scales else ())

    def _hf_files(self) -> dict[str, bytes]:
        from converters.hf_side_files import hf_side_files

        tokenizer = self.path / TOKENIZER
        if not tokenizer.is_file():
            raise InputMissing(f"{tokenizer} does not exist", hint="copy Meta's tokenizer.model beside the weights")
        return hf_side_files(self.arch, tokenizer.read_bytes(), str(tokenizer))


def open_meta(path: Path) -> MetaReader:
    """Open a folder in Meta's layout. Raises InputMissing or CheckpointError; only headers are read."""
    return MetaReader(path)


def _files(path: Path) -> list[str]:
    """consolidated.00.pth, 01, …; a gap in the numbers is a file that is missing."""
    found = sorted(file.name for file in path.glob("consolidated.*.pth"))
    wanted = [file_name(rank) for rank in range(len(found))]
    if found != wanted:
        missing = sorted(set(wanted) - set(found))
        raise InputMissing(
            f"{path} has {', '.join(found)}: {', '.join(missing)} is missing", hint="finish the download first"
        )
    return found


def _dtype(file: PthFile) -> str:
    """That of the embedding; every other tensor must have it, too."""
    tensor = file.tensors.get("tok_embeddings.weight")
    if tensor is None or tensor.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise CheckpointError(
            f"{file.path} has no tok_embeddings.weight in bfloat16, float16 or float32",
            hint="give a folder of Meta's Llama 4 checkpoints",
        )
    return str(tensor.dtype).removeprefix("torch.")


def _side_files(path: Path) -> list[Path]:
    return sorted({file for pattern in SIDE_FILES for file in path.glob(pattern) if file.is_file()})


def _scales(path: Path, files: Sequence[PthFile]) -> dict[Path, dict[str, torch.Tensor]]:
    """File → stored name of an expert weight → its scales [E, rows]; {} where nothing is FP8."""
    if any(path.glob("int4_scales_*.pt")):
        raise CheckpointError(f"{path} holds Meta's INT4 weights, which cannot be read", hint="use the bf16 checkpoint")
    eights = {name for file in files for name, tensor in file.tensors.items() if tensor.dtype == FP8}
    if not eights:
        return {}
    found = {}
    for rank, file in enumerate(files):
        scales = load_small(path / f"fp8_scales_{rank}.pt")
        found[file.path] = {name: _scale_of(path, rank, name, scales, file) for name in sorted(eights)}
    return found


def _scale_of(path: Path, rank: int, name: str, scales: Any, file: PthFile) -> torch.Tensor:
    where, match = path / f"fp8_scales_{rank}.pt", _EXPERT.fullmatch(name)
    key = f"{match[1]}.{SCALE_NAMES.get(match[2])}" if match else name
    scale = scales.get(key) if isinstance(scales, Mapping) else None
    stored = file.tensors.get(name)
    if not isinstance(scale, torch.Tensor) or scale.dim() != 2 or stored is None or not scale.is_floating_point():
        raise CheckpointError(f"{where} has no scales {key!r} [experts, rows] for {name}", hint="download it again")
    if scale.shape[1] != stored.shape[-1] or stored.shape[0] % scale.shape[0]:
        raise CheckpointError(f"{where}: {key!r} is {list(scale.shape)}, which does not fit {list(stored.shape)}")
    return scale
