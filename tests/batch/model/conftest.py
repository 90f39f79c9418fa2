"""The same checkpoint in our model and in transformers, float32."""

import pytest

from tests.batch.model.driver import ours, theirs
from tests.threads import one_thread  # noqa: F401


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
