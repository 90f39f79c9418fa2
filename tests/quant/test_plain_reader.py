"""Quantized checkpoints of others as floats: bit for bit what the compressed-tensors library makes of them."""

import json
import shutil

import pytest
import torch

from converters.conversion import How, convert
from converters.detect import open_checkpoint, open_source
from converters.targets import Options
from l4tool.core.errors import CheckpointError
from l4tool.main import main
from quant.plain_reader import PlainReader
from tests import checkpoints
from tests.converters.test_conversion import assert_same, tensors


def scheme(bits, number, strategy, **more):
    return {"num_bits": bits, "type": number, "strategy": strategy, "symmetric": True, "dynamic": False, **more}


STATIC = scheme(8, "float", "tensor")
TOKEN = scheme(8, "int", "token", dynamic=True)
EXPERT, LAYER = r".*\.feed_forward\.experts\.", r".*layers\."
# What checkpoints of others hold, all in one: pattern of modules → weights, format, activations.
ZOO = {
    EXPERT + r"0\.gate_proj": (scheme(4, "int", "group", group_size=64, symmetric=False), "pack-quantized", None),
    EXPERT + r"0\.up_proj": (scheme(4, "int", "channel", symmetric=False), "pack-quantized", None),
    EXPERT + r"0\.down_proj": (scheme(4, "int", "tensor", symmetric=False), "pack-quantized", None),
    EXPERT + r"1\.gate_proj": (scheme(8, "int", "group", group_size=128), "pack-quantized", None),
    EXPERT + r"1\.up_proj": (scheme(8, "int", "channel", symmetric=False), "pack-quantized", None),
    EXPERT + r"1\.down_proj": (scheme(3, "int", "group", group_size=32, symmetric=False), "pack-quantized", TOKEN),
    EXPERT + r"2\.gate_proj": (scheme(4, "int", "group", group_size=32), "pack-quantized", None),
    EXPERT + r"2\.up_proj": (scheme(5, "int", "channel"), "pack-quantized", None),
    EXPERT + r"2\.down_proj": (scheme(4, "int", "group", group_size=128, actorder="weight"), "pack-quantized", None),
    EXPERT + r"3\.gate_proj": (scheme(8, "float", "block", block_structure=[100, 96]), "naive-quantized", None),
    EXPERT + r"3\.up_proj": (scheme(8, "float", "block", block_structure=[128, 128]), "float-quantized", None),
    EXPERT + r"3\.down_proj": (scheme(4, "int", "block", block_structure=[64, 64]), "pack-quantized", None),
    LAYER + r"\d+\.self_attn\.q_proj": (scheme(8, "float", "tensor"), "float-quantized", STATIC),
    LAYER + r"\d+\.self_attn\.[ko]_proj": (scheme(8, "int", "channel"), "int-quantized", TOKEN),
    LAYER + r"\d+\.self_attn\.v_proj": (scheme(8, "int", "tensor", symmetric=False), "int-quantized", TOKEN),
    r".*shared_expert\.gate_proj": (scheme(8, "float", "channel"), "float-quantized", None),
    r".*shared_expert\.up_proj": (scheme(8, "int", "channel", symmetric=False), "int-quantized", TOKEN),
    r".*shared_expert\.down_proj": (scheme(8, "float", "group", group_size=64), "naive-quantized", None),
}


def config_of(groups, ignore=checkpoints.BASE_IGNORE):
    """A quantization_config with a group for each target."""
    return {
        "quant_method": "compressed-tensors", "quantization_status": "compressed", "format": "mixed-precision",
        "config_groups": {
            f"group_{n}": {"targets": [target], "weights": weights, "input_activations": inputs, "format": stored_as}
            for n, (target, (weights, stored_as, inputs)) in enumerate(groups.items())
        },
        "ignore": list(ignore),
    }  # fmt: skip


ZOO_CONFIG = config_of({f"re:{pattern}$": one for pattern, one in ZOO.items()})


@pytest.fixture(scope="module")
def zoo(scout_tiny, tmp_path_factory):
    """With the scales of activations and cache that llm-compressor writes, too."""
    folder = checkpoints.compress_with(scout_tiny, tmp_path_factory.mktemp("zoo") / "model", ZOO_CONFIG)
    stored = checkpoints.load(folder)
    for layer in range(4):
        attention = f"language_model.model.layers.{layer}.self_attn"
        stored[f"{attention}.q_proj.input_scale"] = torch.full((1,), 0.5, dtype=torch.bfloat16)
        stored |= {f"{attention}.{name}_scale": torch.ones(1) for name in "kv"}
    checkpoints.save(folder, stored)
    checkpoints.edit_config(folder, lambda c: c["quantization_config"].update(kv_cache_scheme=STATIC))
    return folder


def library_floats(folder, config):
    """Every quantized weight as the library decompresses it, by its stored name."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    theirs, modules = QuantizationConfig(**config), {}
    for name, tensor in checkpoints.load(folder).items():
        module, _, part = name.rpartition(".")
        modules.setdefault(module, {})[part] = tensor
    floats = {}
    for module, parts in modules.items():
        if "weight_scale" in parts:
            scheme_ = checkpoints.library_scheme(theirs, module, checkpoints.classes_of(module))
            compressor = BaseCompressor.get_value_from_registry(scheme_.format)
            floats[f"{module}.weight"] = compressor.decompress(parts, scheme_)["weight"]
    return floats


def test_floats_are_the_librarys(zoo, scout_tiny, tmp_path):
    """The tensors, ranges of their rows, and the checkpoint that convert makes of them."""
    reader, expected = PlainReader(open_source(zoo)), library_floats(zoo, ZOO_CONFIG)
    assert len(expected) == 4 * (4 + 3 + 12)
    plain = open_checkpoint(scout_tiny)
    assert {n: i.shape for n, i in reader.tensors().items()} == {n: i.shape for n, i in plain.tensors().items()}
    for name in plain.tensors():
        wanted = expected.get(name, plain.read(name))
        assert torch.equal(reader.read(name), wanted) and reader.tensors()[name].dtype == wanted.dtype, name
        if name in expected:
            for rows in (slice(0, 1), slice(5, 119), slice(101, 128)):
                assert torch.equal(reader.read(name, rows), wanted[rows]), (name, rows)
    convert(reader, tmp_path / "hf", Options("hf"), How())
    assert open_checkpoint(tmp_path / "hf").quantization is None
    assert_same({n: reader.read(n) for n in reader.tensors()}, tensors(tmp_path / "hf"))


def test_what_the_engine_cannot_run_is_refused_by_name(zoo, tmp_path, capsys):
    with pytest.raises(CheckpointError, match=r"asks for a quantized KV cache.* cannot be computed with") as error:
        open_checkpoint(zoo)
    assert f"l4tool convert {zoo} -o OUT --to hf" in error.value.hint
    folder = tmp_path / "model"
    shutil.copytree(zoo, folder)
    checkpoints.edit_config(folder, lambda c: c["quantization_config"].pop("kv_cache_scheme"))
    said = r"layers\.0\.self_attn\.q_proj \(and 63 more\) is stored as FP8 \(e4m3fn\), one scale, activations in FP8"
    with pytest.raises(CheckpointError, match=said):
        open_checkpoint(folder)
    (tmp_path / "in.jsonl").write_text('{"prompt": "hello"}\n')
    answers = ["batch", str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"), "--model", str(folder)]
    quantize = ["quantize", str(folder), "--int4", "-o", str(tmp_path / "int4")]
    for command in (answers, quantize, ["plan", str(folder)]):
        assert main(command) == 65
        told = capsys.readouterr().err
        assert "cannot be computed with" in told and f"l4tool convert {folder} -o OUT --to hf" in told


def test_inspect_and_verify_read_them(zoo, scout_tiny, capsys):
    assert main(["inspect", str(zoo), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    groups = {group["scheme"]: group["linears"] for group in facts["quantization"]["groups"]}
    assert groups["INT4, asymmetric, one scale for each 64 inputs"] == 4
    assert groups["FP8 (e4m3fn), one scale, activations in FP8, scale stored"] == 4
    assert sum(groups.values()) == 4 * (4 + 3 + 12)
    assert [finding["severity"] for finding in facts["findings"]] == ["warning"]
    assert main(["verify", str(zoo), "--against", str(scout_tiny), "--json"]) == 0
    against = json.loads(capsys.readouterr().out)["against"]
    kinds = {one["kind"]: one["relative_error"] for one in against["totals"] if one["kind"]}
    assert kinds.keys() == {"int3", "int4", "int5", "int8", "fp8"}
    assert all(0 < error < 0.5 for error in kinds.values()) and kinds["int8"] < 0.05 and kinds["fp8"] < 0.05


def test_resharded_with_every_scale(zoo, tmp_path):
    """--to compressed-tensors loses nothing, also of what floats do without."""
    convert(open_source(zoo), tmp_path / "again", Options("compressed-tensors"), How())
    assert_same(checkpoints.load(zoo), checkpoints.load(tmp_path / "again"))


def test_everything_quantized(scout_tiny, tmp_path):
    """Router, embedding, lm_head, vision tower and projector too, with a stale frozen status."""
    groups = {"Linear": (scheme(8, "int", "channel", symmetric=False), "int-quantized", TOKEN)}
    groups["Embedding"] = (scheme(8, "int", "channel"), "int-quantized", None)
    config = config_of(groups, ignore=()) | {"quantization_status": "frozen", "format": "int-quantized"}
    folder = checkpoints.compress_with(scout_tiny, tmp_path / "model", config)
    reader, expected = PlainReader(open_source(folder)), library_floats(folder, config)
    for word in ("router", "embed_tokens", "lm_head", "vision_model", "multi_modal_projector", "experts"):
        assert any(word in name for name in expected)
    for name, weight in expected.items():
        assert torch.equal(reader.read(name), weight), name
    assert {"vision_model.layernorm_pre.bias", "language_model.lm_head.weight"} <= reader.tensors().keys()
    with pytest.raises(CheckpointError, match="cannot be computed with"):
        open_checkpoint(folder)


def test_transformers_decompresses_to_the_same(scout_tiny_text, tmp_path):
    """The whole checkpoint, through its own loader: logits are equal. (It loads no packed zero points: 5.23.)"""
    from transformers import Llama4ForCausalLM

    groups = {
        r"re:.*experts\.": (scheme(8, "int", "group", group_size=128), "pack-quantized", None),
        r"re:.*self_attn\.": (scheme(8, "float", "block", block_structure=[128, 128]), "float-quantized", None),
        r"re:.*shared_expert\.": (scheme(3, "int", "channel"), "pack-quantized", None),
    }
    folder = checkpoints.compress_with(scout_tiny_text, tmp_path / "model", config_of(groups))
    convert(PlainReader(open_source(folder)), tmp_path / "hf", Options("hf"), How())
    ids = torch.arange(100, 140)[None]
    with torch.no_grad():
        plain = Llama4ForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.bfloat16)
        theirs = Llama4ForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        assert torch.equal(plain(input_ids=ids).logits, theirs(input_ids=ids).logits)


def test_inputs_in_the_order_of_their_activations(scout_tiny, tmp_path):
    """`actorder: group`, which newer libraries do not write any more: groups of inputs that do not lie together."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

    config = config_of({r"re:.*experts\..*gate": (scheme(4, "int", "group", group_size=32), "pack-quantized", None)})
    folder = checkpoints.compress_with(scout_tiny, tmp_path / "model", config)
    stored, floats, expected = checkpoints.load(folder), library_floats(folder, config), {}
    for key in [key for key in stored if key.endswith(".weight_packed")]:
        module = key.removesuffix(".weight_packed")
        shape = torch.Size(stored[f"{module}.weight_shape"].tolist())
        order = torch.randperm(shape[1], generator=torch.Generator().manual_seed(len(module)))
        groups = torch.arange(shape[1]) // 32
        codes = unpack_from_int32(stored[key], 4, shape)
        expected[module] = floats[f"{module}.weight"][:, order]
        stored[key] = pack_to_int32(codes[:, order].contiguous(), 4)  # input j was input order[j] when it was grouped
        stored[f"{module}.weight_g_idx"] = groups[order].int()
    checkpoints.save(folder, stored)

    def reorder(c):
        c["quantization_config"]["config_groups"]["group_0"]["weights"]["actorder"] = "group"

    checkpoints.edit_config(folder, reorder)
    with pytest.raises(CheckpointError, match="in a stored order, which cannot be computed with"):
        open_checkpoint(folder)
    reader = PlainReader(open_source(folder))
    for module, weight in expected.items():
        assert torch.equal(reader.read(f"{module}.weight"), weight)
        assert torch.equal(reader.read(f"{module}.weight", slice(9, 40)), weight[9:40])


def test_our_own_come_back_as_floats_too(scout_tiny, tmp_path, capsys):
    """Names in `ignore` spelled out one by one, as llm-compressor writes them."""
    folder = checkpoints.compress(scout_tiny, tmp_path / "model", "mixed")
    explicit = [f"language_model.model.layers.{n}.feed_forward.router" for n in range(4)]

    def spell_out(c):
        ignore = c["quantization_config"]["ignore"]
        ignore.remove("re:.*router$")
        ignore += explicit

    checkpoints.edit_config(folder, spell_out)
    assert main(["quantize", str(folder), "--int4", "-o", str(tmp_path / "out")]) == 65
    assert f"l4tool convert {folder} -o OUT --to hf" in capsys.readouterr().err
    plain = PlainReader(open_source(folder))
    convert(plain, tmp_path / "experts", Options("hf-experts", text_only=True), How())
    found = tensors(tmp_path / "experts")
    assert_same({n: plain.read(n) for n in plain.tensors() if n.startswith("language_model.")}, found)
    expected = library_floats(folder, checkpoints.quantization_config("mixed"))
    assert_same(expected, {name: found[name] for name in expected})
