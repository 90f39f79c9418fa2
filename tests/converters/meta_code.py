"""Meta's own model code (llama-models), on the CPU with one tensor-parallel rank."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch


def transformer(params: dict[str, Any], max_seq_len: int = 128) -> Any:
    """Its Transformer with random weights, float32. Skips the test where llama-models or fairscale is not there."""
    pytest.importorskip("llama_models")
    parallel = pytest.importorskip("fairscale.nn.model_parallel.initialize")
    if not torch.distributed.is_initialized():
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK="0", WORLD_SIZE="1")
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    if not parallel.model_parallel_is_initialized():
        parallel.initialize_model_parallel(1)
    from llama_models.llama4.args import ModelArgs
    from llama_models.llama4.model import Transformer

    args = ModelArgs(**params, max_seq_len=max_seq_len, max_batch_size=1)
    real = torch.Tensor.cuda
    torch.Tensor.cuda = lambda self, *a, **k: self  # its caches go to a GPU, whatever there is
    try:
        return Transformer(args).eval()
    finally:
        torch.Tensor.cuda = real


def logits(model: Any, ids: list[int]) -> torch.Tensor:
    """[tokens, V] of one sequence."""
    from llama_models.llama4.datatypes import TransformerInput

    return model(TransformerInput(tokens=torch.tensor([ids]), tokens_position=0)).logits[0]
