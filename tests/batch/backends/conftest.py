"""One tiny model in float32 and its tokenizer."""

import pytest
import torch

from batch.model.model import load_model
from batch.tokenizer import Tokenizer
from converters.detect import open_checkpoint


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    """Tiny models run faster on one thread, above all on a machine where others run too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="package")
def model(scout_tiny):
    return load_model(open_checkpoint(scout_tiny), "cpu", "float32")


@pytest.fixture(scope="package")
def tokenizer(scout_tiny):
    return Tokenizer.load(scout_tiny)
