"""GGUF against the `gguf` package: its reader, its quantizers; and there and back bit for bit. llama.cpp itself:
test_gguf_in_llama_cpp.py."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

gguf = pytest.importorskip("gguf")

from converters.arch_io import arch_from_config  # noqa: E402
from converters.conversion import How, check_options, convert  # noqa: E402
from converters.detect import open_checkpoint, open_source  # noqa: E402
from converters.gguf_metadata import arch_from_metadata, rope_factors, scaling_factors  # noqa: E402
from converters.gguf_names import ROPE_FREQS, text_rows, vision_rows  # noqa: E402
from converters.gguf_tokenizer import hf_files, tokenizer_json  # noqa: E402
from converters.gguf_types import QUANTIZED, Blocks, pack  # noqa: E402
from converters.reader import TensorInfo  # noqa: E402
from converters.targets import Options  # noqa: E402
from converters.writing.encoder import Scratch  # noqa: E402
from l4tool.core.arch import RopeScaling  # noqa: E402
from l4tool.core.errors import CheckpointError, InputMissing, UsageError  # noqa: E402
from tests import checkpoints  # noqa: E402
from tests.converters import published  # noqa: E402
from tests.converters.test_conversion import assert_same, tensors  # noqa: E402

# What src/models/llama4.cpp and the generic part of llama.cpp's loader ask for, without a default.
REQUIRED = [
    "general.architecture", "llama4.block_count", "llama4.context_length", "llama4.embedding_length",
    "llama4.feed_forward_length", "llama4.attention.head_count", "llama4.attention.head_count_kv",
    "llama4.attention.layer_norm_rms_epsilon", "llama4.expert_count", "llama4.expert_used_count",
    "llama4.expert_feed_forward_length", "llama4.interleave_moe_layer_step", "llama4.rope.freq_base",
    "llama4.vocab_size", "tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.ggml.tokens",
    "tokenizer.ggml.token_type", "tokenizer.ggml.merges", "tokenizer.ggml.bos_token_id",
    "tokenizer.ggml.eos_token_id", "tokenizer.ggml.padding_token_id", "general.file_type",
]  # fmt: skip


def for_llama_cpp(folder):
    """The constants that llama.cpp computes Llama 4 with."""

    def edit(config):
        text = config.get("text_config", config)
        text |= {"attention_chunk_size": 8192, "floor_scale": 8192, "use_qk_norm": True}
        if "original_max_position_embeddings" in text["rope_parameters"]:
            text["rope_parameters"]["original_max_position_embeddings"] = 8192

    return checkpoints.edit_config(folder, edit)


@pytest.fixture(scope="module", params=["scout", "maverick"])
def source(request, tmp_path_factory):
    return for_llama_cpp(checkpoints.make(tmp_path_factory.mktemp("source") / "tiny", arch=request.param))


@pytest.fixture(scope="module")
def folder(source, tmp_path_factory):
    """`source` as GGUF in its own dtype, with the vision tower beside it."""
    out = tmp_path_factory.mktemp("gguf") / "out"
    to_gguf(source, out)
    return out


def to_gguf(source, out, **options):
    reader = open_checkpoint(source)
    return convert(reader, out, check_options(Options("gguf", **options)), How())


def metadata(path):
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_there_and_back_is_the_same_checkpoint(dtype, source, tmp_path):
    """Shards, tokenizer, config.json and the small files; in float32 the values."""
    to_gguf(source, tmp_path / "gguf", dtype=dtype)
    convert(open_source(tmp_path / "gguf"), tmp_path / "back", Options("hf", shard_bytes=4 * 10**6), How())
    if dtype == "bf16":
        for path in source.iterdir():
            if path.name not in ("config.json", "model.safetensors.index.json"):
                assert path.read_bytes() == (tmp_path / "back" / path.name).read_bytes(), path.name
        assert json.loads((source / "config.json").read_text()) == json.loads(
            (tmp_path / "back" / "config.json").read_text()
        )
    else:
        assert_same({n: t.float() for n, t in tensors(source).items()}, tensors(tmp_path / "back"))


def test_what_the_package_reads(source, folder):
    """Names, shapes, types and values of every tensor, and every key that llama.cpp needs."""
    arch = open_checkpoint(source).arch
    found = {t.name: t for t in gguf.GGUFReader(folder / "tiny-BF16.gguf").tensors}
    rows = {row.stored: row for row in text_rows(arch.text)}
    assert set(found) - {ROPE_FREQS} == set(rows)
    values = tensors(source)
    for name, row in rows.items():
        tensor = found[name]
        assert tuple(reversed(tensor.shape.tolist())) == row.shape
        is_f32 = len(row.shape) < 2 or name.endswith(("_norm.weight", "ffn_gate_inp.weight"))
        assert tensor.tensor_type.name == ("F32" if is_f32 else "BF16"), name
        floats = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy()).view(row.shape)
        expected = torch.stack([values[part.name] for part in row.parts]).view(row.shape)
        assert torch.equal(floats, expected.float()), name
    keys = metadata(folder / "tiny-BF16.gguf")
    assert not [key for key in REQUIRED if key not in keys]
    assert keys["tokenizer.ggml.tokens"][arch.text.bos_token_id] == "<|begin_of_text|>"
    assert keys["llama4.feed_forward_length"] == arch.text.intermediate_size_mlp
    assert keys["llama4.expert_feed_forward_length"] == arch.text.intermediate_size


def test_names_are_the_packages(source):
    """Ours against its table of Hugging Face names. `ln2` too: its own map sends Llama 4's second norm elsewhere."""
    arch = open_checkpoint(source).arch
    map_ = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA4, arch.text.num_layers)
    for row in text_rows(arch.text):
        name = row.parts[0].name.removeprefix("language_model.").removesuffix(".weight")
        if ".experts." in name:
            name = f"{name.partition('.experts.')[0]}.experts.{name.rpartition('.')[2]}"
        assert map_.get_name(name) == row.stored.removesuffix(".weight"), name
    map_ = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, 34)
    for row in vision_rows(arch.vision, arch.text.hidden_size):
        module, _, kind = row.parts[0].name.rpartition(".")
        known = map_.get_name(module if kind in ("weight", "bias") else row.parts[0].name)
        if "ln2" in row.stored or "multi_modal" in module:  # the converter spells the projector out
            continue
        assert row.stored.removesuffix(".weight").removesuffix(".bias") == known, row
    assert gguf.TENSOR_NAMES[gguf.MODEL_TENSOR.V_ENC_POST_ATTN_NORM] == "v.blk.{bid}.ln2"
    assert gguf.TENSOR_NAMES[gguf.MODEL_TENSOR.V_MMPROJ_FC] == "mm.model.fc"


@pytest.mark.parametrize("name", list(QUANTIZED))
def test_blocks_are_the_packages(name):
    """Bit for bit, on values of many sizes, zeros, and ties."""
    rng = torch.Generator().manual_seed(3)
    w = torch.randn(70, 256, generator=rng) * torch.exp(4 * torch.randn(70, 1, generator=rng))
    w[3], w[4, :32], w[5, :32] = 0, torch.arange(32) - 16.0, (torch.arange(32) - 15.5) / 127
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        weight = w.clamp(-6e4, 6e4).to(dtype)
        packed = torch.empty(70, 256 // 32 * QUANTIZED[name][0], dtype=torch.uint8)
        pack(weight, name, packed)
        expected = gguf.quants.quantize(weight.float().numpy(), gguf.GGMLQuantizationType[name.upper()])
        assert np.array_equal(packed.numpy(), expected)


@pytest.mark.parametrize("name", list(QUANTIZED))
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e8])
def test_what_no_block_can_hold_is_named(name, value):
    """NaN, Inf, and more than float16 can scale: an infinite scale would make the whole block NaN."""
    weight = torch.randn(70, 64)
    weight[66, 40] = value
    info = TensorInfo("some.weight", (70, 64), torch.float32, 70 * 64 * 4, None)
    with pytest.raises(CheckpointError, match=re.escape(f"some.weight: element [76, 40] is {value:g}")):
        Blocks(name).encode(weight, info, "x", 10, Scratch())


@pytest.mark.parametrize("name", ["q8_0", "q4_0"])
def test_a_quantized_file(name, source, tmp_path):
    to_gguf(source, tmp_path / "out", dtype=name, text_only=True)
    file = tmp_path / "out" / f"tiny-{name.upper()}.gguf"
    values, types = tensors(source), {}
    for tensor in gguf.GGUFReader(file).tensors:
        types[tensor.name] = tensor.tensor_type.name
        if tensor.name == "blk.1.ffn_down_exps.weight":
            weight = values["language_model.model.layers.1.feed_forward.experts.2.down_proj.weight"].float()
            assert np.array_equal(tensor.data[2], gguf.quants.quantize(weight.numpy(), tensor.tensor_type))
    assert types["blk.0.attn_q.weight"] == types["blk.3.ffn_up_exps.weight"] == name.upper()
    assert types["output.weight"] == types["token_embd.weight"] == "Q8_0"
    assert types["blk.1.ffn_gate_inp.weight"] == types["blk.0.attn_norm.weight"] == "F32"
    assert metadata(file)["general.file_type"] == {"q8_0": 7, "q4_0": 2}[name]
    with pytest.raises(CheckpointError, match=f"is {name.upper()}|is Q8_0"):
        open_source(file)


def test_split_files(source, tmp_path):
    """Named and counted as llama.cpp wants them; read together, whichever is given first; a missing one is named."""
    to_gguf(source, tmp_path / "out", shard_bytes=5 * 10**6)
    parts = sorted((tmp_path / "out").glob("tiny-BF16-*.gguf"))
    assert [part.name for part in parts] == [
        f"tiny-BF16-{n + 1:05d}-of-{len(parts):05d}.gguf" for n in range(len(parts))
    ]
    assert len(parts) > 2
    total = sum(len(gguf.GGUFReader(part).tensors) for part in parts)
    for number, part in enumerate(parts):
        keys = metadata(part)
        assert (keys["split.no"], keys["split.count"]) == (number, len(parts))
        assert keys["split.tensors.count"] == total
    for path in (tmp_path / "out", parts[0], parts[-1]):
        reader = open_source(path)
        assert_same(tensors(source), {name: reader.read(name) for name in reader.tensors()})
    parts[1].unlink()
    with pytest.raises(InputMissing, match="part 2 of the split model is missing"):
        open_source(tmp_path / "out")


def test_parts_of_two_models_are_not_one(source, tmp_path):
    """Two splits of as many parts, each incomplete: together they would count as one."""
    for name in ("a", "b"):
        to_gguf(checkpoints.copy(source, tmp_path / name), tmp_path / f"{name}-out", shard_bytes=5 * 10**6)
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for number, path in enumerate(sorted((tmp_path / "a-out").glob("a-BF16-*.gguf"))):
        from_other = tmp_path / "b-out" / path.name.replace("a-BF16", "b-BF16")
        (from_other if number == 1 else path).rename(mixed / (from_other if number == 1 else path).name)
    with pytest.raises(CheckpointError, match="several models"):
        open_source(mixed)
    with pytest.raises(InputMissing, match="part 2"):
        open_source(next(mixed.glob("a-BF16-00001-*")))


def with_key(path, key, value):
    """Change a number in a file's metadata in place."""
    field = gguf.GGUFReader(path, "r+").fields[key]
    field.parts[field.data[0]][0] = value


def test_one_of_several_towers(source, folder, tmp_path):
    """Repositories offer a tower in several types: the one in the model's own type is taken."""
    copy = checkpoints.copy(folder, tmp_path / "copy")
    to_gguf(source, tmp_path / "f32", dtype="f32")
    (tmp_path / "f32" / "mmproj-tiny-F32.gguf").rename(copy / "mmproj-F32.gguf")
    for path in (copy, copy / "tiny-BF16.gguf"):
        assert_same(tensors(source), {n: t for reader in [open_source(path)] for n in reader.tensors()
                                      for t in [reader.read(n)]})  # fmt: skip
    with_key(copy / "mmproj-tiny-BF16.gguf", "general.file_type", 1)
    with pytest.raises(CheckpointError, match="several models: mmproj-F32"):
        open_source(copy)


def test_a_tower_with_the_norm_under_the_other_name(source, folder, tmp_path):
    """As llama.cpp's converter writes it with this version of the package."""
    map_ = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, 2)
    assert map_.get_name("vision_model.model.layers.1.post_attention_layernorm") == "v.blk.1.attn_post_norm"
    copy = checkpoints.copy(folder, tmp_path / "copy")
    path = copy / "mmproj-tiny-BF16.gguf"
    writer = gguf.GGUFWriter(path.with_suffix(".new"), "clip")
    reader = gguf.GGUFReader(path)
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            kind = field.types[0]
            writer.add_key_value(name, field.contents(), kind, field.types[-1] if len(field.types) > 1 else None)
    for tensor in reader.tensors:
        name = tensor.name.replace(".ln2.", ".attn_post_norm.")
        writer.add_tensor(name, tensor.data, raw_shape=tensor.data.shape, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path.with_suffix(".new").rename(path)
    found = open_source(copy)
    assert_same(tensors(source), {name: found.read(name) for name in found.tensors()})


def test_the_tokenizers_keys_are_the_packages(source, folder):
    """Against what its SpecialVocab finds in the folder, and transformers' tokenizer."""
    from transformers import AutoTokenizer

    keys = {k.removeprefix("tokenizer.ggml."): v for k, v in metadata(folder / "tiny-BF16.gguf").items()}
    special = gguf.SpecialVocab(source, load_merges=True)
    assert keys["merges"] == special.merges and keys["tokenizer.chat_template"] == special.chat_template
    names = {"pad": "padding_token_id"}
    assert {names.get(n, f"{n}_token_id"): i for n, i in special.special_token_ids.items()} == {
        key: value for key, value in keys.items() if key.endswith("_token_id")
    }
    flags = {"eos": False} | special.add_special_token  # which some versions leave out
    assert {f"add_{name}_token": flag for name, flag in flags.items()} == {
        key: value for key, value in keys.items() if key.startswith("add_")
    }
    theirs = AutoTokenizer.from_pretrained(source)
    assert keys["tokens"] == [theirs.convert_ids_to_tokens(n) for n in range(len(theirs))]
    added = theirs.get_added_vocab()
    assert keys["token_type"] == [3 if token in added else 1 for token in keys["tokens"]]


def edit_json(path, edit):
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def test_picture_normalization_is_the_checkpoints(source, tmp_path):
    copy = checkpoints.copy(source, tmp_path / "copy")
    edit_json(
        copy / "preprocessor_config.json", lambda c: c.update(image_mean=[0.25, 0.5, 0.75], image_std=[1, 0.5, 2])
    )
    to_gguf(copy, tmp_path / "out")
    (tower,) = (tmp_path / "out").glob("mmproj-*.gguf")
    found = metadata(tower)
    assert found["clip.vision.image_mean"] == [0.25, 0.5, 0.75] and found["clip.vision.image_std"] == [1.0, 0.5, 2.0]
    for bad in ([0.5], "0.5", [0.5, None, 0.5]):
        edit_json(copy / "preprocessor_config.json", lambda c, bad=bad: c.update(image_std=bad))
        with pytest.raises(CheckpointError, match=r"image_std .* is not three numbers"):
            to_gguf(copy, tmp_path / "other")


def test_tokenizers_that_llama_cpp_would_use_otherwise(source, tmp_path):
    copy = checkpoints.copy(source, tmp_path / "copy")

    def other_pattern(tokenizer):
        tokenizer["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\s+"

    edit_json(copy / "tokenizer.json", other_pattern)
    with pytest.raises(CheckpointError, match="Llama 4's pattern"):
        to_gguf(copy, tmp_path / "out")
    for broken in ("[]", "{}", '{"model": {"type": "BPE", "vocab": {}}, "added_tokens": []}', "nonsense"):
        (copy / "tokenizer.json").write_text(broken)
        with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
            to_gguf(copy, tmp_path / "out")
    (copy / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    (copy / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json"):
        to_gguf(copy, tmp_path / "out")


def test_no_bos_is_told_where_the_tokenizer_adds_none(source, tmp_path):
    copy = checkpoints.copy(source, tmp_path / "copy")
    edit_json(copy / "tokenizer.json", lambda tokenizer: tokenizer.update(post_processor=None))
    to_gguf(copy, tmp_path / "out", text_only=True)
    assert metadata(tmp_path / "out" / "copy-BF16.gguf")["tokenizer.ggml.add_bos_token"] is False


def test_small_files_of_a_foreign_file(folder):
    """Named tokens and sampling values come from llama.cpp's keys; without a template there is none."""
    keys = metadata(folder / "tiny-BF16.gguf")
    keys = {key: value for key, value in keys.items() if not key.startswith("l4tool.")}
    arch = open_source(folder).arch
    end = keys["tokenizer.ggml.tokens"].index("<|end_of_text|>")
    keys |= {"general.sampling.temp": float(np.float32(0.7)), "tokenizer.ggml.eos_token_id": end}
    files = hf_files(keys, arch, "x")
    assert json.loads(files["generation_config.json"])["temperature"] == 0.7
    assert json.loads(files["tokenizer_config.json"])["eos_token"] == "<|end_of_text|>"
    assert "preprocessor_config.json" in files and files["chat_template.jinja"]
    del keys["tokenizer.chat_template"]
    assert "chat_template.jinja" not in hf_files(keys, arch, "x")


def test_foreign_tokenizers_are_refused(folder):
    """Whatever cannot become a tokenizer.json with the same ids."""
    keys = metadata(folder / "tiny-BF16.gguf")
    tokens, types = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    first = types.index(3)
    inside = [*types[: first + 5], 4, *types[first + 6 :]]
    for name, value in [
        ("model", "llama"), ("pre", "llama-bpe"), ("token_type", inside), ("token_type", types[:-1]), ("merges", ["a"]),
        ("merges", ["a b c"]), ("merges", [1]), ("tokens", None), ("tokens", ["\u4f60", *tokens[1:]]),
        ("token_type", [1] * len(types)), ("tokens", [t.replace("begin_of", "x") for t in tokens]),
    ]:  # fmt: skip
        with pytest.raises(CheckpointError, match="tokenizer is not Llama 4's"):
            tokenizer_json(keys | {f"tokenizer.ggml.{name}": value}, "x")
    unused = keys | {"tokenizer.ggml.tokens": [*tokens, "[PAD9]"], "tokenizer.ggml.token_type": [*types, 5]}
    assert tokenizer_json(unused, "x") == tokenizer_json(keys, "x")


def test_a_file_of_llama_cpps_converter(source, folder, tmp_path):
    """Without our own key: architecture out of what llama.cpp's keys say and its code fixes."""
    text = metadata(folder / "tiny-BF16.gguf")
    vision = metadata(folder / "mmproj-tiny-BF16.gguf")
    del text["l4tool.config"]
    arch = open_checkpoint(source).arch
    found, config = arch_from_metadata(
        text, vision | {"mm.model.mlp.2": arch.vision.projector_output_dim}, rope_factors(arch.text), "bfloat16", "x"
    )
    assert found == arch and arch_from_config(config, "x") == arch


@pytest.mark.parametrize("scaling", [(16.0, 1.0, 1.0, 8192), (8.0, 1.0, 4.0, 8192)])
def test_rope_factors_divide_transformers_frequencies(scaling):
    from transformers import Llama4TextConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    factor, low, high, original = scaling
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": factor, "low_freq_factor": low,
            "high_freq_factor": high, "original_max_position_embeddings": original}  # fmt: skip
    config = Llama4TextConfig(head_dim=128, hidden_size=5120, num_attention_heads=40, rope_parameters=rope)
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 1.0 / (500000.0 ** (torch.arange(0, 128, 2).float() / 128))
    factors = torch.tensor(scaling_factors(500000.0, 128, RopeScaling(*scaling)))
    assert torch.allclose(plain / factors, expected, rtol=1e-6)


def test_finer_values_than_the_dtype_holds(source, folder, tmp_path):
    """A router trained in float32 beside bfloat16 weights: everything is given in float32, nothing is rounded."""
    copy = checkpoints.copy(folder, tmp_path / "copy")
    path = copy / "tiny-BF16.gguf"
    name = next(t for t in gguf.GGUFReader(path).tensors if t.name.endswith("ffn_gate_inp.weight"))
    with open(path, "r+b") as file:
        file.seek(int(name.data_offset))
        file.write(np.array([0.1], dtype=np.float32).tobytes())
    reader = open_source(copy)
    assert reader.dtype == torch.float32
    router = reader.read(next(n for n in reader.tensors() if n.endswith("router.weight")))
    assert float(router[0, 0]) == np.float32(0.1) and router.dtype == torch.float32


def test_broken_files(folder, tmp_path):
    copy = checkpoints.copy(folder, tmp_path / "copy")
    path = copy / "tiny-BF16.gguf"
    whole = path.read_bytes()
    for data in (b"", b"GGUF", b"rubbish", whole[:1000], whole[:-4000], whole[:8] + b"\xff" * 16 + whole[24:]):
        path.write_bytes(data)
        with pytest.raises(CheckpointError):
            open_source(copy)
    path.unlink()
    with pytest.raises(CheckpointError, match="no language model"):
        open_source(copy)
    path.write_bytes(whole)
    (copy / "another.gguf").write_bytes(whole)
    with pytest.raises(CheckpointError, match="several models"):
        open_source(copy)
    assert open_source(path).arch


def test_what_llama_cpp_computes_otherwise_is_refused(scout_tiny, tmp_path):
    with pytest.raises(UsageError, match="attention chunks of 8192"):
        to_gguf(scout_tiny, tmp_path / "out")
    source = for_llama_cpp(checkpoints.copy(scout_tiny, tmp_path / "copy"))
    checkpoints.edit_config(source, lambda config: config["text_config"].update(use_qk_norm=False))
    with pytest.raises(UsageError, match="QK norm on with 4 experts"):
        to_gguf(source, tmp_path / "out")
    with pytest.raises(UsageError, match="--dtype takes"):
        to_gguf(source, tmp_path / "out", dtype="q2_k")


@pytest.mark.parametrize("config", [published.scout(), published.maverick()], ids=["scout", "maverick"])
def test_the_published_models_can_be_written(config):
    from converters.gguf_metadata import require_expressible

    arch = arch_from_config(config, "config.json")
    require_expressible(arch)
    with pytest.raises(UsageError):
        require_expressible(replace(arch, text=replace(arch.text, attention_chunk_size=4096)))
