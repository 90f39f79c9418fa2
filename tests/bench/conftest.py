"""Where kernels run in tests of benchmarks."""

from tests.triton_device import device  # noqa: F401
