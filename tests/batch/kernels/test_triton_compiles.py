"""The Triton kernels as an H100 would run them, compiled where there is none."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SHARED_BYTES = 227 << 10  # of one multiprocessor
MOST_STACK_BYTES = 32  # more would be registers that are spilled in inner loops
MOST_FLOAT32_STACK_BYTES = 2048  # of each thread that a card can run at a time: 550 MB in all


@pytest.mark.skipif(platform.system() != "Linux", reason="Triton is for Linux")
@pytest.mark.parametrize("part, tensor_core", [
    ("experts", {"_product": {"wgmma"}}), ("attention", {"_prefill": {"wgmma"}, "_decode": {"mma"}}), ("fused", {}),
    ("float32", {}), ("quantize", {}), ("sampling", {}),
])  # fmt: skip
def test_kernels_compile(part, tensor_core, tmp_path):
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.batch.kernels.compiled", part]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert kernels
    most = MOST_FLOAT32_STACK_BYTES if part == "float32" else MOST_STACK_BYTES
    for kernel in kernels:
        assert kernel["shared_bytes"] <= SHARED_BYTES and kernel["stack_bytes"] <= most, kernel
        if kernel["kernel"] in tensor_core:
            assert {kernel["tensor_core"]} == tensor_core[kernel["kernel"]], kernel
