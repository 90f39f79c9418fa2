"""Meta's layout against Meta's code: its modules load what we write and compute the same, its resharding cuts alike."""

import io
import json
import pickle
import zipfile
from dataclasses import replace

import pytest
import torch

from converters.arch_io import arch_from_config
from converters.conversion import How, check_options, convert
from converters.detect import open_checkpoint, open_source
from converters.hf_config import hf_config
from converters.meta_names import is_dropped, meta_rows
from converters.meta_params import arch_from_params, params_from_arch
from converters.pth_io import PthFile, plan_pth
from converters.targets import Options
from converters.writer import TensorSpec
from l4tool.core.errors import CheckpointError, InputMissing, UsageError
from tests import checkpoints
from tests.converters import meta_code, published
from tests.converters.test_conversion import assert_same, tensors


@pytest.fixture(scope="module", params=["scout", "maverick"])
def source(request, tmp_path_factory):
    """A tiny checkpoint whose rope scaling is one that Meta's code can do."""
    folder = checkpoints.make(tmp_path_factory.mktemp("source") / "model", arch=request.param)

    def scaled(config):
        rope = config["text_config"]["rope_parameters"]
        if "original_max_position_embeddings" in rope:
            rope["original_max_position_embeddings"] = 8192

    return checkpoints.edit_config(folder, scaled)


@pytest.fixture(scope="module")
def folders(source, tmp_path_factory):
    """Number of files → the checkpoint in Meta's layout."""
    parent = tmp_path_factory.mktemp("meta")
    for shards in (1, 2):
        to_meta(source, parent / str(shards), shards=shards)
    return {shards: parent / str(shards) for shards in (1, 2)}


def to_meta(source, out, **options):
    return convert(open_checkpoint(source), out, check_options(Options("meta", **options)), How())


def load(folder, rank=0):
    return torch.load(folder / f"consolidated.{rank:02d}.pth", weights_only=True)


def save(folder, contents, rank=0):
    torch.save(contents, folder / f"consolidated.{rank:02d}.pth")


@pytest.mark.parametrize("shards", [1, 2])
def test_there_and_back_is_the_same_checkpoint(shards, source, folders, tmp_path):
    """Byte for byte: shards, index, tokenizer; config.json says the same architecture."""
    convert(open_source(folders[shards]), tmp_path / "back", Options("hf", shard_bytes=4 * 10**6), How())
    for path in source.iterdir():
        if path.suffix == ".safetensors" or path.name in ("tokenizer.json", "model.safetensors.index.json"):
            assert path.read_bytes() == (tmp_path / "back" / path.name).read_bytes(), path.name
    assert used(open_checkpoint(tmp_path / "back").arch) == used(open_checkpoint(source).arch)


def used(arch):
    """Without the size of dense layers where there are none: Meta's params.json has no place for it."""
    has_dense = len(arch.text.moe_layers) < arch.text.num_layers
    return arch if has_dense else replace(arch, text=replace(arch.text, intermediate_size_mlp=0))


def test_eight_files_there_and_back(tmp_path):
    """The published number of files, on sizes that eight divides."""
    from examples import make_checkpoint

    sizes = (512, 256, 512, 8, 8, 64, 32, 16, 4096)
    real = make_checkpoint.text_config

    def wide(*args):
        columns = ("hidden_size", "intermediate_size", "intermediate_size_mlp", "num_attention_heads",
                   "num_key_value_heads", "head_dim", "attention_chunk_size", "floor_scale",
                   "max_position_embeddings")  # fmt: skip
        config = real(*args) | dict(zip(columns, sizes, strict=True))
        config["rope_parameters"] = {"rope_type": "default", "rope_theta": 500000.0}
        return config

    make_checkpoint.text_config = wide
    try:
        source = checkpoints.make(tmp_path / "model", text_only=True, layers=2, arch="maverick")
    finally:
        make_checkpoint.text_config = real
    to_meta(source, tmp_path / "meta")
    assert len(list((tmp_path / "meta").glob("consolidated.*.pth"))) == 8
    for rank in (0, 3, 7):  # names and local shapes are those of Meta's modules
        with meta_code.parallel(8, rank):
            meta_code.transformer(tmp_path / "meta", rank)
    assert_same(tensors(source), read_all(tmp_path / "meta"))


def read_all(folder):
    reader = open_source(folder)
    return {name: reader.read(name).clone() for name in reader.tensors()}


def test_rows_of_a_tensor_are_read_alone(source, folders):
    whole, cut = open_source(folders[1]), open_source(folders[2])
    for name, info in whole.tensors().items():
        rows = slice(info.shape[0] // 3, info.shape[0] // 2 + 1)
        assert torch.equal(whole.read(name)[rows], cut.read(name, rows)), name


def test_metas_resharding_agrees(folders):
    """Its code makes our one file of our two, and our two of our one."""
    pytest.importorskip("fairscale")
    from llama_models.checkpoint import convert_moe_weights, reshard_mp

    experts = json.loads((folders[1] / "params.json").read_text())["moe_args"]["num_experts"]
    one, two = load(folders[1]), [load(folders[2], rank) for rank in (0, 1)]
    joined = reshard_mp([convert_moe_weights(dict(part), experts) for part in two], size=1, rank=0)
    assert joined.keys() == one.keys()
    for name, tensor in one.items():
        assert torch.equal(joined[name].reshape(tensor.shape), tensor), name
    for rank in (0, 1):
        cut = reshard_mp([convert_moe_weights(dict(one), experts)], size=2, rank=rank)
        for name, tensor in two[rank].items():
            assert torch.equal(cut[name].reshape(tensor.shape), tensor), name


def random_ids():
    """Past two attention chunks and five steps of the temperature."""
    return torch.randint(0, 2000, (80,), generator=torch.Generator().manual_seed(1)).tolist()


def transformers_logits(source, ids):
    from transformers import Llama4ForConditionalGeneration

    model = Llama4ForConditionalGeneration.from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0]


def test_metas_transformer_computes_what_transformers_does(source, folders):
    """Strictly loaded; logits in float32."""
    with meta_code.parallel():
        found = meta_code.logits(meta_code.transformer(folders[1]), random_ids())
    expected = transformers_logits(source, random_ids())
    assert (found - expected).abs().max() <= 2e-4 * expected.abs().max()


def one_rank(rank, folder, init, results):
    torch.set_num_threads(1)
    with meta_code.parallel(2, rank, init):
        out = meta_code.logits(meta_code.transformer(folder, rank), random_ids())
        if rank == 0:
            torch.save(out, results)


def test_two_ranks_compute_the_same_together(source, folders, tmp_path):
    """Two processes, each with its file: every piece must be the one that the other rank does not have."""
    pytest.importorskip("fairscale")
    arguments = (folders[2], str(tmp_path / "init"), str(tmp_path / "logits.pt"))
    torch.multiprocessing.spawn(one_rank, arguments, nprocs=2)
    expected = transformers_logits(source, random_ids())
    assert (torch.load(tmp_path / "logits.pt") - expected).abs().max() <= 2e-4 * expected.abs().max()


def test_vision_of_metas_transformer(source, folders):
    """Features of a tile out of its vision modules equal those of transformers."""
    from transformers import Llama4ForConditionalGeneration

    pixels = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(2))
    theirs = Llama4ForConditionalGeneration.from_pretrained(source, dtype=torch.float32)
    with meta_code.parallel(), torch.no_grad():
        model = meta_code.transformer(folders[1])
        vision = model.vision_embeddings.float()
        found = model.vision_projection(vision.vision_adapter(vision.vision_encoder(pixels[None, None])))
        expected = theirs.multi_modal_projector(theirs.vision_model(pixels).last_hidden_state)
    assert (found.view(-1) - expected.view(-1)).abs().max() <= 2e-4 * expected.abs().max()


@pytest.mark.parametrize("config", [published.scout(), published.maverick()], ids=["scout", "maverick"])
def test_params_of_the_published_models(config):
    """The fields that Meta's code computes sizes from come out as published, and back to the same architecture."""
    arch = arch_from_config(config, "config.json")
    params = params_from_arch(arch)
    assert (params["ffn_exp"], params["ffn_dim_multiplier"], params["multiple_of"]) == (4, 1.2, 2048)
    assert "max_position_embeddings" not in params
    assert arch_from_params(params, "params.json") == arch
    assert arch_from_config(hf_config(arch), "config.json") == arch
    bare = {k: v for k, v in params.items() if not k.startswith(("rope_scaling", "rope_high", "attn_temp"))}
    assert arch_from_params({"model": bare}, "params.json") == arch  # as the published params.json has it


def test_sizes_of_the_published_models():
    """Eight files of Scout: the shapes that the published shards have."""
    arch = arch_from_config(published.scout(), "config.json")
    rows = {row.stored: row.shape for row in meta_rows(arch, 8)[3]}
    assert rows["tok_embeddings.weight"] == (25256, 5120)
    assert rows["layers.0.attention.wqkv.weight"] == (896, 5120)
    assert rows["layers.0.feed_forward.experts.moe_w_in_eD_F"] == (16 * 5120, 1024)
    assert rows["layers.0.feed_forward.experts.moe_w_out_eF_D"] == (16 * 1024, 5120)


@pytest.mark.parametrize("name", ["rope.freqs", "layers.7.attention.wo._extra_state",
                                  "layers.0.feed_forward.global_gate_stats_3E",
                                  "layers.12.feed_forward.expert_activation_DE"])  # fmt: skip
def test_what_is_left_out_on_purpose(name, folders, tmp_path):
    copy = checkpoints.copy(folders[2], tmp_path / "copy")
    contents = load(copy, 1) | {name: io.BytesIO(b"state") if "extra" in name else torch.zeros(3)}
    save(copy, contents, 1)
    assert is_dropped(name)
    assert open_source(copy).tensors().keys() == open_source(folders[2]).tensors().keys()


def spoil(contents, kind):
    if kind == "missing":
        del contents["norm.weight"]
    elif kind == "unknown":
        contents["layers.0.attention.surprise"] = torch.zeros(3)
    elif kind == "shape":
        contents["norm.weight"] = contents["norm.weight"][:-1].clone()
    elif kind == "dtype":
        contents["norm.weight"] = contents["norm.weight"].float()
    elif kind == "differs":
        contents["norm.weight"] = contents["norm.weight"] + 1
    elif kind == "strided":
        contents["output.weight"] = contents["output.weight"].T.contiguous().T
    return contents


@pytest.mark.parametrize(
    ("kind", "said"),
    [("missing", "lacks 1 tensor.*norm.weight"), ("unknown", "does not have: layers.0.attention.surprise"),
     ("shape", "'norm.weight' has shape"), ("dtype", "'norm.weight' is F32"), ("differs", "differs from that of"),
     ("strided", "does not lie there in one piece")],
)  # fmt: skip
def test_faults_are_named(kind, said, folders, tmp_path):
    copy = checkpoints.copy(folders[2], tmp_path / "copy")
    save(copy, spoil(load(copy, 1), kind), 1)
    with pytest.raises(CheckpointError, match=said):
        open_source(copy)


def test_broken_files(folders, tmp_path):
    copy = checkpoints.copy(folders[2], tmp_path / "copy")
    path = copy / "consolidated.01.pth"
    whole = path.read_bytes()
    for data in (b"", b"rubbish" * 100, whole[: len(whole) // 2], whole[1000:]):
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=r"consolidated.01.pth is not a sound .pth file"):
            open_source(copy)
    path.rename(copy / "consolidated.02.pth")
    with pytest.raises(InputMissing, match=r"consolidated.01.pth is missing"):
        open_source(copy)


class Evil:
    """Runs code when it is unpickled, if anybody lets it."""

    def __reduce__(self):
        return (print, ("executed",))


def test_a_pickle_that_would_run_code_is_refused(folders, tmp_path, capsys):
    copy = checkpoints.copy(folders[1], tmp_path / "copy")
    save(copy, load(copy) | {"norm.weight": Evil()})
    with pytest.raises(CheckpointError, match="its pickle wants to run"):
        open_source(copy)
    (copy / "consolidated.00.pth").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError):
        open_source(copy)
    assert "executed" not in capsys.readouterr().out


def test_written_files_are_sound_archives(folders):
    for rank in (0, 1):
        with zipfile.ZipFile(folders[2] / f"consolidated.{rank:02d}.pth") as archive:
            assert archive.testzip() is None
        assert torch.load(folders[2] / f"consolidated.{rank:02d}.pth", weights_only=True, mmap=True).keys()


def test_a_file_larger_than_memory(tmp_path):
    """600 GB, planned only: a sparse file of the planned size, with everything but the tensors written, opens."""
    specs = [TensorSpec("a", (3 * 10**11,), torch.bfloat16), TensorSpec("b", (5, 3), torch.bfloat16)]
    plan = plan_pth("consolidated.00.pth", specs)
    with open(tmp_path / plan.file_name, "wb") as file:
        file.truncate(plan.nbytes)
        for at, data in ((0, plan.header), *plan.rest):
            file.seek(at)
            file.write(data)
    found = PthFile(tmp_path / plan.file_name).tensors
    assert {name: (t.shape, t.start) for name, t in found.items()} == {
        spec.name: (spec.shape, plan.starts[spec.name]) for spec in specs
    }
    assert plan == plan_pth("consolidated.00.pth", specs)  # resuming needs the same bytes


def test_fp8_experts_with_metas_scales(source, folders, tmp_path):
    """Laid out as llama-models' quantize script writes them: experts turned, quantized by rows, turned back."""
    copy = checkpoints.copy(folders[2], tmp_path / "copy")
    params = json.loads((copy / "params.json").read_text())
    experts, dim = params["moe_args"]["num_experts"], params["dim"]
    names = {"moe_w_in_eD_F": ("w1", dim), "moe_w_swiglu_eD_F": ("w3", dim), "moe_w_out_eF_D": ("w2", None)}
    expected = {}
    for rank in (0, 1):
        contents, scales = load(copy, rank), {}
        for key in [key for key in contents if key.startswith("layers.1.feed_forward.experts.")]:
            short, rows = names[key.rpartition(".")[2]]
            weight = contents[key].view(experts, rows or -1, contents[key].shape[1]).transpose(1, 2)
            scale = weight.abs().amax(-1).float() / 448
            quantized = (weight.float() / scale[..., None]).to(torch.float8_e4m3fn)
            contents[key] = quantized.transpose(1, 2).reshape(contents[key].shape).contiguous()
            scales[f"layers.1.feed_forward.experts.{short}"] = scale
            expected[rank, key.rpartition(".")[2]] = (quantized.float() * scale[..., None]).bfloat16()
        save(copy, contents, rank)
        torch.save(scales, copy / f"fp8_scales_{rank}.pt")
    reader = open_source(copy)
    base = "language_model.model.layers.1.feed_forward.experts."
    for e in range(experts):
        gate = torch.cat([expected[rank, "moe_w_in_eD_F"][e] for rank in (0, 1)])
        assert torch.equal(reader.read(f"{base}{e}.gate_proj.weight"), gate)
        assert torch.equal(reader.read(f"{base}{e}.gate_proj.weight", slice(7, 300)), gate[7:300])
        down = torch.cat([expected[rank, "moe_w_out_eF_D"][e] for rank in (0, 1)], dim=1)
        assert torch.equal(reader.read(f"{base}{e}.down_proj.weight", slice(3, 90)), down[3:90])
    convert(reader, tmp_path / "hf", Options("hf"), How())
    assert_same({name: reader.read(name) for name in reader.tensors()}, tensors(tmp_path / "hf"))
    (copy / "fp8_scales_1.pt").unlink()
    with pytest.raises(InputMissing, match=r"fp8_scales_1.pt does not exist"):
        open_source(copy)


def test_what_meta_cannot_say(scout_tiny, tmp_path):
    with pytest.raises(UsageError, match="Meta's code fixes rope scaling"):
        to_meta(scout_tiny, tmp_path / "out", shards=2)
    with pytest.raises(UsageError, match="8 files do not divide num_key_value_heads 2") as error:
        to_meta(scout_tiny, tmp_path / "out")
    assert error.value.hint == "use --shards 2"


def test_params_are_checked(folders):
    params = json.loads((folders[1] / "params.json").read_text())
    for change, said in [
        ({"surprise": 1}, "unknown field 'surprise'"),
        ({"dim": "x"}, "dim must be an integer"),
        ({"moe_args": None}, "moe_args must be"),
        ({"lora_args": {"rank": 4}}, "lora_args is not supported"),
    ]:
        with pytest.raises(CheckpointError, match=said):
            arch_from_params(params | change, "params.json")


def test_other_commands_say_what_to_type(folders):
    with pytest.raises(CheckpointError, match="Meta's layout") as error:
        open_checkpoint(folders[1])
    assert error.value.hint == f"l4tool convert {folders[1]} -o OUT --to hf"
