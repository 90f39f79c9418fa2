"""`l4tool quantize` end to end: what it writes, prints and refuses."""

import hashlib
import json
import os
import re
import shutil
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from converters.detect import open_checkpoint
from converters.writing import checks
from l4tool.core.errors import CheckpointError, WriteError
from l4tool.main import main
from quant import ops, pipeline, reference
from quant.schemes import make_recipe, quantization_config
from tests import checkpoints

BAD_OPTIONS = [
    ([], 64, "--int4, --fp8 and --mixed"),
    (["--int4", "--fp8"], 64, "exclude each other"),
    (["--int4", "--scale", "hqq"], 64, "--format quanto --scale hqq"),
    (["--fp8", "--format", "quanto", "--scale", "mse"], 64, "absmax"),
    (["--int4", "--group-size", "12"], 64, "multiple of 8"),
    (["--int4", "--group-size", "96"], 64, "does not divide the 256 inputs of language_model"),
    (["--mixed", "--no-shared-experts"], 64, "--int4 --no-shared-experts"),
    (["--int4", "--memory", "1MB"], 64, "too little"),
    (["--int4", "--memory", "lots"], 64, "not a size"),
    (["--int4", "--format", "quanto", "--group-size", "64"], 64, "128"),
    (["--int4", "--attention", "int4"], 64, "attention"),
]  # fmt: skip


def run(*arguments):
    return main(["quantize", *map(str, arguments)])


def test_output_folder(scout_tiny, tmp_path, capsys):
    out = tmp_path / "new" / "out"
    old = os.umask(0o027)
    try:
        assert run(scout_tiny, "-o", out, "--int4") == 0
    finally:
        os.umask(old)
    files = {path.name: path for path in out.iterdir()}
    copied = {p.name for p in scout_tiny.iterdir() if p.suffix != ".safetensors"}
    assert files.keys() == copied | {"model-00001-of-00001.safetensors", "l4tool-report.json", "README.source.md"}
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o640 for path in files.values())
    for name in ("tokenizer.json", "chat_template.jinja", "preprocessor_config.json", "generation_config.json"):
        assert files[name].read_bytes() == (scout_tiny / name).read_bytes()
    config, source = json.loads(files["config.json"].read_text()), json.loads((scout_tiny / "config.json").read_text())
    assert config.pop("quantization_config") == quantization_config(make_recipe("int4"))
    assert config == source
    printed = capsys.readouterr().out
    assert re.search(r"size before +17\.\d MiB\nsize after +8\.\d+ MiB\nratio +0\.5\d\d\n", printed)
    assert re.search(r"fits an 80 GB H100 +yes, 4,096 KV tokens left \(8\.42 GiB reserved\)", printed)
    assert len(re.findall(r"_proj\.weight +int4 +0\.1\d+ +1\d\.\d dB", printed)) == 5


@pytest.mark.parametrize("fixture", ["scout_tiny", "maverick_tiny", "scout_tiny_text"])
def test_every_tensor_against_the_specification(fixture, request, tmp_path):
    source = request.getfixturevalue(fixture)
    assert run(source, "-o", tmp_path / "out", "--mixed") == 0
    recipe, reader, done = make_recipe("mixed"), open_checkpoint(source), open_checkpoint(tmp_path / "out")
    stored = checkpoints.load(tmp_path / "out")
    report = json.loads((tmp_path / "out" / "l4tool-report.json").read_text())
    prefix = "" if reader.arch.vision is not None else "language_model."
    seen = set()
    for name in reader.tensors():
        base, weight = name.removeprefix(prefix), reader.read(name).contiguous()
        kind = recipe.kind_of(name)
        if kind == "bf16":
            assert torch.equal(stored[base], weight)
            seen.add(base)
            continue
        if kind == "int4":
            q, scale = reference.int4_quantize(weight, 128, "mse")
            assert torch.equal(stored[base + "_packed"], reference.int4_pack(q))
            assert stored[base + "_shape"].tolist() == list(weight.shape)
            seen |= {base + "_packed", base + "_shape", base + "_scale"}
            back = reference.int4_dequantize(q, scale)
        else:
            q, scale = reference.fp8_quantize(weight)
            assert torch.equal(stored[base].view(torch.uint8), q.view(torch.uint8))
            seen |= {base, base + "_scale"}
            back = reference.fp8_dequantize(q, scale)
        assert torch.equal(stored[base + "_scale"], scale)
        relative = float((back.double() - weight.double()).norm() / weight.double().norm())
        assert report["tensors"][name]["relative_error"] == pytest.approx(relative, rel=1e-5)
        assert report["tensors"][name]["kind"] == kind
    assert seen == stored.keys()
    assert done.layout == "compressed-tensors"


def test_report(scout_tiny, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(scout_tiny, "-o", out, "--int4", "--memory", "2GiB") == 0
    report = json.loads((out / "l4tool-report.json").read_text())
    tensors = [entry["relative_error"] for entry in report["tensors"].values()]
    assert report["totals"]["quantized_tensors"] == len(tensors) == 4 * (4 + 1) * 3
    assert report["totals"]["worst_relative_error"] == max(tensors)
    assert report["totals"]["mean_relative_error"] == pytest.approx(sum(tensors) / len(tensors))
    size = sum(t.nbytes for p in out.glob("*.safetensors") for t in load_file(p).values())
    assert report["totals"]["output_bytes"] == size
    assert set(report["job"]["source"]) >= {"config.json", *(p.name for p in scout_tiny.glob("*.safetensors"))}
    assert report["run"]["command"].startswith("l4tool")
    for name, entry in report["output"].items():
        raw = (out / name).read_bytes()
        assert len(raw) == entry["size"]
        start = 8 + int.from_bytes(raw[:8], "little")
        spans = sorted(e["data_offsets"] for k, e in json.loads(raw[8:start]).items() if k != "__metadata__")
        parts = b"".join(hashlib.sha256(raw[start + a : start + b]).digest() for a, b in spans)
        assert hashlib.sha256(raw[:start] + parts).hexdigest() == entry["digest"]


def test_dry_run_writes_nothing(maverick_tiny, tmp_path, capsys):
    assert run(maverick_tiny, "-o", tmp_path / "out", "--mixed", "--dry-run") == 0
    assert not (tmp_path / "out").exists()
    printed = capsys.readouterr().out
    assert re.search(r"attention +bfloat16 +1\.5 MiB +1\.5 MiB", printed)
    assert re.search(r"shared +fp8 ", printed) and re.search(r"experts +int4 ", printed)
    assert run(maverick_tiny, "--mixed", "--dry-run") == 0
    assert capsys.readouterr().out == printed
    assert run(maverick_tiny, "--mixed") == 64
    assert "add -o OUT" in capsys.readouterr().err


@pytest.mark.parametrize(("options", "code", "words"), BAD_OPTIONS)
def test_options_that_do_not_fit(options, code, words, scout_tiny, tmp_path, capsys):
    assert run(scout_tiny, "-o", tmp_path / "out", *options) == code
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_paths(scout_tiny, tmp_path, capsys):
    source = checkpoints.copy(scout_tiny, tmp_path / "source")
    (tmp_path / "link").symlink_to(source)
    for out in (source, source / "sub", tmp_path / "link" / "deeper" / "out"):
        assert run(source, "-o", out, "--int4") == 64
        assert "inside the source" in capsys.readouterr().err
    assert run(tmp_path / "nowhere", "-o", tmp_path / "out", "--int4") == 66
    checkpoints.shards(source)[0].unlink()
    assert run(source, "-o", tmp_path / "out", "--int4") == 66
    assert "do not exist" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_quantized_source_is_refused(scout_tiny, tmp_path, capsys):
    assert run(scout_tiny, "-o", tmp_path / "out", "--fp8") == 0
    assert run(tmp_path / "out", "-o", tmp_path / "again", "--int4") == 65
    assert "quantized already (compressed-tensors)" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_no_cuda_device(scout_tiny, tmp_path, capsys):
    assert run(scout_tiny, "-o", tmp_path / "out", "--int4", "--device", "cuda") == 69
    assert "finds no CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("stored", "place", "named"),
    [
        (
            "language_model.model.layers.2.feed_forward.experts.gate_up_proj", (3, 17, 384 + 5),
            "language_model.model.layers.2.feed_forward.experts.3.up_proj.weight[5, 17] is nan",
        ),
        ("language_model.model.layers.1.input_layernorm.weight", (9,), "input_layernorm.weight[9] is nan"),
        ("vision_model.patch_embedding.linear.weight", (3, 4), "patch_embedding.linear.weight[3, 4] is nan"),
    ],
)  # fmt: skip
def test_nan_is_named(stored, place, named, scout_tiny, tmp_path, capsys):
    source = checkpoints.copy(scout_tiny, tmp_path / "source")
    tensors = checkpoints.load(source)
    tensors[stored][place] = float("nan")
    checkpoints.save(source, tensors)
    assert run(source, "-o", tmp_path / "out", "--int4") == 65
    assert named in capsys.readouterr().err
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_other_source_dtypes(dtype, tmp_path):
    source = checkpoints.make(tmp_path / "source", dtype=dtype, layers=2, experts=2, text_only=True)
    assert run(source, "-o", tmp_path / "out", "--int4") == 0
    reader, stored = open_checkpoint(source), checkpoints.load(tmp_path / "out")
    open_checkpoint(tmp_path / "out").close()
    name = "language_model.model.layers.1.feed_forward.experts.1.down_proj.weight"
    result = ops.int4(reader.read(name), 128, "mse")
    base = name.removeprefix("language_model.")
    assert torch.equal(stored[base + "_packed"], result.packed)
    assert stored["model.norm.weight"].dtype == getattr(torch, dtype)


def test_full_disk_is_seen_before(scout_tiny, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda path: usage._replace(free=2**20))
    with pytest.raises(WriteError, match=r"are still to be written, the disk has 1 MiB free"):
        pipeline.quantize(open_checkpoint(scout_tiny), tmp_path / "out", make_recipe("int4"), pipeline.Options())
    assert not list(Path(tmp_path / "out").glob("*.safetensors*"))


def test_a_worker_error_leaves_a_resumable_folder(scout_tiny, tmp_path, monkeypatch):
    """The source is found damaged in the middle; mended, the run goes on with what was finished."""
    real, calls = ops.int4, []

    def damaged(*args, **kwargs):
        calls.append(1)
        if len(calls) == 40:
            raise CheckpointError("tensor x is nan")
        return real(*args, **kwargs)

    options = pipeline.Options(jobs=2, max_shard_bytes=1_000_000)
    monkeypatch.setattr(ops, "int4", damaged)
    with pytest.raises(CheckpointError):
        pipeline.quantize(open_checkpoint(scout_tiny), tmp_path / "out", make_recipe("int4"), options)
    monkeypatch.setattr(ops, "int4", real)
    report = pipeline.quantize(open_checkpoint(scout_tiny), tmp_path / "out", make_recipe("int4"), options)
    assert report["run"]["resumed"] and report["totals"]["quantized_tensors"] == 60
