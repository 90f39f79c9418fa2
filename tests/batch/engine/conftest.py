"""The tiny checkpoints as our models and as transformers' models, both in float32."""

import pytest
import torch
from transformers import Llama4ForConditionalGeneration

from batch.model.model import load_model
from converters.detect import open_checkpoint
from tests.threads import one_thread  # noqa: F401


@pytest.fixture(scope="package")
def scout(scout_tiny):
    return load_model(open_checkpoint(scout_tiny), "cpu", "float32")


@pytest.fixture(scope="package")
def maverick(maverick_tiny):
    return load_model(open_checkpoint(maverick_tiny), "cpu", "float32")


def load_reference(path):
    return Llama4ForConditionalGeneration.from_pretrained(path, dtype=torch.float32).eval()


@pytest.fixture(scope="package")
def scout_reference(scout_tiny):
    return load_reference(scout_tiny)


@pytest.fixture(scope="package")
def maverick_reference(maverick_tiny):
    return load_reference(maverick_tiny)
