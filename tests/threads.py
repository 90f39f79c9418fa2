"""A fixture for packages of tests whose models are tiny: `from tests.threads import one_thread`."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    """Tiny models run faster on one thread, above all on a machine where others run too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
