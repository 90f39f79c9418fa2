"""Checkpoints of the published sizes, as sparse files: offsets beyond 32 bits, and opening that does not grow."""

import json
import time

import pytest
import torch

from converters.arch_io import arch_from_config
from converters.detect import open_checkpoint
from converters.names import hf_rows
from converters.writer import ShardFile, TensorSpec, plan_shards, write_index
from tests.converters import published

FUSED = "language_model.model.layers.47.feed_forward.experts.gate_up_proj"


@pytest.mark.parametrize("config, gigabytes", [(published.scout, 217.3), (published.maverick, 803.2)])
def test_a_checkpoint_of_real_size(tmp_path, config, gigabytes):
    (tmp_path / "config.json").write_text(json.dumps(config()))
    arch = arch_from_config(config(), "config.json")
    last, inner, hidden = arch.text.num_experts - 1, arch.text.intermediate_size, arch.text.hidden_size
    marks = torch.arange(2 * inner, dtype=torch.float32).bfloat16()
    plans = plan_shards([TensorSpec(row.stored, row.shape, torch.bfloat16) for row in hf_rows(arch)])
    for plan in plans:
        shard = ShardFile(tmp_path, plan)
        for spec in plan.specs:
            shard.mark(spec.name)
        shard.finish()
    plan = next(plan for plan in plans if FUSED in plan.starts)
    with open(
        tmp_path / plan.file_name, "r+b"
    ) as file:  # the last input of the last expert, 21 GB into Maverick's file
        file.seek(plan.starts[FUSED] + 2 * ((last + 1) * hidden - 1) * 2 * inner)
        file.write(marks.view(torch.uint8).numpy().data)
    write_index(tmp_path, plans)
    started_s = time.monotonic()
    reader = open_checkpoint(tmp_path)
    assert time.monotonic() - started_s < 5
    assert round(sum(info.nbytes for info in reader.tensors().values()) / 1e9, 1) == gigabytes
    base = FUSED.removesuffix("gate_up_proj") + str(last)
    gate = reader.read(f"{base}.gate_proj.weight", slice(100, 164))
    up = reader.read(f"{base}.up_proj.weight", slice(inner - 1, inner))
    assert torch.equal(gate[:, -1], marks[100:164]) and not gate[:, :-1].any()
    assert torch.equal(up[:, -1], marks[-1:])
    reader.close()
