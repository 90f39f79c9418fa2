"""Surveys of folders that are broken in several ways at once: every fault is named, the rest is still read."""

import json
import shutil

import pytest
import torch

from converters.detect import open_checkpoint
from converters.findings import Collector, Finding, worst_code
from converters.survey import survey
from l4tool.core.errors import CheckpointError, InputMissing
from tests import checkpoints

INDEX = "model.safetensors.index.json"
Q_PROJ = "language_model.model.layers.0.self_attn.q_proj.weight"
K_PROJ = "language_model.model.layers.1.self_attn.k_proj.weight"


@pytest.fixture
def folder(scout_tiny, tmp_path):
    return checkpoints.copy(scout_tiny, tmp_path / "model")


def kinds(found):
    return [finding.kind for finding in found.findings]


def test_a_sound_folder_has_no_findings(scout_tiny, maverick_tiny, scout_tiny_text):
    for source, layout in ((scout_tiny, "hf"), (maverick_tiny, "hf"), (scout_tiny_text, "hf-text")):
        found = survey(source)
        assert found.findings == [] and found.layout == layout
        assert list(found.reader.tensors()) == list(open_checkpoint(source).tensors())


def test_every_tensor_is_listed(folder):
    tensors = checkpoints.load(folder)
    lost = [name for name in tensors if "layers.2." in name]
    for name in lost:
        del tensors[name]
    tensors[Q_PROJ] = tensors[Q_PROJ][:, :8].contiguous()
    tensors[K_PROJ] = tensors[K_PROJ].float()
    tensors |= {f"extra.{i}": torch.zeros(1) for i in range(9)}
    checkpoints.save(folder, tensors)
    found = survey(folder)
    by_kind = {kind: [f.tensor for f in found.findings if f.kind == kind] for kind in kinds(found)}
    assert by_kind == {
        "missing-tensor": lost, "unknown-tensor": [f"extra.{i}" for i in range(9)], "shape": [Q_PROJ],
        "dtype": [K_PROJ],
    }  # fmt: skip
    readable = found.reader.tensors()
    assert Q_PROJ not in readable and K_PROJ not in readable
    assert torch.equal(found.reader.read("vision_model.class_embedding"), tensors["vision_model.class_embedding"])
    with pytest.raises(CheckpointError, match="9 tensor\\(s\\)"):
        open_checkpoint(folder)


def test_a_missing_and_a_truncated_shard_hide_nothing_else(folder):
    first, second, third, *_ = checkpoints.shards(folder)
    lost = json.loads((folder / INDEX).read_text())["weight_map"]
    first.unlink()
    second.write_bytes(second.read_bytes()[:-1])
    tensor = next(name for name, file in lost.items() if file == third.name)
    index = json.loads((folder / INDEX).read_text())
    del index["weight_map"][tensor]
    (folder / INDEX).write_text(json.dumps(index))
    found = survey(folder)
    assert sorted((f.kind, f.file) for f in found.findings) == [
        ("header", second.name), ("index", third.name), ("missing-file", first.name),
    ]  # fmt: skip
    assert worst_code(found.findings) == 66
    assert {info.file.name for info in found.reader.tensors().values()} & {third.name}


def test_headers_are_read_without_config_or_index(folder):
    (folder / "config.json").write_text("{}")
    found = survey(folder)
    assert found.reader is None and found.arch is None and len(found.shards.stored) == 93
    assert kinds(found) == ["config"]
    (folder / INDEX).write_text("[]")
    assert len(survey(folder).shards.stored) == 93
    (folder / INDEX).unlink()
    found = survey(folder)
    assert kinds(found) == ["config", "no-index"] and len(found.shards.stored) == 93


def test_an_unsupported_quantization_is_one_finding(folder):
    checkpoints.edit_config(folder, lambda c: c.update(quantization_config={"quant_method": "bitsandbytes"}))
    found = survey(folder)
    assert kinds(found) == ["config"] and "bitsandbytes" in found.findings[0].message
    assert found.arch is not None and len(found.shards.stored) == 93


def test_loose_ends(folder):
    shutil.copy(checkpoints.shards(folder)[0], folder / "other.safetensors")
    (folder / "model-00001-of-00006.safetensors.part").touch()
    (folder / "l4tool-journal.jsonl").touch()
    found = survey(folder)
    assert {(f.kind, f.file, f.exit_code) for f in found.findings} == {
        ("stray-file", "other.safetensors", 0),
        ("unfinished", "model-00001-of-00006.safetensors.part", 0),
        ("unfinished", "l4tool-journal.jsonl", 66),
    }


def test_no_folder(tmp_path):
    with pytest.raises(InputMissing, match="is not a folder"):
        survey(tmp_path / "nowhere")


def test_meta_layout(tmp_path):
    (tmp_path / "params.json").write_text('{"dim": 5120}')
    (tmp_path / "consolidated.00.pth").write_bytes(b"not unpickled")
    found = survey(tmp_path)
    assert found.layout == "meta" and found.config == {"dim": 5120} and len(found.findings) == 1


def test_the_worst_code():
    codes = [65, 76, 0, 66]
    findings = [Finding("x", "x", exit_code=code) for code in codes]
    assert worst_code(findings) == 76
    assert worst_code(findings[::3]) == 66 and worst_code(findings[:1]) == 65
    assert worst_code(findings[2:3]) == 0 and worst_code([]) == 0


def test_a_collector_notes_each_thing_once():
    noted = Collector()
    for _ in range(2):
        noted(CheckpointError("bad", hint="mend it"))
    assert [(f.message, f.hint, f.exit_code) for f in noted.findings] == [("bad", "mend it", 65)]
