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


@pytest.mark.parametrize("fixture", FIXTURES)
def test_reading_copies_nothing(request, fixture):
    reader = open_checkpoint(request.getfixturevalue(fixture))
    spans = {}
    for path, file in reader.folder.files.items():
        name = next(iter(file.tensors))
        start = file.view(name).data_ptr() - file.tensors[name].start
        spans[path] = (start, start + path.stat().st_size)
    for name, info in reader.tensors().items():
        first, last = spans[info.file]
        for tensor in (reader.read(name), reader.read(name, slice(1, 3))):
            assert first <= tensor.data_ptr() < last, name
            assert tensor.untyped_storage().nbytes() <= last - first


def test_reading_slices_of_a_fused_expert(scout_tiny):
    reader = open_checkpoint(scout_tiny)
    name = "language_model.model.layers.1.feed_forward.experts.2.up_proj.weight"
    whole = reader.read(name)
    assert whole.stride() == (1, 2 * reader.arch.text.intermediate_size)
    rows = reader.read(name, slice(100, 164))
    assert rows.data_ptr() == whole[100:].data_ptr() and torch.equal(rows, whole[100:164])
    reader.prefetch(name)
    reader.release(name)
    assert torch.equal(rows, whole[100:164])


def test_transformers_computes_what_the_canonical_experts_compute(scout_tiny):
    """One MoE layer of transformers against plain products with our per-expert weights: gate, up and down in place."""
    from transformers import Llama4ForConditionalGeneration

    model = Llama4ForConditionalGeneration.from_pretrained(scout_tiny, dtype=torch.float32)
    reader = open_checkpoint(scout_tiny)
    base = "language_model.model.layers.2.feed_forward."
    experts = model.get_submodule(base + "experts")
    num_experts, hidden = reader.arch.text.num_experts, reader.arch.text.hidden_size
    x = torch.randn(num_experts, 5, hidden, generator=torch.Generator().manual_seed(0))
    theirs = experts(x.reshape(-1, hidden)).view(num_experts, 5, hidden)
    for e in range(num_experts):
        gate, up, down = (
            reader.read(f"{base}experts.{e}.{part}_proj.weight").float() for part in ("gate", "up", "down")
        )
        ours = (torch.nn.functional.silu(x[e] @ gate.T) * (x[e] @ up.T)) @ down.T
        torch.testing.assert_close(ours, theirs[e], rtol=1e-4, atol=1e-4)


def test_what_a_reader_tells(scout_tiny, scout_tiny_text):
    reader = open_checkpoint(scout_tiny)
    names = [path.name for path in reader.side_files()]
    assert {"tokenizer.json", "chat_template.jinja", "generation_config.json", "preprocessor_config.json"} <= set(names)
    assert not any("safetensors" in name or name == "config.json" for name in names)
    assert reader.weight_files() == checkpoints.shards(scout_tiny) and len(reader.weight_files()) > 2
    assert reader.quantization is None and reader.config["model_type"] == "llama4"
    assert reader.linear_format("language_model.model.layers.0.self_attn.q_proj") is None
    with pytest.raises(KeyError):
        reader.read("language_model.model.layers.0.self_attn.q_proj.bias")
    assert open_checkpoint(scout_tiny_text).config["model_type"] == "llama4_text"
