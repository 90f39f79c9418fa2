"""Image features and multi-image prompts against transformers, float32."""

import numpy as np
import pytest
import torch

from batch.requests import ImageTiles
from l4tool.core.errors import UsageError
from tests.batch.model.driver import Driver, Row, ours
from tests.batch.model.test_text_parity import TOLERANCE, difference, random_ids, their_logits


def picture(arch, grid, seed):
    rows, columns = grid
    tiles = rows * columns + (1 if rows * columns > 1 else 0)
    shape = (tiles, 3, arch.vision.image_size, arch.vision.image_size)
    return ImageTiles(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8), grid)


def pixel_values(images):
    pixels = torch.from_numpy(np.concatenate([image.pixels for image in images]))
    return (pixels.float() / 255 - 0.5) / 0.5


@pytest.mark.parametrize("grid", [(1, 1), (2, 1), (2, 3)])
def test_features(pair, grid):
    model, reference = pair
    image = picture(model.arch, grid, seed=sum(grid))
    (features,) = model.encode_images([image])
    with torch.inference_mode():
        encoded = reference.get_image_features(pixel_values([image])).last_hidden_state
        expected = reference.multi_modal_projector(encoded.flatten(0, 1))
    assert features.shape == (len(image.pixels) * model.arch.vision.tokens_per_tile, model.arch.text.hidden_size)
    assert difference(features, expected) < TOLERANCE


def test_features_do_not_depend_on_other_pictures(scout):
    images = [picture(scout.arch, grid, seed) for seed, grid in enumerate([(1, 1), (1, 2), (2, 2)])]
    together = scout.encode_images(images)
    for image, features in zip(images, together, strict=True):
        assert torch.equal(scout.encode_images([image])[0], features)


@pytest.mark.parametrize("piece", [10**9, 5])
def test_several_images_in_one_prompt(pair, piece):
    model, reference = pair
    images = [picture(model.arch, grid, seed) for seed, grid in enumerate([(1, 1), (2, 1), (2, 2)])]
    patch, ids = model.arch.image_token_id, random_ids(9, seed=0)
    features: dict[int, torch.Tensor] = {}
    for image, encoded in zip(images, model.encode_images(images), strict=True):
        for feature in encoded:
            features[len(ids)] = feature
            ids.append(patch)
        assert len(encoded) == len(image.pixels) * model.arch.vision.tokens_per_tile
        ids += random_ids(6, seed=len(ids))
    logits = Driver(model).logits(Row(ids, features), piece)
    expected = their_logits(reference, ids, pixel_values=pixel_values(images))
    assert difference(logits, expected) < TOLERANCE


def test_text_only_checkpoint_refuses_images(scout, scout_tiny_text):
    with pytest.raises(UsageError, match="no vision tower"):
        ours(scout_tiny_text).encode_images([picture(scout.arch, (1, 1), 0)])
