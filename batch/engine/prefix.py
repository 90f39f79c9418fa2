"""What a KV block holds, as a key: blocks with equal keys hold equal keys and values. No tensors here.

A block's keys and values depend on every token up to its last, on where they stand, and on the pictures behind the
image tokens. Each key hashes the key of the block before it, so it stands for all of that.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from batch.engine.image_features import SequenceImages

KEY_BYTES = 16


class PrefixKeys:
    """The keys of one sequence's whole blocks, in order; each is computed once. `images` are the sequence's."""

    def __init__(self, block_size: int, images: SequenceImages | None) -> None:
        self.block_size = block_size
        self._images = images
        self._keys: list[bytes] = []

    def of(self, tokens: list[int]) -> list[bytes]:
        """Keys of the whole blocks of `tokens`, which may only have grown at the end since the last call."""
        size, first, end = self.block_size, len(self._keys), len(tokens) // self.block_size
        if first < end:
            raw = np.array(tokens[first * size : end * size], np.int32).tobytes()
            pictures = [b""] * (end - first) if self._images is None else self._images.identities(first, end, size)
            parent = self._keys[-1] if self._keys else b""
            for i, picture in enumerate(pictures):
                ids = raw[4 * size * i : 4 * size * (i + 1)]
                parent = blake2b(parent + ids + picture, digest_size=KEY_BYTES).digest()
                self._keys.append(parent)
        return self._keys
