"""Pictures of several sequences that are encoded together: the tower's own result for each alone is the oracle."""

import numpy as np
import pytest
import torch

from batch.engine.engine import Engine, EngineConfig
from batch.engine.image_features import encoder_of
from batch.requests import ImageTiles, SamplingParams


def pictures(arch, tiles, seed=0):
    rng = np.random.default_rng(seed)
    size = arch.vision.image_size
    return [ImageTiles(rng.integers(0, 256, (n, 3, size, size), dtype=np.uint8), (1, n)) for n in tiles]


@pytest.mark.parametrize("tiles_at_once", [2, 3, 5, 100])
def test_groups_of_pictures_give_each_its_own_features(scout, monkeypatch, tiles_at_once):
    images = pictures(scout.arch, (1, 2, 1, 1, 4, 1))
    calls = []
    encode = type(scout.vision).encode
    monkeypatch.setattr(
        type(scout.vision), "encode", lambda tower, pixels: calls.append(len(pixels)) or encode(tower, pixels)
    )
    found = encoder_of(scout, tiles_at_once)(images)
    assert sum(calls) == 10 and all(count <= max(tiles_at_once, 4) for count in calls)
    assert len(calls) == {2: 5, 3: 4, 5: 2, 100: 1}[tiles_at_once]
    for image, features in zip(images, found, strict=True):
        torch.testing.assert_close(features, scout.encode_images([image])[0], rtol=1e-4, atol=1e-5)


def test_on_a_cpu_every_picture_goes_alone(scout):
    assert encoder_of(scout) == scout.encode_images


def test_a_step_asks_once_for_the_pictures_of_all_its_sequences(scout, monkeypatch):
    engine = Engine(scout, EngineConfig(256, 8, 16 << 20, 16), eos_token_ids=())
    calls = []
    encode = engine.features.encode
    monkeypatch.setattr(engine.features, "encode", lambda images: calls.append(len(images)) or encode(images))
    token, per_tile = scout.arch.image_token_id, scout.arch.vision.tokens_per_tile
    for name, image in enumerate(pictures(scout.arch, (1, 1, 1))):
        engine.add(name, [1, *[token] * per_tile, 2 + name], SamplingParams(2), (image,))
    while engine.has_work:
        engine.step()
    assert calls == [3]
