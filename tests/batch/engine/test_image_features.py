"""Pictures of several sequences that are encoded together: the tower's own result for each alone is the oracle."""

import numpy as np
import pytest
import torch

from batch.engine.engine import Engine, EngineConfig
from batch.engine.image_features import FeatureCache, encoder_of
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


@pytest.fixture
def few_tiles_fit(scout, monkeypatch):
    """A device that has memory for so many tiles: (how many, sizes that it was asked for)."""
    room, asked, encode = [3], [], type(scout.vision).encode

    def limited(tower, pixels):
        asked.append(len(pixels))
        if len(pixels) > room[0]:
            raise torch.OutOfMemoryError("none left")
        return encode(tower, pixels)

    monkeypatch.setattr(type(scout.vision), "encode", limited)
    return room, asked


def test_where_memory_runs_out_fewer_tiles_go_together(scout, few_tiles_fit, capsys):
    images = pictures(scout.arch, (1, 2, 5, 1))
    few_tiles_fit[0][0] = 100
    expected = [scout.encode_images([image])[0] for image in images]
    few_tiles_fit[0][0] = 3
    few_tiles_fit[1].clear()
    encode = encoder_of(scout, 32)
    for _ in range(2):
        for ours, theirs in zip(encode(images), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    # All nine, then half as many until it fits, in groups from the second call on.
    assert few_tiles_fit[1] == [9, 4, 2, 2, 2, 2, 1, 1, 2, 2, 2, 1, 1]
    assert capsys.readouterr().err.count("at a time") == 2


def test_features_that_are_kept_make_room_for_others(scout, few_tiles_fit):
    first, second = pictures(scout.arch, (1, 1))
    cache = FeatureCache(encoder_of(scout, 32), 1 << 20)
    kept = cache.encode([first])[0]
    few_tiles_fit[0][0] = 0
    clear = cache.clear

    def make_room():
        clear()
        few_tiles_fit[0][0] = 1

    cache.clear = make_room
    both = cache.encode([first, second])
    assert both[0] is kept and both[1].shape == kept.shape and cache.num_encoded == 2


def test_a_picture_for_which_there_is_no_memory_fails_alone(scout, few_tiles_fit):
    few_tiles_fit[0][0] = 0
    engine = Engine(scout, EngineConfig(64, 8, 16 << 20, 16), eos_token_ids=())
    engine.features = engine.runner.features = FeatureCache(encoder_of(scout, 32), 0)
    token, per_tile = scout.arch.image_token_id, scout.arch.vision.tokens_per_tile
    (picture,) = pictures(scout.arch, (1,))
    lost = engine.add(0, [1, *[token] * per_tile, 2], SamplingParams(2), (picture,))
    other = engine.add(1, [1, 2, 3], SamplingParams(2))
    while engine.has_work:
        engine.step()
    assert lost.error[0] == "image_error" and "none left" in lost.error[1] and len(other.output) == 2


def test_what_is_kept_of_a_group_is_what_is_counted(scout):
    images = pictures(scout.arch, (1, 1, 2))
    for features in encoder_of(scout, 32)(images):
        assert features.untyped_storage().nbytes() == features.nbytes
