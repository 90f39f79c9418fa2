"""Meta's own model code (llama-models), on the CPU, as any rank of a tensor-parallel group."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch


@contextlib.contextmanager
def parallel(size: int = 1, rank: int = 0, init: str | None = None) -> Iterator[None]:
    """fairscale's model-parallel state as rank `rank` of `size`: alone with torch's fake process group, where
    collectives do nothing, or really with gloo through the file `init`. Skips where fairscale is not there."""
    states = pytest.importorskip("fairscale.nn.model_parallel.initialize")
    from torch import distributed

    if init is None:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    else:
        distributed.init_process_group("gloo", init_method=f"file://{init}", rank=rank, world_size=size)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            states.initialize_model_parallel(size)
        yield
    finally:
        states.destroy_model_parallel()
        distributed.destroy_process_group()


def load(folder: Path, rank: int = 0) -> dict[str, torch.Tensor]:
    """One file of a checkpoint, as torch reads it."""
    contents: dict[str, torch.Tensor] = torch.load(folder / f"consolidated.{rank:02d}.pth", weights_only=True)
    return contents


def transformer(folder: Path, rank: int = 0) -> Any:
    """Meta's Transformer in float32 with one file's weights, loaded strictly; inside `parallel`."""
    from llama_models.llama4.args import ModelArgs
    from llama_models.llama4.model import Transformer

    args = ModelArgs(**json.loads((folder / "params.json").read_text()), max_seq_len=128, max_batch_size=1)
    real, torch.Tensor.cuda = torch.Tensor.cuda, lambda self, *a, **k: self  # its KV cache is born on the GPU
    try:
        model = Transformer(args).float().eval()
    finally:
        torch.Tensor.cuda = real
    model.load_state_dict({name: tensor.float() for name, tensor in load(folder, rank).items()}, strict=True)
    return model


def logits(model: Any, ids: list[int]) -> torch.Tensor:
    """[tokens, V] of one sequence."""
    from llama_models.llama4.datatypes import TransformerInput

    with torch.inference_mode():
        return model(TransformerInput(tokens=torch.tensor([ids]), tokens_position=0)).logits[0]
