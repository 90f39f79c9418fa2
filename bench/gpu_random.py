"""Llama 4 of any size with random weights, made where they are needed: nothing is read, no host memory is taken."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from converters.config_only import ConfigOnly  # noqa: E402
from converters.quant_config import FP8_TOKEN, LinearFormat  # noqa: E402
from converters.reader import TensorInfo  # noqa: E402
from examples.make_checkpoint import full_config, text_config  # noqa: E402
from quant.schemes import Recipe, make_recipe  # noqa: E402

VISION_LAYERS = 34
SPREAD = 0.02  # of weights
FORMATS = {
    "int4": LinearFormat("int4", 4, "group", 128, True, None, True),
    "fp8": LinearFormat("fp8", 8, "channel", None, True, FP8_TOKEN, False),
}


def scout_config(layers: int = 48, experts: int = 16, vocab_size: int = 202048, tiny: bool = False) -> dict[str, Any]:
    """config.json of Scout as it is published, or of a tiny model of its kind."""
    preset = "tiny" if tiny else "scout-width"
    config = full_config(text_config(preset, "scout", layers, experts, vocab_size), preset, text_only=False)
    if not tiny:
        config["vision_config"]["num_hidden_layers"] = VISION_LAYERS
    return config


class RandomReader(ConfigOnly):
    """A checkpoint of this config.json's shapes in a scheme of `quantize`, or in bf16; every read draws new weights."""

    def __init__(self, config: dict[str, Any], scheme: str, device: torch.device, folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(config))
        super().__init__(path)
        self._device = device
        self._recipe: Recipe | None = None if scheme == "bf16" else make_recipe(scheme)
        self._tensors = {info.name: info for plain in super().tensors().values() for info in self._stored(plain)}

    def tensors(self) -> dict[str, TensorInfo]:
        return self._tensors

    def linear_format(self, prefix: str) -> LinearFormat | None:
        kind = "bf16" if self._recipe is None else self._recipe.kind_of(f"{prefix}.weight")
        return FORMATS.get(kind)

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        info = self._tensors[name]
        if info.dtype == torch.int32:
            made = torch.randint(-(2**31), 2**31 - 1, info.shape, dtype=torch.int32, device=self._device)
        elif name.endswith("norm.weight"):
            made = torch.ones(info.shape, dtype=info.dtype, device=self._device)
        elif name.endswith("weight_scale"):
            # Values under the scale spread like uniform nibbles, or like e4m3 of N(0, 1).
            spread = SPREAD / 4.6 if self._is_int4(name) else SPREAD
            made = torch.full(info.shape, spread, dtype=info.dtype, device=self._device)
        else:
            scale = 1.0 if info.dtype == torch.float8_e4m3fn else SPREAD
            made = torch.empty(info.shape, dtype=torch.bfloat16, device=self._device).normal_(0, scale).to(info.dtype)
        return made if rows is None else made[rows]

    def _is_int4(self, name: str) -> bool:
        form = self.linear_format(name.rpartition(".")[0])
        return form is not None and form.kind == "int4"

    def _stored(self, plain: TensorInfo) -> list[TensorInfo]:
        """What is stored of one tensor."""
        prefix = plain.name.removesuffix(".weight")
        form = self.linear_format(prefix)
        if form is None:
            return [plain]
        rows, columns = plain.shape
        size = form.group_size or columns
        shape, dtype = ((rows, columns // 8), torch.int32) if form.packed else (plain.shape, torch.float8_e4m3fn)
        scale = (rows, columns // size)
        return [
            replace(plain, name=f"{prefix}.{form.codes}", shape=shape, dtype=dtype, nbytes=_nbytes(shape, dtype)),
            replace(plain, name=f"{prefix}.weight_scale", shape=scale, nbytes=_nbytes(scale, plain.dtype)),
        ]


def _nbytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return shape[0] * shape[1] * dtype.itemsize
