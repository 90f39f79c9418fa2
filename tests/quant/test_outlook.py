"""What `plan` says about sizes is what `quantize` writes, and what the published models are known to take."""

import json
import shutil

import pytest
import torch

from converters.arch_io import arch_from_config
from converters.config_only import ConfigOnly
from converters.detect import open_checkpoint
from converters.names import hf_rows
from converters.writer import ShardFile, TensorSpec, plan_shards, write_index
from l4tool.core.errors import CheckpointError, InputMissing, UsageError, WriteError
from l4tool.hub.client import Hub
from l4tool.hub.names import RepoSpec
from quant import outlook, pipeline
from quant.fitting import Demand, Hardware
from quant.from_hub import Download, quantize_repo
from quant.gpus import parse_gpu
from quant.schemes import make_recipe
from tests import checkpoints
from tests.converters import published
from tests.hub.server import HubServer

GIB = 2**30


def question(gpu="h100", count=1, context=4096, concurrency=1, **options):
    return outlook.Question(
        Hardware(parse_gpu(gpu), count), Demand(context, concurrency), **({"memory_bytes": 8 * GIB} | options)
    )


def file_bytes(folder):
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


RECIPES = {
    "int4": {"scheme": "int4"},
    "int4 experts, fp8 attention": {"scheme": "int4", "shared_experts": False, "attention": "fp8"},
    "mixed": {"scheme": "mixed"},
    "fp8": {"scheme": "fp8"},
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
@pytest.mark.parametrize("source", ["scout_tiny", "maverick_tiny", "scout_tiny_text"])
def test_sizes_are_those_that_quantize_writes(source, recipe, request, tmp_path):
    """Files and tensors on disk to the byte; weights on a GPU the same before and after; disk as asked for."""
    reader, recipe, out = open_checkpoint(request.getfixturevalue(source)), make_recipe(**recipe), tmp_path / "out"
    before = outlook.quantized(reader, recipe, question())
    report = pipeline.quantize(reader, out, recipe, pipeline.Options())
    after = outlook.stored(open_checkpoint(out), question())
    assert before.file_bytes == file_bytes(out) == after.file_bytes
    assert before.tensor_bytes == report["totals"]["output_bytes"] == after.tensor_bytes
    assert before.fitting == after.fitting
    whole = sum(path.stat().st_size for path in out.iterdir())
    assert whole <= before.making.disk_bytes
    sizes = [path.stat().st_size for path in reader.weight_files()]
    assert before.making.source_file_bytes == sum(sizes) == file_bytes(reader.path)
    streamed = before.making.streaming_disk_bytes - before.making.disk_bytes
    assert max(sizes) < streamed <= sum(sorted(sizes)[-3:])


def test_the_disk_named_is_the_disk_that_quantize_asks_for(tmp_path, monkeypatch):
    """One byte less is refused, from a folder and from a repository; that much is enough."""
    source = checkpoints.make(tmp_path / "source", shard_bytes=1_500_000)
    reader, recipe = open_checkpoint(source), make_recipe("int4")
    making = outlook.quantized(reader, recipe, question()).making
    free = {"bytes": 0}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, free["bytes"]))

    def from_folder(out):
        pipeline.quantize(reader, out, recipe, pipeline.Options())

    with HubServer() as server:
        server.add_repo("demo/Random-Scout", source)
        hub = Hub(server.url)

        def from_hub(out):
            quantize_repo(hub, RepoSpec("demo/Random-Scout"), out, recipe, pipeline.Options(), Download())

        for run, needed in ((from_folder, making.disk_bytes), (from_hub, making.streaming_disk_bytes)):
            free["bytes"] = needed - 1
            with pytest.raises(WriteError, match="still to be written"):
                run(tmp_path / f"{run.__name__}-refused")
            free["bytes"] = needed
            run(tmp_path / run.__name__)
            assert file_bytes(tmp_path / run.__name__) < needed


def sparse(folder, config):
    """A checkpoint of real size that takes no room."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    rows = hf_rows(arch_from_config(config, "config.json"))
    plans = plan_shards([TensorSpec(row.stored, row.shape, torch.bfloat16) for row in rows])
    for plan in plans:
        shard = ShardFile(folder, plan)
        for spec in plan.specs:
            shard.mark(spec.name)
        shard.finish()
    write_index(folder, plans)
    return folder


@pytest.fixture(scope="module")
def scout(tmp_path_factory):
    return open_checkpoint(sparse(tmp_path_factory.mktemp("sparse") / "scout", published.scout()))


@pytest.fixture(scope="module")
def maverick(tmp_path_factory):
    return open_checkpoint(sparse(tmp_path_factory.mktemp("sparse") / "maverick", published.maverick()))


@pytest.mark.parametrize(
    ("recipe", "scout_gb", "maverick_gb"),
    [
        ({"scheme": "int4", "shared_experts": False}, 73.8, 229),
        ({"scheme": "int4"}, 64.9, 216),
        ({"scheme": "mixed", "attention": "fp8"}, 64.8, 217),
        ({"scheme": "fp8"}, 114.6, 408),
        ({"scheme": "fp8", "attention": "fp8"}, 111.6, 405),
    ],
)
def test_sizes_of_the_published_models(recipe, scout_gb, maverick_gb, scout, maverick):
    """The table in docs/formats.md, for folders of the real size."""
    small = outlook.quantized(scout, make_recipe(**recipe), question())
    assert small.file_bytes / 1e9 == pytest.approx(scout_gb, abs=0.06)
    large = outlook.quantized(maverick, make_recipe(**recipe), question(count=8))
    assert large.file_bytes / 1e9 == pytest.approx(maverick_gb, abs=0.6)
    assert 0 < large.file_bytes - large.tensor_bytes < 20e6  # headers


def test_weights_of_scout_on_a_gpu(scout):
    """What Scout's weights are known to take."""
    cases = [
        ({"scheme": "int4", "shared_experts": False}, 68.8),
        ({"scheme": "int4"}, 60.4),
        ({"scheme": "fp8", "shared_experts": False}, 112),
    ]
    for recipe, gib in cases:
        found = outlook.quantized(scout, make_recipe(**recipe), question())
        assert found.fitting.weight_bytes / GIB == pytest.approx(gib, rel=0.005)


def test_the_published_models_as_they_are(scout, maverick):
    assert outlook.stored(scout, question()).file_bytes / GIB == pytest.approx(202.4, abs=0.1)
    assert outlook.stored(maverick, question()).file_bytes / 1e9 == pytest.approx(803.2, abs=0.1)
    assert outlook.num_parameters(scout) / 1e9 == pytest.approx(108.6, abs=0.1)


def test_a_config_alone_gives_the_same_answer(scout, tmp_path):
    path = tmp_path / "any.json"
    path.write_text(json.dumps(published.scout()))
    alone = ConfigOnly(path)
    for scheme in ("int4", "mixed", "fp8"):
        recipe = make_recipe(scheme)
        theirs, ours = outlook.quantized(scout, recipe, question()), outlook.quantized(alone, recipe, question())
        assert (ours.file_bytes, ours.fitting, ours.would_fit) == (theirs.file_bytes, theirs.fitting, theirs.would_fit)
        assert ours.making.streaming_disk_bytes is None
    assert outlook.stored(alone, question()).fitting == outlook.stored(scout, question()).fitting
    with pytest.raises(InputMissing, match="without weights"):
        alone.read("language_model.model.norm.weight")


def test_a_quantized_config_is_refused(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(published.scout() | {"quantization_config": {}}))
    with pytest.raises(CheckpointError, match="quantized"):
        ConfigOnly(path)


def test_memory_is_the_pipelines_own_budget(scout):
    recipe = make_recipe("int4")
    for memory_bytes, jobs in ((8 * GIB, 2), (700 * 2**20, 16), (2 * GIB, 256)):
        making = outlook.quantized(scout, recipe, question(memory_bytes=memory_bytes, jobs=jobs)).making
        assert making.memory_bytes <= memory_bytes and making.pieces_at_once <= jobs
    with pytest.raises(UsageError, match="too little"):
        outlook.quantized(scout, recipe, question(memory_bytes=100 * 2**20))


def test_time_is_the_slower_of_kernels_and_disk(scout):
    recipe = make_recipe("int4")
    making = outlook.quantized(scout, recipe, question()).making
    assert making.seconds == pytest.approx(217.3 / making.gigabytes_per_s, rel=0.01) and not making.limited_by_disk
    slow = outlook.quantized(scout, recipe, question(disk_bytes_per_s=100 * 10**6)).making
    assert slow.seconds == pytest.approx((217.3 + 64.9) * 10, rel=0.01) and slow.limited_by_disk
    fast = outlook.quantized(scout, recipe, question(disk_bytes_per_s=10**12)).making
    assert fast.seconds == making.seconds and not fast.limited_by_disk


def test_a_scheme_that_does_not_apply(scout_tiny, tmp_path):
    quantized = tmp_path / "out"
    pipeline.quantize(open_checkpoint(scout_tiny), quantized, make_recipe("fp8"), pipeline.Options())
    with pytest.raises(UsageError, match="already"):
        outlook.require_unquantized(open_checkpoint(quantized), "int4")
    with pytest.raises(UsageError, match="group size 1024"):
        outlook.quantized(open_checkpoint(scout_tiny), make_recipe("int4", group_size=1024), question())


def test_a_tied_checkpoint(tmp_path):
    """The engine copies the embedding for lm_head; the disk holds it once."""
    folder = checkpoints.make(tmp_path / "model", text_only=True, layers=1, experts=2)
    untied = outlook.stored(open_checkpoint(folder), question())
    tensors = checkpoints.load(folder)
    lm_head = tensors.pop("lm_head.weight")
    checkpoints.edit_config(checkpoints.save(folder, tensors), lambda config: config.update(tie_word_embeddings=True))
    tied = outlook.stored(open_checkpoint(folder), question())
    assert tied.tensor_bytes == untied.tensor_bytes - lm_head.nbytes
    assert tied.fitting.weight_bytes == untied.fitting.weight_bytes
