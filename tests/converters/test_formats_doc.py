"""What docs/formats.md says is what the code and the libraries do."""

import json
import math
import re
from pathlib import Path

import pytest
import torch

from converters.arch_io import arch_from_config
from converters.names import canonical_shapes, is_linear
from converters.quant_config import parse_quantization
from tests.converters import published

DOC = (Path(__file__).resolve().parents[2] / "docs" / "formats.md").read_text()


def block(language):
    return re.search(rf"```{language}\n(.*?)```", DOC, re.DOTALL).group(1)


def test_the_unpacking_shown_is_the_librarys():
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    space = {}
    exec(block("python"), space)
    q = torch.arange(-8, 8).repeat(4, 16)
    scale = torch.tensor([[0.5, -1.0], [2.0, 1.0], [0.25, 3.0], [1.0, 1.0]], dtype=torch.bfloat16)
    packed = pack_to_int32(q.to(torch.int8), 4)
    assert int(packed[0, 0]) == 0x76543210
    wanted = q * scale.float().repeat_interleave(128, dim=1)
    assert torch.equal(space["unpack"](packed, scale), wanted)


def test_the_config_shown_is_the_one_written():
    from quant.schemes import make_recipe, quantization_config

    shown = json.loads(block("json"))
    assert shown == quantization_config(make_recipe("int4"))
    assert parse_quantization(shown, "doc").format_of("x.feed_forward.experts.0.up_proj").kind == "int4"


BYTES = {"bf16": lambda n, out: 2 * n, "int4": lambda n, out: n // 2 + n // 64 + 16, "fp8": lambda n, out: n + 2 * out}
# experts, shared experts and dense MLPs, attention: the columns of the table
COLUMNS = [
    ("bf16", "bf16", "bf16"),
    ("int4", "bf16", "bf16"),
    ("int4", "int4", "bf16"),
    ("int4", "fp8", "bf16"),
    ("fp8", "fp8", "bf16"),
    ("int4", "fp8", "fp8"),
    ("fp8", "fp8", "fp8"),
]


@pytest.mark.parametrize("name, config", [("Scout", published.scout), ("Maverick", published.maverick)])
def test_sizes(name, config):
    row = re.search(rf"^\| {name} \|(.*)\|$", DOC, re.MULTILINE).group(1)
    sizes = [0] * len(COLUMNS)
    for tensor, shape in canonical_shapes(arch_from_config(config(), "config.json")).items():
        linear = is_linear(tensor)
        kind = 0 if ".experts." in tensor else 2 if ".self_attn." in tensor else 1
        for i, kinds in enumerate(COLUMNS):
            sizes[i] += BYTES[kinds[kind] if linear else "bf16"](math.prod(shape), shape[0])
    assert [f"{size / 1e9:.1f}" for size in sizes] == [cell.strip() for cell in row.split("|")]
    if name == "Scout":
        assert f"{sizes[2] / 2**30:.1f} GiB" in DOC
