"""Pictures on the way into the model: which prompt tokens they stand for, and their features while these are of use."""

from __future__ import annotations

import itertools
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, cast

import numpy as np
import torch

from batch.engine.failures import is_out_of_memory
from batch.model.vision import VisionModel
from batch.requests import ImageTiles
from l4tool.core.console import note

if TYPE_CHECKING:
    from batch.model.model import Model

Encode = Callable[[list[ImageTiles]], list[torch.Tensor]]
TILES_AT_ONCE = 32  # on CUDA: about 20,000 rows


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
        begin, stop = self._between(first, last)
        missing = self._missing(start, end)
        if missing:
            self._features.update(zip(missing, encode([self.images[i] for i in missing]), strict=True))
        pieces = []
        for i in range(begin, stop):
            if i in self._features:
                base = self.bounds[i]
                pieces.append(self._features[i][max(first - base, 0) : last - base])
        return self.positions[first:last] - start, pieces

    def missing(self, start: int, end: int) -> list[ImageTiles]:
        """The images that `slice(start, end, …)` would have to encode."""
        return [self.images[i] for i in self._missing(start, end)]

    def _missing(self, start: int, end: int) -> list[int]:
        first, last = np.searchsorted(self.positions, [start, end])
        places = range(*self._between(first, last)) if first < last else ()
        return [i for i in places if i not in self._features and self.bounds[i] < self.bounds[i + 1]]

    def forget(self, num_computed: int) -> None:
        """Drop the features of images whose tokens all lie before `num_computed`."""
        done = np.searchsorted(self.positions, num_computed)
        for i in [i for i in self._features if self.bounds[i + 1] <= done]:
            del self._features[i]

    def num_before(self, num_tokens: int) -> int:
        """How many images have all their tokens among the first `num_tokens`."""
        done = np.searchsorted(self.positions, num_tokens)
        return int(np.searchsorted(self.bounds[1:], done, side="right"))

    def identities(self, first: int, end: int, block_size: int) -> list[bytes]:
        """Per block first … end - 1: what stands behind its image tokens, as the images' hashes. Which of their rows
        follows from the blocks before."""
        cuts = np.searchsorted(self.positions, np.arange(first, end + 1) * block_size).tolist()
        return [self._identity(begin, stop) for begin, stop in itertools.pairwise(cuts)]

    def _identity(self, first: int, last: int) -> bytes:
        if first == last:
            return b""
        return b"".join(self.images[i].digest for i in range(*self._between(first, last)))

    def _between(self, first: int, last: int) -> tuple[int, int]:
        """The images that fill rows first … last - 1 of all feature rows, as a range."""
        begin = int(np.searchsorted(self.bounds, first, side="right")) - 1
        return begin, int(np.searchsorted(self.bounds, last, side="left"))

    @property
    def num_bytes(self) -> int:
        """Bytes of the features held now."""
        return sum(_bytes_of(features) for features in self._features.values())

    @property
    def pixel_bytes(self) -> int:
        """Bytes of the pictures themselves, kept until the sequence is over: a preempted one needs them again."""
        return sum(image.pixels.nbytes for image in self.images)


def encoder_of(model: Model, tiles_at_once: int | None = None) -> Encode:
    """The model's vision tower. On CUDA the pictures of a step, whoever asked for them, go through it in groups of at
    most `tiles_at_once` tiles (a picture is never divided); 1: each alone, so that none can depend on another.

    On a CPU each goes alone: one tile is 577 rows, enough for the products to run at their peak.
    """
    if tiles_at_once is None:
        tiles_at_once = TILES_AT_ONCE if model.device.type == "cuda" else 1
    if model.vision is None or model.is_streamed or tiles_at_once == 1:
        return model.encode_images
    return TileEncoder(cast("VisionModel", model.vision), tiles_at_once)


class TileEncoder:
    """The tower over pictures in groups of at most `tiles_at_once` tiles. Where memory runs out it takes half as many
    tiles from then on, parts of pictures, too."""

    def __init__(self, tower: VisionModel, tiles_at_once: int) -> None:
        self._tower = tower
        self._tiles_at_once = tiles_at_once
        self._most = sys.maxsize  # that were ever found to be too many, halved
        self.num_halved = 0

    @torch.inference_mode()
    def __call__(self, images: list[ImageTiles]) -> list[torch.Tensor]:
        """Each picture's features [·, H]."""
        found: list[torch.Tensor] = []
        for group in self._groups(images):
            features = self._encode(torch.from_numpy(np.concatenate([image.pixels for image in group])))
            parts = features.split([len(image.pixels) * self._tower.arch.tokens_per_tile for image in group])
            found += [part.clone() for part in parts] if len(parts) > 1 else parts  # a view would keep the whole group
        return found

    def _groups(self, images: list[ImageTiles]) -> Iterator[list[ImageTiles]]:
        group: list[ImageTiles] = []
        for image in images:
            tiles = sum(len(one.pixels) for one in (*group, image))
            if group and tiles > min(self._tiles_at_once, self._most):
                yield group
                group = []
            group.append(image)
        if group:
            yield group

    def _encode(self, tiles: torch.Tensor) -> torch.Tensor:
        """Features of tiles uint8 [N, 3, S, S]: tiles do not look at each other."""
        done: list[torch.Tensor] = []
        while len(tiles):
            part = tiles[: self._most]
            try:
                done.append(self._tower.encode(part))
            except Exception as error:
                if len(part) == 1 or not is_out_of_memory(error):
                    raise
                self.num_halved += 1
                self._most = len(part) // 2
                note(f"{len(part)} tiles of pictures ran out of memory: from now on {self._most} at a time")
            else:
                tiles = tiles[len(part) :]
        return done[0] if len(done) == 1 else torch.cat(done)


class FeatureCache:
    """Encodes images, each once while its features are among the `max_bytes` used last; 0 bytes: every time."""

    def __init__(self, encode: Encode, max_bytes: int) -> None:
        self._encode = encode
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.num_encoded = 0
        self.num_saved = 0
        self._features: OrderedDict[bytes, torch.Tensor] = OrderedDict()  # by pixel hash, last used last

    def encode(self, images: list[ImageTiles]) -> list[torch.Tensor]:
        """Each image's features [·, H]."""
        if not self.max_bytes:
            self.num_encoded += len(images)
            return self._encode(images)
        missing = {image.digest: image for image in images if image.digest not in self._features}
        known = {image.digest: self._features[image.digest] for image in images if image.digest not in missing}
        new = dict(zip(missing, self._encode_new(list(missing.values())), strict=True)) if missing else {}
        self.num_encoded += len(new)
        self.num_saved += len(images) - len(new)
        found = [new[i.digest] if i.digest in new else known[i.digest] for i in images]
        for image, features in zip(images, found, strict=True):
            self._keep(image.digest, features)
        return found

    def _encode_new(self, images: list[ImageTiles]) -> list[torch.Tensor]:
        try:
            return self._encode(images)
        except Exception as error:
            if not self._features or not is_out_of_memory(error):
                raise
            self.clear()
        return self._encode(images)

    @property
    def num_halved(self) -> int:
        """How often fewer tiles had to go together."""
        return getattr(self._encode, "num_halved", 0)

    def clear(self) -> None:
        self._features.clear()
        self.num_bytes = 0

    def _keep(self, digest: bytes, features: torch.Tensor) -> None:
        if digest not in self._features:
            self.num_bytes += _bytes_of(features)
        self._features[digest] = features
        self._features.move_to_end(digest)
        while self.num_bytes > self.max_bytes:
            _, dropped = self._features.popitem(last=False)
            self.num_bytes -= _bytes_of(dropped)


def _bytes_of(features: torch.Tensor) -> int:
    return features.numel() * features.element_size()
