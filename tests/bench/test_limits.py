"""The limits that benchmarks print: weights counted against transformers, times against sums done step by step."""

import dataclasses
import random
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, Llama4ForCausalLM

from converters.detect import open_checkpoint
from tests import checkpoints

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture(scope="module")
def limits():
    sys.path.insert(0, str(BENCH))
    import limits

    yield limits
    sys.path.remove(str(BENCH))


@pytest.fixture(scope="module")
def machine(limits):
    return limits.Machine(threads=2, read_bytes_s=1e9, bf16_flops=1e12, int8_flops=2e12)


@pytest.mark.parametrize("arch", ["scout", "maverick"])
def test_every_weight_of_the_model_is_counted_once(limits, tmp_path, arch):
    folder = checkpoints.make(tmp_path / "model", arch=arch, text_only=True)
    costs = limits.model_costs(open_checkpoint(folder))
    with torch.device("meta"):
        model = Llama4ForCausalLM(AutoConfig.from_pretrained(folder))
    parameters = {name: value for name, value in model.named_parameters() if "embed_tokens" not in name}
    matrices = sum(value.numel() for value in parameters.values() if value.dim() > 1)
    assert costs.shared_params + costs.num_experts * costs.expert_params + costs.head_params == matrices
    assert costs.weight_bytes == 2 * sum(value.numel() for value in parameters.values())


def test_experts_touched_are_those_of_even_routing(limits):
    costs = limits.Costs(0, 0, 0, 0, 0, 0, 16, 0, 0)
    rng = random.Random(0)
    for tokens in (1, 4, 64):
        drawn = [len({rng.randrange(16) for _ in range(tokens)}) for _ in range(4000)]
        assert costs.touched_experts(tokens) == pytest.approx(sum(drawn) / len(drawn), rel=0.02)


def test_a_step_takes_the_longer_of_memory_and_arithmetic(limits, machine):
    costs = limits.Costs(10**9, 2 * 10**9, 0, 0, 0, 0, 0, 0, 0)
    assert limits.Step(1, 1, 1, 1).seconds(costs, machine) == pytest.approx(2.0)  # 2 GB at 1 GB/s
    assert limits.Step(4000, 1, 1, 1).seconds(costs, machine) == pytest.approx(8.0)  # 8 TFLOP at 1 TFLOP/s
    assert limits.Step(4000, 1, 1, 1).seconds(costs, machine, "int8") == pytest.approx(4.0)


def test_a_job_is_its_prompts_and_every_further_token(limits, machine):
    costs = limits.Costs(10**8, 2 * 10**8, 10**7, 2 * 10**7, 10**6, 2 * 10**6, 16, 4096, 8192)
    lengths = [5, 9]
    limit = limits.job_limit(costs, machine, lengths, new_tokens=3)
    context = sum(range(1, 6)) + sum(range(1, 10))
    assert limit.prompt_s == limits.Step(14, 2, context, 14).seconds(costs, machine)
    steps = [limits.Step(2, 2, total, total).seconds(costs, machine) for total in (16, 18)]
    assert limit.decode_s == pytest.approx(sum(steps))
    one_token = limits.job_limit(costs, machine, lengths, new_tokens=1)
    assert one_token.seconds == limit.prompt_s


def test_int4_files_count_fewer_bytes_and_as_much_arithmetic(limits, tmp_path):
    from click.testing import CliRunner

    from l4tool.main import cli

    source = checkpoints.make(tmp_path / "model")
    done = CliRunner().invoke(cli, ["quantize", str(source), "-o", str(tmp_path / "packed"), "--int4"])
    assert done.exit_code == 0, done.output
    dense, packed = (limits.model_costs(open_checkpoint(folder)) for folder in (source, tmp_path / "packed"))
    assert packed.expert_params == dense.expert_params
    assert 3.5 < dense.expert_bytes / packed.expert_bytes < 4
    same = {"shared_bytes", "expert_bytes"}
    for field in dataclasses.fields(dense):
        assert field.name in same or getattr(dense, field.name) == getattr(packed, field.name)
