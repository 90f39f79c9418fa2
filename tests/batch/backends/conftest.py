"""One tiny model in float32 and its tokenizer."""

import pytest

from batch.model.model import load_model
from batch.tokenizer import Tokenizer
from converters.detect import open_checkpoint
from tests.threads import one_thread  # noqa: F401


@pytest.fixture(scope="package")
def model(scout_tiny):
    return load_model(open_checkpoint(scout_tiny), "cpu", "float32")


@pytest.fixture(scope="package")
def tokenizer(scout_tiny):
    return Tokenizer.load(scout_tiny)
