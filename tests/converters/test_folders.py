"""Folders that cannot be used: one error that names file and tensor, before anything is read. And odd ones that can."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from converters.detect import open_checkpoint
from l4tool.core.errors import CheckpointError, InputMissing
from tests import checkpoints

INDEX = "model.safetensors.index.json"
Q_PROJ = "language_model.model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def folder(scout_tiny, tmp_path):
    return checkpoints.copy(scout_tiny, tmp_path / "model")


def edit_index(folder, edit):
    path = folder / INDEX
    index = json.loads(path.read_text())
    edit(index)
    path.write_text(json.dumps(index))
    return index


def refused(folder, said, kind=CheckpointError):
    with pytest.raises(kind, match=said) as caught:
        open_checkpoint(folder)
    assert len(caught.value.message.splitlines()) == 1
    return caught.value


def test_no_folder_and_no_config(tmp_path, folder):
    refused(tmp_path / "nowhere", "nowhere is not a checkpoint folder", InputMissing)
    refused(folder / "config.json", "not a checkpoint folder", InputMissing)
    (folder / "config.json").unlink()
    refused(folder, r"config\.json does not exist", InputMissing)


def test_no_weights(folder):
    (folder / INDEX).unlink()
    refused(folder, "neither model.safetensors.index.json nor model.safetensors")


def test_config_that_is_no_object(folder):
    (folder / "config.json").write_text("[]")
    refused(folder, r"config\.json holds a JSON list")


def test_missing_shard(folder):
    shard = checkpoints.shards(folder)[2]
    shard.unlink()
    assert shard.name in refused(folder, "1 file\\(s\\) that do not exist", InputMissing).message


@pytest.mark.parametrize("name", ["x" * 5000, "\ud800", "nöne.safetensors"])
def test_file_names_that_no_file_can_have(folder, name):
    edit_index(folder, lambda index: index["weight_map"].update({Q_PROJ: name}))
    refused(folder, "do not exist", InputMissing)


def test_truncated_shard(folder):
    shard = checkpoints.shards(folder)[1]
    os.truncate(shard, shard.stat().st_size - 100)
    assert "truncated: tensor 'language_model." in refused(folder, shard.name).message


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/passwd", "sub/x.safetensors", "..", ".", "", "a\\b", "a\0b", 7, None, ["x"]]
)
def test_an_index_that_points_outside(folder, name):
    edit_index(folder, lambda index: index["weight_map"].update({Q_PROJ: name}))
    assert Q_PROJ in refused(folder, "not a file name inside the folder").message


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": {}}', '{"weight_map": []}', "x"])
def test_an_index_that_is_none(folder, content):
    (folder / INDEX).write_text(content)
    refused(folder, r"index\.json")


def test_index_and_headers_disagree(folder):
    edit_index(folder, lambda index: index["weight_map"].pop(Q_PROJ))
    assert Q_PROJ in refused(folder, "holds 1 tensor\\(s\\) that .* does not name").message
    last = checkpoints.shards(folder)[-1].name
    edit_index(folder, lambda index: index["weight_map"].update({Q_PROJ: last}))
    refused(folder, "places there|does not name")


def test_a_tensor_in_two_files(folder):
    first, second = checkpoints.shards(folder)[:2]
    shutil.copy(first, second)
    refused(folder, "places there|in both")


def spoil(folder, edit):
    """Change the tensors and write them back with a right index."""
    tensors = checkpoints.load(folder)
    edit(tensors)
    checkpoints.save(folder, tensors)


def test_missing_tensor(folder):
    spoil(folder, lambda tensors: tensors.pop(Q_PROJ))
    assert Q_PROJ in refused(folder, "lacks 1 tensor").message


def test_unknown_tensor(folder):
    spoil(folder, lambda tensors: tensors.update({"language_model.model.layers.9.extra": torch.zeros(1)}))
    assert "layers.9.extra" in refused(folder, "1 tensor\\(s\\) that config.json's architecture does not have").message


def test_mis_shaped_tensor(folder):
    name = "language_model.model.layers.0.feed_forward.experts.gate_up_proj"
    spoil(folder, lambda tensors: tensors.update({name: tensors[name].transpose(1, 2)}))
    message = refused(folder, "has shape").message
    assert name in message and "[4, 768, 256]" in message and "[4, 256, 768]" in message


def test_wrong_dtype(folder):
    spoil(folder, lambda tensors: tensors.update({Q_PROJ: tensors[Q_PROJ].float()}))
    assert Q_PROJ in refused(folder, "is F32, config.json asks for BF16").message


def test_config_of_another_checkpoint(folder, maverick_tiny):
    shutil.copy(maverick_tiny / "config.json", folder / "config.json")
    error = refused(folder, "architecture does not have")
    assert "it also lacks" in error.hint


def test_quanto_folder(folder):
    (folder / "quantization_map.json").write_text("{}")
    refused(folder, "optimum-quanto")


def test_another_quantization_method(folder):
    checkpoints.edit_config(folder, lambda c: c.update(quantization_config={"quant_method": "bitsandbytes"}))
    refused(folder, "bitsandbytes")
    checkpoints.edit_config(folder, lambda c: c.update(quantization_config=[]))
    refused(folder, "quantization_config must be an object")


def test_unreadable_shard(folder):
    shard = checkpoints.shards(folder)[0]
    shard.unlink()
    shard.mkdir()
    refused(folder, "do not exist", InputMissing)


def test_symlinks_as_the_hub_cache_makes_them(scout_tiny, tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(scout_tiny.iterdir())):
        shutil.copy(path, blobs / f"{number:064x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:064x}")
    reader, plain = open_checkpoint(snapshot), open_checkpoint(scout_tiny)
    assert list(reader.tensors()) == list(plain.tensors())
    assert torch.equal(reader.read(Q_PROJ), plain.read(Q_PROJ))
    assert [path.name for path in reader.side_files()] == [path.name for path in plain.side_files()]


@pytest.mark.parametrize("fixture", ["scout_tiny", "scout_tiny_text"])
def test_a_single_file_needs_no_index(request, tmp_path, fixture):
    source = request.getfixturevalue(fixture)
    folder = tmp_path / "single"
    folder.mkdir()
    shutil.copy(source / "config.json", folder)
    save_file(checkpoints.load(source), folder / "model.safetensors")
    reader, plain = open_checkpoint(folder), open_checkpoint(source)
    assert reader.layout == plain.layout
    for name in plain.tensors():
        assert torch.equal(reader.read(name), plain.read(name))


@pytest.mark.parametrize("fixture", ["maverick_tiny", "scout_tiny_text"])
def test_unquantized_per_expert_checkpoints(request, tmp_path, fixture):
    source = request.getfixturevalue(fixture)
    plain = open_checkpoint(source)
    folder = checkpoints.copy(source, tmp_path / "model")
    prefix = "" if plain.arch.vision else "language_model."
    checkpoints.save(folder, {name.removeprefix(prefix): plain.read(name) for name in plain.tensors()})
    reader = open_checkpoint(folder)
    assert reader.layout == "per-expert"
    assert list(reader.tensors()) == list(plain.tensors())
    for name in plain.tensors():
        assert torch.equal(reader.read(name), plain.read(name)), name


@pytest.mark.parametrize("stored", [False, True])
def test_tied_embeddings(scout_tiny_text, tmp_path, stored):
    folder = checkpoints.copy(scout_tiny_text, tmp_path / "model")
    checkpoints.edit_config(folder, lambda c: c.update(tie_word_embeddings=True))
    if not stored:
        spoil(folder, lambda tensors: tensors.pop("lm_head.weight"))
    reader = open_checkpoint(folder)
    assert "language_model.lm_head.weight" not in reader.tensors()
    embedding = reader.read("language_model.model.embed_tokens.weight")
    assert reader.read("language_model.lm_head.weight").data_ptr() == embedding.data_ptr()


def test_other_dtypes(tmp_path):
    folder = checkpoints.make(tmp_path / "model", dtype="float32", layers=1, text_only=True)
    reader = open_checkpoint(folder)
    assert reader.dtype == torch.float32
    assert {info.dtype for info in reader.tensors().values()} == {torch.float32}
    assert load_file(checkpoints.shards(folder)[0])["model.embed_tokens.weight"].dtype == torch.float32
