"""The ways in: `open_checkpoint` for what can be run and quantized, `open_source` for every layout there is.

config.json and tensor names tell the layouts of safetensors files apart, file names never do.
"""

from __future__ import annotations

import re
from pathlib import Path

from converters.compressed import open_compressed
from converters.findings import Report, raise_first
from converters.folder import CheckpointFolder
from converters.gguf import is_gguf, open_gguf
from converters.meta import is_meta, open_meta
from converters.names import MULTIMODAL_HF, PER_EXPERT, TEXT_HF, canonical_rows, hf_rows
from converters.reader import Reader
from converters.table_reader import TableReader
from l4tool.core.errors import CheckpointError

PER_EXPERT_NAME = re.compile(r"\.experts\.\d+\.")


def open_checkpoint(path: str | Path, report: Report = raise_first, foreign: bool = False) -> TableReader:
    """Open a checkpoint folder: headers only, every name, shape, dtype and file size checked.

    `foreign`: quantized in formats that can only be dequantized, too.

    Raises InputMissing (no folder, file or shard) or CheckpointError (anything wrong in it). A `report` that does not
    raise gets everything that is wrong with files, names, shapes and dtypes; what is sound is then read.
    """
    path = Path(path)
    other = foreign_layout(path)
    if other is not None:
        raise CheckpointError(
            f"{path} is in {other}, which has to be converted first",
            hint=f"l4tool convert {path} -o OUT --to hf",
        )
    if (path / "quantization_map.json").exists():
        raise CheckpointError(
            f"{path} is in optimum-quanto's format (quantization_map.json), which this command cannot read",
            hint="load it with optimum.quanto.requantize, or quantize the original again with --int4 or --fp8",
        )
    folder = CheckpointFolder(path, report)
    fused = _is_fused(folder)
    rows = hf_rows(folder.arch) if fused else canonical_rows(folder.arch)
    if folder.quantization is not None:
        return open_compressed(folder, rows, foreign)
    layout = PER_EXPERT if not fused else MULTIMODAL_HF if folder.arch.vision is not None else TEXT_HF
    return TableReader(folder, rows, layout)


def open_source(path: Path) -> Reader:
    """Open a checkpoint in any layout, for whoever reads it tensor by tensor. Raises as `open_checkpoint`."""
    if is_meta(path) and not (path / "config.json").is_file():
        return open_meta(path)
    if is_gguf(path):
        return open_gguf(path)
    return open_checkpoint(path, foreign=True)


def foreign_layout(path: Path) -> str | None:
    """The layout of a checkpoint that is not Hugging Face's, in words; None for any other path."""
    if is_meta(path) and not (path / "config.json").is_file():
        return "Meta's layout (params.json, consolidated.*.pth)"
    if is_gguf(path):
        return "GGUF"
    return None


def _is_fused(folder: CheckpointFolder) -> bool:
    """Fused unless per-expert names are there; without MoE layers both tables are the same."""
    return not any(PER_EXPERT_NAME.search(name) for name in folder.stored)
