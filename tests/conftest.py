"""Shared, read-only checkpoints: made once per test process, in about two seconds each."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch

os.environ.pop("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", None)  # some containers set it: float32 would not be float32
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is first imported, whoever does that

from tests import checkpoints

NEEDED_BYTES = 2 * 10**9  # for what the tests write; they delete it as they go


def pytest_sessionstart(session: pytest.Session) -> None:
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if free < NEEDED_BYTES:
        pytest.exit(f"{free / 1e9:.1f} GB free in {tempfile.gettempdir()}; the tests need 2: set TMPDIR", returncode=3)


@pytest.fixture(scope="session")
def scout_tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scout-like: 4 MoE layers of 4 experts, QK norm, llama3 rope scaling, vision tower; several shards."""
    return checkpoints.make(tmp_path_factory.mktemp("scout") / "model")


@pytest.fixture(scope="session")
def maverick_tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Maverick-like: MoE on every second layer, dense layers between, no QK norm, plain rope."""
    return checkpoints.make(tmp_path_factory.mktemp("maverick") / "model", arch="maverick")


@pytest.fixture(scope="session")
def scout_tiny_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scout-like, text only (`Llama4ForCausalLM`)."""
    return checkpoints.make(tmp_path_factory.mktemp("text") / "model", text_only=True)
