"""The HF reader gives what the safetensors library and transformers give, without copying."""

import pytest
import torch

from converters.detect import open_checkpoint
from converters.names import canonical_shapes, is_linear
from tests import checkpoints

FIXTURES = ["scout_tiny", "maverick_tiny", "scout_tiny_text"]


def expected(stored, name, inner):
    """Canonical tensor out of the raw file contents, by FORMATS' rule."""
    if not any(key.startswith("language_model.") for key in stored):
        name = name.removeprefix("language_model.")
    if ".experts." not in name:
        return stored[name]
    base, rest = name.split(".experts.")
    expert, projection, _ = rest.split(".")
    if projection == "down_proj":
        return stored[f"{base}.experts.down_proj"][int(expert)].T
    gate_up = stored[f"{base}.experts.gate_up_proj"][int(expert)]
    return (gate_up[:, :inner] if projection == "gate_proj" else gate_up[:, inner:]).T


@pytest.mark.parametrize("fixture", FIXTURES)
def test_values_equal_the_safetensors_library(request, fixture):
    folder = request.getfixturevalue(fixture)
    stored = checkpoints.load(folder)
    reader = open_checkpoint(folder)
    assert reader.layout == ("hf-text" if fixture.endswith("text") else "hf")
    shapes = canonical_shapes(reader.arch)
    assert list(reader.tensors()) == list(shapes)
    for name, info in reader.tensors().items():
        tensor = reader.read(name)
        wanted = expected(stored, name, reader.arch.text.intermediate_size)
        assert tuple(tensor.shape) == info.shape == shapes[name] == tuple(wanted.shape)
        assert tensor.dtype == info.dtype == reader.dtype == torch.bfloat16
        assert info.nbytes == tensor.numel() * 2
        assert torch.equal(tensor, wanted), name
        assert torch.equal(reader.read(name, slice(1, 3)), wanted[1:3]), name
        if is_linear(name):
            assert tensor.dim() == 2
    reader.close()
