"""What quantize refuses before the first byte is written, beyond what every run does."""

from __future__ import annotations

from converters.reader import Reader
from l4tool.core.errors import CheckpointError, DeviceError


def source_usable(reader: Reader) -> None:
    """Raises CheckpointError for a checkpoint that is quantized already."""
    if reader.quantization is not None:
        method = reader.quantization.get("quant_method", "quantization_config")
        raise CheckpointError(
            f"{reader.path} is quantized already ({method})",
            hint="give the original bfloat16 checkpoint, or make it plain floats again: "
            f"l4tool convert {reader.path} -o OUT --to hf",
        )


def device_usable(device: str) -> None:
    """Raises DeviceError where torch has no such device."""
    if device == "cpu":
        return
    import torch

    if not torch.cuda.is_available():
        raise DeviceError(
            f"--device {device}: torch {torch.__version__} finds no CUDA device",
            hint="leave --device away to quantize on the CPU",
        )
