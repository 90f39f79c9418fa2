"""`open_checkpoint(path)`: the one way in. config.json and tensor names tell the layout, file names never do."""

from __future__ import annotations

from pathlib import Path

from converters.folder import CheckpointFolder
from converters.hf import HFReader
from converters.names import PER_EXPERT, canonical_rows, hf_rows
from converters.reader import Reader
from l4tool.core.errors import CheckpointError


def open_checkpoint(path: str | Path) -> Reader:
    """Open a checkpoint folder: headers only, every name, shape, dtype and file size checked.

    Raises InputMissing (no folder, file or shard) or CheckpointError (anything wrong in it).
    """
    path = Path(path)
    if (path / "quantization_map.json").exists():
        raise CheckpointError(
            f"{path} is in optimum-quanto's format (quantization_map.json), which this command cannot read",
            hint="load it with optimum.quanto.requantize, or quantize the original again with --int4 or --fp8",
        )
    folder = CheckpointFolder(path)
    if folder.quantization is not None:
        from converters.compressed import CompressedReader

        return CompressedReader(folder)
    if _is_fused(folder):
        return HFReader(folder, hf_rows(folder.arch))
    return HFReader(folder, canonical_rows(folder.arch), layout=PER_EXPERT)


def _is_fused(folder: CheckpointFolder) -> bool:
    """Fused unless per-expert names are there; without MoE layers both tables are the same."""
    return not any(".experts." in name and name.endswith(".weight") for name in folder.stored)
