"""The compiled kernels on CPUs with less than this one: their own tests again, compiled for those."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CODE = """
import sys, pytest
from batch.kernels import vector_ir
vector_ir.has_avx512_bf16 = lambda: False  # it asks the host; the rest follows numba's target
quant = [f"tests/quant/test_{name}.py" for name in ("kernels", "sweep", "dequantize")]
sys.exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "tests/batch/kernels", *quant]))
"""
TARGETS = [("x86-64", "+sse2"), ("haswell", "+avx2,+fma,+f16c,+bmi,+bmi2")]


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the targets are x86-64 processors")
@pytest.mark.parametrize(("cpu", "features"), TARGETS)
def test_kernels_for_a_lesser_cpu(cpu, features, tmp_path):
    target = {"NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": features, "XDG_CACHE_HOME": str(tmp_path)}
    environment = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"} | target
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
