"""`verify`: everything that can happen to a checkpoint is found and named, and a right one is sound."""

import dataclasses
import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from converters.detect import open_checkpoint
from l4tool.core.errors import CheckpointError, InputMissing, UsageError
from l4tool.core.placeholder import write_placeholder
from l4tool.hub.manifest import Entry, Manifest, write_manifest
from quant import comparison, pipeline
from quant.schemes import make_recipe
from quant.verification import as_json, verify
from tests import checkpoints

INDEX = "model.safetensors.index.json"
NORM = "language_model.model.layers.1.input_layernorm.weight"
EXPERT = "language_model.model.layers.2.feed_forward.experts.1.up_proj"


@pytest.fixture(scope="module")
def source(scout_tiny):
    return scout_tiny


@pytest.fixture(scope="module")
def quantized(source, tmp_path_factory):
    """Four shards, as `l4tool quantize` writes them, with its report."""
    out = tmp_path_factory.mktemp("quantized") / "out"
    options = pipeline.Options(max_shard_bytes=2_500_000)
    pipeline.quantize(open_checkpoint(source), out, make_recipe("mixed", attention="fp8"), options)
    return out


@pytest.fixture
def folder(quantized, tmp_path):
    return checkpoints.copy(quantized, tmp_path / "out")


def found(outcome):
    """(kind, file or tensor) of every error."""
    return {(f.kind, f.file or f.tensor) for f in outcome.findings if f.is_error}


def with_manifest(folder):
    """A manifest as `fetch` writes it: SHA-256 of the shards, git's SHA-1 of the rest."""
    files = {}
    for path in folder.iterdir():
        raw = path.read_bytes()
        if path.suffix == ".safetensors":
            files[path.name] = Entry(len(raw), hashlib.sha256(raw).hexdigest())
        else:
            files[path.name] = Entry(len(raw), None, hashlib.sha1(b"blob %d\0" % len(raw) + raw).hexdigest())
    write_manifest(folder, Manifest("org/name", "0" * 40, "https://hub", files))
    return folder


def flip_bit(path, at=None):
    """One bit in the middle of the last tensor."""
    at = path.stat().st_size - 1001 if at is None else at
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 4]))


def set_value(folder, name, place, value):
    """Write one element of a stored tensor in place, as a damaged or wrong file would hold it."""
    reader = open_checkpoint(folder)
    stored = reader.folder.stored[name]
    tensor = reader.folder.view(name).clone()
    tensor[place] = value
    with open(stored.file, "r+b") as file:
        file.seek(stored.start)
        file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


@pytest.mark.parametrize("fixture", ["scout_tiny", "maverick_tiny", "scout_tiny_text"])
def test_a_right_checkpoint_is_sound(request, fixture):
    outcome = verify(request.getfixturevalue(fixture))
    assert outcome.exit_code == 0 and not outcome.findings and outcome.hashed == {}
    assert outcome.finite_tensors == outcome.float_tensors == outcome.tensors


def test_a_quantize_run_is_sound_and_its_errors_are_the_reported_ones(quantized, source):
    outcome = verify(quantized, source)
    assert outcome.exit_code == 0, outcome.findings
    shards = len(checkpoints.shards(quantized))
    assert shards == 4 and outcome.hashed == {"l4tool-report.json": (shards, shards)}
    report = json.loads((quantized / "l4tool-report.json").read_text())
    errors = {one.name: one for one in outcome.compared.errors}
    assert errors.keys() == report["tensors"].keys()
    for name, one in errors.items():
        assert one.relative_error == pytest.approx(report["tensors"][name]["relative_error"], rel=1e-6)
        assert one.sqnr_db == pytest.approx(report["tensors"][name]["sqnr_db"], rel=1e-6)
    assert outcome.compared.copies == len(open_checkpoint(source).tensors()) - len(errors)
    (total,) = [entry for entry in comparison.totals(outcome.compared.errors) if entry["class"] == "all"]
    assert total["relative_error"] == pytest.approx(report["totals"]["overall_relative_error"], rel=1e-6)
    assert total["worst_relative_error"] == pytest.approx(report["totals"]["worst_relative_error"], rel=1e-6)
    values = [one.relative_error for one in outcome.compared.errors]
    assert values == sorted(values, reverse=True)


def test_errors_against_plain_arithmetic(maverick_tiny, tmp_path):
    """A checkpoint that the compressed-tensors library wrote, measured tensor by tensor in float64."""
    from quant.dequantize import read_linear

    folder = checkpoints.compress(maverick_tiny, tmp_path / "model", "mixed")
    outcome = verify(folder, maverick_tiny)
    assert outcome.exit_code == 0 and outcome.hashed == {}
    target, original = open_checkpoint(folder), open_checkpoint(maverick_tiny)
    for one in outcome.compared.errors:
        weight = original.read(one.name).double()
        difference = read_linear(target, one.name.removesuffix(".weight")).double() - weight
        assert one.relative_error == pytest.approx(float(difference.norm() / weight.norm()), rel=1e-6)
        assert one.max_abs_error == pytest.approx(float(difference.abs().max()), rel=1e-6)
        rows = difference.norm(dim=1) / weight.norm(dim=1)
        assert one.worst_row_error == pytest.approx(float(rows.max()), rel=1e-5)


@pytest.mark.parametrize("threads", [1, 3])
def test_the_number_of_threads_changes_nothing(quantized, source, threads):
    def strip(outcome):
        return dataclasses.replace(outcome, seconds=0.0)

    assert strip(verify(quantized, source, threads)) == strip(verify(quantized, source, 2))


def test_a_flipped_bit(folder):
    shard = checkpoints.shards(folder)[1]
    flip_bit(shard)
    outcome = verify(folder)
    assert ("checksum", shard.name) in found(outcome) and outcome.exit_code == 76
    assert outcome.hashed == {"l4tool-report.json": (3, 4)}


def test_a_flipped_bit_in_a_fetched_folder(scout_tiny, tmp_path):
    folder = with_manifest(checkpoints.copy(scout_tiny, tmp_path / "model"))
    assert verify(folder).hashed == {"l4tool-manifest.json": (len(list(folder.iterdir())) - 1,) * 2}
    for path in (checkpoints.shards(folder)[3], folder / "tokenizer.json", folder / "config.json"):
        flip_bit(path, path.stat().st_size // 2)
        outcome = verify(folder)
        assert ("checksum", path.name) in found(outcome) and outcome.exit_code == 76


def test_a_flipped_bit_in_the_hub_cache(scout_tiny, tmp_path):
    """Blobs are named by their SHA-256, small files by git's SHA-1."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for path in scout_tiny.iterdir():
        raw = path.read_bytes()
        large = path.suffix == ".safetensors"
        name = hashlib.sha256(raw) if large else hashlib.sha1(b"blob %d\0" % len(raw) + raw)
        shutil.copy(path, blobs / name.hexdigest())
        (snapshot / path.name).symlink_to(f"../../blobs/{name.hexdigest()}")
    number = len(list(scout_tiny.iterdir()))
    assert verify(snapshot).hashed == {"Hugging Face cache": (number, number)}
    shard = checkpoints.shards(snapshot)[0]
    flip_bit(shard.resolve())
    outcome = verify(snapshot)
    assert found(outcome) >= {("checksum", shard.name)} and outcome.exit_code == 76


@pytest.mark.parametrize("manifest", [False, True])
def test_two_swapped_shards(scout_tiny, tmp_path, manifest):
    folder = checkpoints.copy(scout_tiny, tmp_path / "model")
    if manifest:
        with_manifest(folder)
    first, second = checkpoints.shards(folder)[1:3]  # of the same size
    assert first.stat().st_size == second.stat().st_size
    os.replace(first, tmp_path / "kept")
    os.replace(second, first)
    os.replace(tmp_path / "kept", second)
    outcome = verify(folder)
    expected = {("index", first.name), ("index", second.name)}
    if manifest:
        expected |= {("checksum", first.name), ("checksum", second.name)}
    assert found(outcome) >= expected and outcome.exit_code == (76 if manifest else 65)


@pytest.mark.parametrize("manifest", [False, True])
def test_a_truncated_shard(scout_tiny, tmp_path, manifest):
    folder = checkpoints.copy(scout_tiny, tmp_path / "model")
    if manifest:
        with_manifest(folder)
    shard = checkpoints.shards(folder)[2]
    os.truncate(shard, shard.stat().st_size - 5000)
    outcome = verify(folder)
    expected = {("header", shard.name)} | ({("size", shard.name)} if manifest else set())
    assert found(outcome) == expected and outcome.exit_code == (76 if manifest else 65)


def test_a_missing_shard(folder):
    shard = checkpoints.shards(folder)[0]
    shard.unlink()
    outcome = verify(folder)
    assert found(outcome) == {("missing-file", shard.name)} and outcome.exit_code == 66
    assert any("l4tool-report.json names it" in finding.message for finding in outcome.findings)


def test_an_extra_file_in_the_index(folder):
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["extra.weight"] = "model-extra.safetensors"
    (folder / INDEX).write_text(json.dumps(index))
    outcome = verify(folder)
    assert found(outcome) == {("missing-file", "model-extra.safetensors")} and outcome.exit_code == 66
    (checkpoints.shards(folder)[0].parent / "model-extra.safetensors").write_bytes(
        (folder / "model-00001-of-00004.safetensors").read_bytes()
    )
    assert verify(folder).exit_code == 65


@pytest.mark.parametrize(
    ("name", "place", "value", "kind"),
    [
        (NORM, 7, float("nan"), "not-finite"),
        (NORM, 7, float("-inf"), "not-finite"),
        (f"{EXPERT}.weight_scale", (5, 1), float("nan"), "not-finite"),
        (f"{EXPERT}.weight_scale", (5, 1), 0.0, "zero-scale"),
        ("language_model.model.layers.0.self_attn.q_proj.weight_scale", (9, 0), 0.0, "zero-scale"),
        ("language_model.model.layers.0.self_attn.q_proj.weight", (9, 3), float("nan"), "not-finite"),
    ],
)
def test_values_that_no_weight_has(folder, name, place, value, kind):
    (folder / "l4tool-report.json").unlink()
    set_value(folder, name, place, value)
    outcome = verify(folder)
    (finding,) = [finding for finding in outcome.findings if finding.is_error]
    assert (finding.kind, finding.tensor, finding.file) == (kind, name, finding.file) and finding.file
    assert outcome.exit_code == 65 and outcome.finite_tensors == outcome.float_tensors - (kind == "not-finite")
    if kind == "not-finite":
        shown = ", ".join(map(str, place if isinstance(place, tuple) else (place,)))
        assert f"the first at [{shown}]" in finding.message


def test_only_zeros_is_a_warning(folder):
    (folder / "l4tool-report.json").unlink()
    for layer in (0, 1, 3):
        set_value(folder, f"language_model.model.layers.{layer}.input_layernorm.weight", slice(None), 0)
    outcome = verify(folder)
    assert [f.message for f in outcome.findings] == [
        "only zeros in language_model.model.layers.{0-1,3}.input_layernorm.weight"
    ]
    assert outcome.exit_code == 0


@pytest.mark.parametrize("report", [False, True])
def test_a_wrong_scale(folder, source, report):
    """Finite and plausible: found by its hash, by the error of its row, and by the error that the run reported."""
    if not report:
        (folder / "l4tool-report.json").unlink()
    name = f"{EXPERT}.weight_scale"
    wrong = open_checkpoint(folder).read(name)[5, 1] * 16
    set_value(folder, name, (5, 1), wrong)
    assert verify(folder).exit_code == (76 if report else 0)
    outcome = verify(folder, source)
    expected = {("error", f"{EXPERT}.weight")}
    if report:
        expected |= {("report", f"{EXPERT}.weight"), ("checksum", open_checkpoint(folder).tensors()[name].file.name)}
    assert found(outcome) == expected and outcome.compared.errors[0].name == f"{EXPERT}.weight"
    assert outcome.compared.errors[0].worst_row == 5


def test_a_copied_tensor_that_differs(folder, source):
    (folder / "l4tool-report.json").unlink()
    set_value(folder, NORM, 3, 1.5)
    outcome = verify(folder, source)
    (finding,) = outcome.findings
    assert finding.tensor == NORM and "in 1 of 256 values" in finding.message and outcome.exit_code == 65


def test_a_config_that_does_not_belong(folder, maverick_tiny, source):
    shutil.copy(maverick_tiny / "config.json", folder / "config.json")
    outcome = verify(folder)
    assert {kind for kind, _ in found(outcome)} >= {"unknown-tensor", "missing-tensor"} and outcome.exit_code == 65
    assert outcome.hashed == {"l4tool-report.json": (4, 4)}
    with pytest.raises(CheckpointError, match="different architectures"):
        verify(folder, source)


def test_the_wrong_source(folder, tmp_path):
    other = checkpoints.make(tmp_path / "other", seed=5)
    outcome = verify(folder, other)
    assert {kind for kind, _ in found(outcome)} == {"copy", "error", "report"} and outcome.exit_code == 65


def test_several_faults_are_all_told_and_the_worst_counts(folder, source):
    first, second, *_ = checkpoints.shards(folder)
    first.unlink()
    flip_bit(second)
    checkpoints.edit_config(folder, lambda c: c["text_config"].update(vocab_size=4096 + 64))
    outcome = verify(folder)
    kinds = {kind for kind, _ in found(outcome)}
    assert kinds == {"missing-file", "checksum", "shape"} and outcome.exit_code == 76
    assert not as_json(outcome)["sound"]


def test_placeholders_are_missing_weights(scout_tiny, tmp_path):
    folder = checkpoints.copy(scout_tiny, tmp_path / "model")
    shard = checkpoints.shards(folder)[0]
    raw = shard.read_bytes()
    write_placeholder(shard, raw[: 8 + int.from_bytes(raw[:8], "little")], len(raw), "org/name")
    outcome = verify(folder)
    assert found(outcome) == {("missing-file", shard.name)} and outcome.exit_code == 66
    with pytest.raises(Exception, match="header only"):
        verify(scout_tiny, folder)


def test_other_layouts(scout_tiny, tmp_path):
    """What can be said without a name table, or without unpickling."""
    recipe = make_recipe("fp8", format="quanto")
    pipeline.quantize(open_checkpoint(scout_tiny), tmp_path / "q", recipe, pipeline.Options())
    outcome = verify(tmp_path / "q")
    assert outcome.exit_code == 0 and outcome.hashed == {"l4tool-report.json": (1, 1)} and not outcome.names_checked
    flip_bit(checkpoints.shards(tmp_path / "q")[0])
    assert verify(tmp_path / "q").exit_code == 76
    with pytest.raises(UsageError, match="optimum-quanto"):
        verify(tmp_path / "q", scout_tiny)
    meta = tmp_path / "meta"
    meta.mkdir()
    (meta / "params.json").write_text("{}")
    (meta / "consolidated.00.pth").write_bytes(os.urandom(1000))
    lines = [f"{hashlib.md5(path.read_bytes()).hexdigest()}  {path.name}" for path in meta.iterdir()]
    (meta / "checklist.chk").write_text("\n".join(lines) + "\n")
    assert verify(meta).hashed == {"checklist.chk": (2, 2)}
    flip_bit(meta / "consolidated.00.pth", 3)
    assert verify(meta).exit_code == 76


def test_nothing_to_check(tmp_path, quantized, source):
    with pytest.raises(InputMissing):
        verify(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="the same folder"):
        verify(quantized, Path(quantized.parent, ".", quantized.name))
    with pytest.raises(CheckpointError, match="quantized itself"):
        verify(source, quantized)
