"""The facts that `l4tool inspect` shows, against the files themselves and the published figures."""

import json

import pytest
from safetensors import safe_open
from transformers import Llama4Config, Llama4ForConditionalGeneration
from transformers.initialization import no_init_weights

from converters.arch_io import arch_from_config
from converters.inspection import inspect, matcher, parameters
from converters.survey import survey
from l4tool.core.errors import UsageError
from tests import checkpoints
from tests.converters import published


@pytest.mark.parametrize(
    ("config", "total", "active"), [(published.scout, 108.6, 17.2), (published.maverick, 401.6, 17.2)]
)
def test_parameters_of_the_published_models(config, total, active):
    counts = parameters(arch_from_config(config(), "config.json"))
    assert round(counts["total"] / 1e9, 1) == total
    assert round(counts["active"] / 1e9, 1) == active


def test_parameters_as_transformers_counts_them(scout_tiny):
    import torch

    config = Llama4Config.from_pretrained(scout_tiny)
    with torch.device("meta"), no_init_weights():
        model = Llama4ForConditionalGeneration(config)
    facts = inspect(survey(scout_tiny))
    assert facts["parameters"]["total"] == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("fixture", ["scout_tiny", "maverick_tiny", "scout_tiny_text"])
def test_stored_tensors_are_those_of_the_library(request, fixture):
    source = request.getfixturevalue(fixture)
    facts = inspect(survey(source), stored_names=True)
    theirs = {}
    for path in checkpoints.shards(source):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                one = file.get_slice(name)
                theirs[name] = (one.get_shape(), one.get_dtype(), path.name)
    assert {t["name"]: (t["shape"], t["dtype"], t["file"]) for t in facts["tensors"]} == theirs
    assert facts["bytes"] == sum(path.stat().st_size for path in checkpoints.shards(source))
    assert [s["file"] for s in facts["shards"]] == [path.name for path in checkpoints.shards(source)]


def test_classes_and_kinds_add_up(maverick_tiny):
    facts = inspect(survey(maverick_tiny))
    for table in ("classes", "kinds"):
        assert sum(one["bytes"] for one in facts[table]) == sum(t["bytes"] for t in facts["tensors"])
    assert sum(kind["count"] for kind in facts["kinds"]) == len(facts["tensors"])
    patterns = {kind["pattern"] for kind in facts["kinds"]}
    assert "language_model.model.layers.{1,3}.feed_forward.experts.{0-3}.down_proj.weight" in patterns
    assert "language_model.model.layers.{0,2}.feed_forward.down_proj.weight" in patterns


@pytest.mark.parametrize(
    ("wanted", "count"),
    [("q_proj", 8), ("layers.0.*q_proj", 3), ("/q_proj.weight$/", 6), ("experts.gate_up_proj", 32), ("nothing", 0)],
)
def test_filters(scout_tiny, wanted, count):
    """A stored name finds the canonical tensors that lie in it."""
    assert len(inspect(survey(scout_tiny), wanted=wanted)["tensors"]) == count


def test_a_bad_filter():
    with pytest.raises(UsageError, match="not a regular expression"):
        matcher("/(/")


def test_quantization_in_words(scout_tiny, tmp_path):
    folder = checkpoints.compress(scout_tiny, tmp_path / "mixed", "mixed")
    facts = inspect(survey(folder))
    groups = {group["scheme"]: group["linears"] for group in facts["quantization"]["groups"]}
    assert groups == {
        "INT4, symmetric, one scale for each 128 inputs": 4 * 4 * 3,
        "FP8 (e4m3fn), one scale for each output, activations in FP8 per token at run time": 4 * (3 + 4),
    }
    assert facts["layout"] == "compressed-tensors"


def test_tokenizer_and_licence(scout_tiny, tmp_path):
    folder = checkpoints.copy(scout_tiny, tmp_path / "model")
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: llama4\nbase_model:\n- a/b\n---\n# Model\n")
    (folder / "LICENSE").write_text("\nLLAMA 4 COMMUNITY LICENSE AGREEMENT\nmore\n")
    facts = inspect(survey(folder))
    vocab = json.loads((folder / "tokenizer.json").read_text())
    assert facts["tokenizer"]["kind"] == "byte-level BPE" and facts["tokenizer"]["chat_template"]
    assert facts["tokenizer"]["vocab_size"] == 1 + max(token["id"] for token in vocab["added_tokens"])
    assert facts["tokenizer"]["special_tokens"] == 2048
    assert facts["tokenizer"]["bos_token"] == "<|begin_of_text|>"
    assert facts["licence"] == {
        "id": "llama4", "base_model": ["a/b"], "file": "LICENSE", "title": "LLAMA 4 COMMUNITY LICENSE AGREEMENT",
        "notice": False,
    }  # fmt: skip


def test_the_facts_are_json(scout_tiny):
    facts = json.loads(json.dumps(inspect(survey(scout_tiny))))
    assert list(facts) == [
        "path", "layout", "layout_name", "bytes", "architecture", "parameters", "params", "quantization", "tokenizer",
        "licence", "classes", "kinds", "tensors", "shards", "findings",
    ]  # fmt: skip
