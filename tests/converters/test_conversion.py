"""`convert` between Hugging Face's layouts: the same bits there and back, and transformers reads what is written."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from converters.conversion import Conversion, How, check_options, convert
from converters.detect import open_checkpoint
from converters.name_map import name_map, render_line
from converters.targets import Options
from converters.writing import journal
from l4tool.core.errors import CheckpointError, UsageError, WriteError
from tests import checkpoints


def run(source, out, to, how=None, **options):
    reader = open_checkpoint(source)
    try:
        return convert(reader, out, check_options(Options(to, **options)), how or How())
    finally:
        reader.close()


def tensors(folder):
    """Canonical name → tensor, copied."""
    reader = open_checkpoint(folder)
    found = {name: reader.read(name).clone() for name in reader.tensors()}
    reader.close()
    return found


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("model", ["scout_tiny", "maverick_tiny", "scout_tiny_text"])
def test_experts_apart_and_together_again(model, request, tmp_path):
    """The same files, byte for byte, but for the report: shards, index, config and side files."""
    source = request.getfixturevalue(model)
    run(source, tmp_path / "apart", "hf-experts", shard_bytes=10**6)
    apart = open_checkpoint(tmp_path / "apart")
    assert apart.layout == "per-expert"
    assert any(".experts.3.up_proj.weight" in name for name in checkpoints.load(tmp_path / "apart"))
    assert_same(tensors(source), tensors(tmp_path / "apart"))
    run(tmp_path / "apart", tmp_path / "back", "hf", shard_bytes=4 * 10**6)
    ours = {path.name: path.read_bytes() for path in (tmp_path / "back").iterdir() if path.name != journal.REPORT}
    assert ours == {path.name: path.read_bytes() for path in source.iterdir()}


def test_text_only_is_the_text_only_export(scout_tiny, tmp_path):
    run(scout_tiny, tmp_path / "text", "hf", text_only=True)
    names = set(checkpoints.load(tmp_path / "text"))
    assert "lm_head.weight" in names and not any(
        name.startswith(("vision", "language_model", "multi")) for name in names
    )
    reader, whole = open_checkpoint(tmp_path / "text"), open_checkpoint(scout_tiny)
    assert reader.arch.vision is None and reader.arch.text == whole.arch.text
    assert not (tmp_path / "text" / "preprocessor_config.json").exists()
    text = {name: tensor for name, tensor in tensors(scout_tiny).items() if name.startswith("language_model.")}
    assert_same(text, tensors(tmp_path / "text"))


def test_transformers_computes_the_same_with_either(scout_tiny, tmp_path):
    """Its text-only class on our text-only export, its multimodal class on the source: equal logits."""
    from transformers import AutoModelForCausalLM, Llama4ForConditionalGeneration

    run(scout_tiny, tmp_path / "text", "hf", text_only=True)
    ids = torch.arange(100, 140)[None]
    with torch.no_grad():
        loaded, info = AutoModelForCausalLM.from_pretrained(
            tmp_path / "text", dtype=torch.float32, output_loading_info=True
        )
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
        whole = Llama4ForConditionalGeneration.from_pretrained(scout_tiny, dtype=torch.float32)
        assert torch.equal(loaded(ids).logits, whole(input_ids=ids).logits)


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("f32", torch.float32), ("f16", torch.float16)])
def test_other_dtypes(dtype, torch_dtype, scout_tiny, tmp_path):
    run(scout_tiny, tmp_path / "cast", "hf", dtype=dtype)
    assert open_checkpoint(tmp_path / "cast").arch.dtype == str(torch_dtype).removeprefix("torch.")
    for name, tensor in tensors(tmp_path / "cast").items():
        assert tensor.dtype == torch_dtype, name
    want = {name: tensor.to(torch_dtype) for name, tensor in tensors(scout_tiny).items()}
    assert_same(want, tensors(tmp_path / "cast"))
    run(tmp_path / "cast", tmp_path / "back", "hf", dtype="bf16")
    if dtype == "f32":
        assert_same(tensors(scout_tiny), tensors(tmp_path / "back"))


def test_a_value_that_the_dtype_cannot_hold_is_named(scout_tiny, tmp_path):
    source = checkpoints.copy(scout_tiny, tmp_path / "source")
    stored = checkpoints.load(source)
    name = "language_model.model.layers.1.feed_forward.experts.down_proj"
    stored[name][2, 5, 7] = 70000.0
    checkpoints.save(source, stored)
    with pytest.raises(CheckpointError, match=r"down_proj: element \[773, 7\] is 70144, which float16 cannot hold"):
        run(source, tmp_path / "out", "hf", dtype="f16")
    assert not (tmp_path / "out" / "config.json").exists()


def test_infinite_and_nan_values_stay(scout_tiny, tmp_path):
    """convert copies bits; saying what they are is verify's work."""
    source = checkpoints.copy(scout_tiny, tmp_path / "source")
    stored = checkpoints.load(source)
    name = "language_model.model.layers.1.feed_forward.experts.down_proj"
    stored[name].view(torch.int16)[0, 0, :2] = torch.tensor([0x7F81, 0x7F80], dtype=torch.int16)  # NaN with a payload
    checkpoints.save(source, stored)
    run(source, tmp_path / "out", "hf-experts")
    moved = checkpoints.load(tmp_path / "out")[f"{name.removesuffix('.down_proj')}.0.down_proj.weight"]
    assert moved.view(torch.int16)[:2, 0].tolist() == [0x7F81, 0x7F80]


def test_result_does_not_depend_on_memory_or_jobs(scout_tiny, tmp_path):
    run(scout_tiny, tmp_path / "a", "hf-experts", How(jobs=1))
    run(scout_tiny, tmp_path / "b", "hf-experts", How(memory_bytes=513 * 2**20, jobs=4))
    one, other = ({p.name: p.read_bytes() for p in f.iterdir()} for f in (tmp_path / "a", tmp_path / "b"))
    assert {n: d for n, d in one.items() if n != journal.REPORT} == {
        n: d for n, d in other.items() if n != journal.REPORT
    }


def test_quantized_shards_are_written_anew_bit_for_bit(scout_tiny, tmp_path):
    quantized = checkpoints.compress(scout_tiny, tmp_path / "int4", "mixed")
    run(quantized, tmp_path / "out", "compressed-tensors", shard_bytes=10**6)
    stored, again = checkpoints.load(quantized), checkpoints.load(tmp_path / "out")
    assert stored.keys() == again.keys() and len(checkpoints.shards(tmp_path / "out")) > 1
    assert all(torch.equal(stored[name], again[name]) for name in stored)
    assert json.loads((quantized / "config.json").read_text()) == json.loads((tmp_path / "out/config.json").read_text())


def test_text_of_a_quantized_checkpoint(scout_tiny, tmp_path):
    """Names in `ignore` and `targets` lose their prefix with the tensors; the formats stay."""
    quantized = checkpoints.compress(scout_tiny, tmp_path / "int4", "int4")
    names = [f"language_model.model.layers.{n}.self_attn.{p}_proj" for n in range(4) for p in "qkvo"]

    def explicit(config):
        ignore = config["quantization_config"]["ignore"]
        ignore.remove("re:.*self_attn.*")
        ignore += names

    checkpoints.edit_config(quantized, explicit)
    run(quantized, tmp_path / "text", "compressed-tensors", text_only=True)
    config = json.loads((tmp_path / "text" / "config.json").read_text())
    assert names[0].removeprefix("language_model.") in config["quantization_config"]["ignore"]
    text, whole = open_checkpoint(tmp_path / "text"), open_checkpoint(quantized)
    for name in text.tensors():
        prefix = name.rpartition(".")[0]
        assert text.linear_format(prefix) == whole.linear_format(prefix)
        assert torch.equal(text.read(name), whole.read(name))


def test_what_does_not_go_together(scout_tiny, tmp_path):
    with pytest.raises(UsageError, match="is not quantized") as error:
        run(scout_tiny, tmp_path / "out", "compressed-tensors")
    assert "l4tool quantize" in error.value.hint
    with pytest.raises(UsageError, match="--shards does not go with --to hf"):
        run(scout_tiny, tmp_path / "out", "hf", shards=2)
    with pytest.raises(UsageError, match="lies inside the source"):
        run(scout_tiny, scout_tiny / "out", "hf")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    with pytest.raises(WriteError, match="is not empty"):
        run(scout_tiny, tmp_path / "full", "hf")
    assert not (tmp_path / "out").exists()


def test_again_and_otherwise(scout_tiny, tmp_path, capsys):
    first = run(scout_tiny, tmp_path / "out", "hf-experts")
    again = run(scout_tiny, tmp_path / "out", "hf-experts")
    assert again["output"] == first["output"] and "already complete" in capsys.readouterr().err
    with pytest.raises(WriteError, match=r"complete run: it was begun with other options \(to\)"):
        run(scout_tiny, tmp_path / "out", "hf")
    run(scout_tiny, tmp_path / "out", "hf", How(force=True))
    assert open_checkpoint(tmp_path / "out").layout == "hf"


def test_a_quantize_run_is_not_carried_on_by_convert(scout_tiny, tmp_path):
    from quant import pipeline
    from quant.schemes import make_recipe

    pipeline.quantize(open_checkpoint(scout_tiny), tmp_path / "out", make_recipe("fp8"), pipeline.Options())
    with pytest.raises(WriteError, match="it was begun by l4tool quantize"):
        run(scout_tiny, tmp_path / "out", "hf")


def test_licence_files_of_a_llama(scout_tiny, tmp_path, capsys):
    source = checkpoints.copy(scout_tiny, tmp_path / "source")
    (source / "README.md").write_text("---\nlicense: other\nlicense_name: llama4\n---\n# A model\n")
    run(source, tmp_path / "mine", "hf-experts")
    said = capsys.readouterr().err
    assert "has no LICENSE" in said and 'must begin with "Llama"' in said
    assert "Llama 4 Community License" in (tmp_path / "mine" / "NOTICE").read_text()
    assert (tmp_path / "mine" / "README.md").read_bytes() == (source / "README.md").read_bytes()
    report = json.loads((tmp_path / "mine" / journal.REPORT).read_text())
    assert report["license"]["missing"] == ["LICENSE", "USE_POLICY"]
    (source / "LICENSE").write_text("LLAMA 4 COMMUNITY LICENSE AGREEMENT\n")
    (source / "USE_POLICY.md").write_text("policy\n")
    again = run(source, tmp_path / "mine", "hf-experts")
    assert again["license"]["missing"] == [] and (tmp_path / "mine" / "LICENSE").exists()


def test_name_map(scout_tiny):
    job = Conversion(open_checkpoint(scout_tiny), Options("hf-experts", text_only=True), How())
    each = name_map(job, each=True)
    assert len(each) == sum(map(len, job.plan.items))
    lines = [render_line(line) for line in name_map(job, each=False)]
    assert (
        "model.layers.{0-3}.feed_forward.experts.{0-3}.gate_proj.weight  384×256 BF16  "
        "← language_model.model.layers.{0-3}.feed_forward.experts.gate_up_proj" in lines
    )
    assert "model.norm.weight  256 BF16  ← language_model.model.norm.weight" in lines


def test_tied_embeddings(scout_tiny_text, tmp_path):
    source = checkpoints.copy(scout_tiny_text, tmp_path / "source")
    stored = checkpoints.load(source)
    del stored["lm_head.weight"]
    checkpoints.save(source, stored)
    checkpoints.edit_config(source, lambda config: config.update(tie_word_embeddings=True))
    run(source, tmp_path / "out", "hf-experts")
    assert "lm_head.weight" not in checkpoints.load(tmp_path / "out")
    assert open_checkpoint(tmp_path / "out").arch == open_checkpoint(source).arch


def test_eyes_of_another(scout_tiny, tmp_path):
    """Cut to text and given its tower back: the source again."""
    from converters.graft import Grafted

    run(scout_tiny, tmp_path / "text", "hf", text_only=True)
    reader = Grafted(open_checkpoint(tmp_path / "text"), open_checkpoint(scout_tiny))
    convert(reader, tmp_path / "whole", Options("hf", shard_bytes=4 * 10**6), How())
    assert_same(tensors(scout_tiny), tensors(tmp_path / "whole"))
    assert open_checkpoint(tmp_path / "whole").arch == open_checkpoint(scout_tiny).arch
    assert (tmp_path / "whole" / "preprocessor_config.json").exists()
    with pytest.raises(UsageError, match="has a vision tower of its own"):
        Grafted(open_checkpoint(scout_tiny), open_checkpoint(scout_tiny))
    with pytest.raises(UsageError, match="has no vision tower"):
        Grafted(open_checkpoint(tmp_path / "text"), open_checkpoint(tmp_path / "text"))
    shutil.rmtree(tmp_path / "text")
    small = checkpoints.make(tmp_path / "small", text_only=True)
    checkpoints.edit_config(small, lambda config: config.update(dtype="bfloat16"))
    other = open_checkpoint(small)
    other.arch = replace(other.arch, text=replace(other.arch.text, hidden_size=128))
    with pytest.raises(UsageError, match="hidden_size 256"):
        Grafted(other, open_checkpoint(scout_tiny))


def test_another_vision_tower_is_another_source(scout_tiny, tmp_path):
    """A finished graft is not taken for one with other eyes, though file names are the same in both."""
    from converters.graft import Grafted

    run(scout_tiny, tmp_path / "text", "hf", text_only=True)
    other = checkpoints.make(tmp_path / "other", seed=7)
    for eyes in (scout_tiny, other):
        reader = Grafted(open_checkpoint(tmp_path / "text"), open_checkpoint(eyes))
        if eyes is other:
            with pytest.raises(WriteError, match="the source has changed"):
                convert(reader, tmp_path / "whole", Options("hf"), How())
        else:
            convert(reader, tmp_path / "whole", Options("hf"), How())
