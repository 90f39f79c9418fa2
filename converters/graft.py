"""A text-only checkpoint with the vision tower of another: what a fine-tune of the text model needs to see again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from converters.names import TEXT_PREFIX, Part
from converters.quant_config import LinearFormat
from converters.reader import Extent, Reader, TensorInfo
from l4tool.core.arch import Arch
from l4tool.core.errors import UsageError

VISION_ONLY = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


class Grafted(Reader):
    """`text`'s language model with `vision`'s tower and projector; `path`, licence and side files are `text`'s.

    Raises UsageError where the two do not fit.
    """

    def __init__(self, text: Reader, vision: Reader) -> None:
        self._text, self._vision = text, vision
        _require_fit(text, vision)
        self.path, self.dtype, self.layout = text.path, text.dtype, vision.layout
        self.computes = text.computes or vision.computes
        self.quantization: dict[str, Any] | None = text.quantization
        self.arch: Arch = replace(vision.arch, text=text.arch.text)
        own = {key: value for key, value in text.config.items() if key not in ("architectures", "quantization_config")}
        whole = {key: value for key, value in vision.config.items() if key != "quantization_config"}
        self.config: dict[str, Any] = {**whole, "text_config": own}

    def tensors(self) -> dict[str, TensorInfo]:
        seen = {name: info for name, info in self._vision.tensors().items() if not name.startswith(TEXT_PREFIX)}
        return seen | self._text.tensors()

    def _of(self, name: str) -> Reader:
        return self._text if name.startswith(TEXT_PREFIX) else self._vision

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        return self._of(name).read(name, rows)

    def pieces(self, name: str, rows: slice) -> list[tuple[Part, torch.Tensor]]:
        return self._of(name).pieces(name, rows)

    def extent(self, name: str) -> Extent:
        return self._of(name).extent(name)

    def from_bytes(self, name: str, raw: torch.Tensor) -> torch.Tensor:
        return self._of(name).from_bytes(name, raw)

    def prefetch(self, name: str, rows: slice | None = None) -> None:
        self._of(name).prefetch(name, rows)

    def release(self, name: str) -> None:
        self._of(name).release(name)

    def linear_format(self, prefix: str) -> LinearFormat | None:
        return self._of(prefix).linear_format(prefix)

    def side_files(self) -> list[Path]:
        """The text model's, and the processor's files that only the other has."""
        own = self._text.side_files()
        names = {path.name for path in own}
        return own + [p for p in self._vision.side_files() if p.name in VISION_ONLY and p.name not in names]

    def made_files(self) -> dict[str, bytes]:
        more = {name: data for name, data in self._vision.made_files().items() if name in VISION_ONLY}
        return more | self._text.made_files()

    def weight_files(self) -> list[Path]:
        return self._text.weight_files() + self._vision.weight_files()

    def forget(self, file: Path) -> None:
        (self._text if file in self._text.weight_files() else self._vision).forget(file)

    def close(self) -> None:
        self._text.close()
        self._vision.close()


def _require_fit(text: Reader, vision: Reader) -> None:
    if text.arch.vision is not None:
        raise UsageError(f"{text.path} has a vision tower of its own", hint="leave --vision-from away")
    if vision.arch.vision is None:
        raise UsageError(f"{vision.path} has no vision tower", hint="--vision-from takes a multimodal checkpoint")
    for what in ("hidden_size", "vocab_size"):
        ours, theirs = getattr(text.arch.text, what), getattr(vision.arch.text, what)
        if ours != theirs:
            raise UsageError(
                f"{vision.path} has {what} {theirs}, {text.path} has {ours}: its projector does not fit",
                hint="take the vision tower from the model that the text model was made from",
            )
    if text.dtype != vision.dtype:
        raise UsageError(
            f"{vision.path} is {vision.arch.dtype}, {text.path} is {text.arch.dtype}",
            hint=f"first: l4tool convert {vision.path} -o OTHER --to hf --dtype …",
        )
