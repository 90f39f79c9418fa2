"""Meta's prompt code, which imports torchvision for its pictures, without torchvision."""

import importlib
import sys
import types

import pytest


def pillow_torchvision():
    """torchvision's PIL path in a few lines: enough to run Meta's preprocessing without torchvision."""
    import numpy as np
    import torch
    from PIL import Image

    def resize(image, size, interpolation="bilinear"):
        height, width = size
        return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.BILINEAR)

    def to_tensor(image):
        return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).contiguous().float().div(255)

    def normalize(mean, std, inplace=True):
        shift, scale = torch.tensor(mean)[:, None, None], torch.tensor(std)[:, None, None]
        return lambda tensor: tensor.sub_(shift).div_(scale)

    def compose(steps):
        def run(value):
            for step in steps:
                value = step(value)
            return value

        return run

    top, transforms = types.ModuleType("torchvision"), types.ModuleType("torchvision.transforms")
    functional = types.ModuleType("torchvision.transforms.functional")
    functional.resize = resize
    transforms.functional, top.transforms = functional, transforms
    transforms.Compose, transforms.Normalize = compose, normalize
    transforms.ToTensor = lambda: to_tensor
    transforms.Resize = lambda size: lambda image: resize(image, size)
    transforms.InterpolationMode = types.SimpleNamespace(BILINEAR="bilinear")
    return {"torchvision": top, "torchvision.transforms": transforms, "torchvision.transforms.functional": functional}


def import_chat_format():
    """llama_models' chat_format module, over Pillow instead of torchvision."""
    from PIL import ImageFile

    patch = pytest.MonkeyPatch()
    for name, stand_in in pillow_torchvision().items():
        patch.setitem(sys.modules, name, stand_in)
    try:
        return importlib.import_module("llama_models.llama4.chat_format")
    finally:
        patch.undo()
        ImageFile.LOAD_TRUNCATED_IMAGES = False  # Meta's module switches it on for the whole process
