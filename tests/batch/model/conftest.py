"""The same checkpoint in our model and in transformers, float32."""

import pytest
import torch

from tests.batch.model.driver import ours, theirs


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    """Tiny models run faster on one thread, above all where other processes share the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", params=["scout_tiny", "maverick_tiny"])
def pair(request):
    """(our model, transformers' model) of one architecture."""
    folder = request.getfixturevalue(request.param)
    return ours(folder), theirs(folder)


@pytest.fixture(scope="session")
def scout(scout_tiny):
    return ours(scout_tiny)


@pytest.fixture(scope="session")
def maverick(maverick_tiny):
    return ours(maverick_tiny)
