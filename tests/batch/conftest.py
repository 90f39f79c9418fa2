"""What tests of several folders share."""

from tests.triton_device import device, poisoned  # noqa: F401
