"""The images of one sequence: which prompt tokens they stand for, and their features while these are needed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from batch.requests import ImageTiles

Encode = Callable[[list[ImageTiles]], list[torch.Tensor]]


class ImageMismatch(ValueError):
    """The prompt's image tokens and the images do not add up."""


class SequenceImages:
    """Encodes each image when a prefill piece first needs it and forgets it once the prefill has passed it.

    `positions` int64 [F]: where the image tokens are; `bounds` int64 [images + 1]: image i fills the tokens
    positions[bounds[i]:bounds[i + 1]]. So a sequence holds features of no more than one piece and one image.
    """

    def __init__(
        self, prompt: list[int], images: tuple[ImageTiles, ...], image_token_id: int, tokens_per_tile: int
    ) -> None:
        self.images = images
        self.positions = np.flatnonzero(np.asarray(prompt, np.int64) == image_token_id)
        rows = [len(image.pixels) * tokens_per_tile for image in images]
        self.bounds = np.concatenate([[0], np.cumsum(rows, dtype=np.int64)])
        self._features: dict[int, torch.Tensor] = {}
        if self.bounds[-1] != len(self.positions):
            raise ImageMismatch(
                f"the prompt has {len(self.positions)} image tokens, but its {len(images)} images have "
                f"{sum(len(image.pixels) for image in images)} tiles, which are {self.bounds[-1]} tokens"
            )

    def slice(self, start: int, end: int, encode: Encode) -> tuple[np.ndarray, list[torch.Tensor]]:
        """For prompt tokens [start, end): the rows that are image tokens, counted from `start` (int64 [P]), and
        their features, in pieces whose lengths sum to P, each [·, H]."""
        first, last = np.searchsorted(self.positions, [start, end])
        if first == last:
            return np.empty(0, np.int64), []
        begin = int(np.searchsorted(self.bounds, first, side="right")) - 1
        stop = int(np.searchsorted(self.bounds, last, side="left"))
        missing = [i for i in range(begin, stop) if i not in self._features and self.bounds[i] < self.bounds[i + 1]]
        if missing:
            self._features.update(zip(missing, encode([self.images[i] for i in missing]), strict=True))
        pieces = []
        for i in range(begin, stop):
            if i in self._features:
                base = self.bounds[i]
                pieces.append(self._features[i][max(first - base, 0) : last - base])
        return self.positions[first:last] - start, pieces

    def forget(self, num_computed: int) -> None:
        """Drop the features of images whose tokens all lie before `num_computed`."""
        done = np.searchsorted(self.positions, num_computed)
        for i in [i for i in self._features if self.bounds[i + 1] <= done]:
            del self._features[i]

    @property
    def num_bytes(self) -> int:
        """Bytes of the features held now."""
        return sum(f.numel() * f.element_size() for f in self._features.values())

    @property
    def pixel_bytes(self) -> int:
        """Bytes of the pictures themselves, kept until the sequence is over: a preempted one needs them again."""
        return sum(image.pixels.nbytes for image in self.images)
