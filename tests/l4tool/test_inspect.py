"""`l4tool inspect`: what it prints of folders, broken folders and repositories."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from l4tool.main import main
from tests import checkpoints
from tests.hub.server import HubServer

SCRIPT = Path(sys.executable).with_name("l4tool")
Q_PROJ = "language_model.model.layers.{0-3}.self_attn.q_proj.weight"


def run(capsys, *arguments):
    code = main(["inspect", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out, err


def test_summary(scout_tiny, capsys):
    code, out, err = run(capsys, scout_tiny)
    assert code == 0 and err == ""
    for line in (
        "layout +Hugging Face, multimodal", r"weights +17\.1 MiB in 6 files, 2 MiB to 3\.19 MiB each",
        r"parameters +8\.96 M, 5\.25 M active for a text token", "quantization +none",
        "experts +4, 1 per token, intermediate 384, layers {0-3}",
        "rope +theta 500000, all layers but 3; scaled by 16", "tokenizer +byte-level BPE, 4,096 tokens",
        r"all +133 +17\.1 MiB", re.escape(Q_PROJ) + r" +4 +256 × 256 +BF16 +512 KiB",
    ):  # fmt: skip
        assert re.search(f"^{line}", out, re.MULTILINE), line
    assert ".safetensors" not in out


def test_lists_and_filters(scout_tiny, capsys):
    _, out, _ = run(capsys, scout_tiny, "--tensors", "--filter", "/layers.2.*experts.3/", "--shards")
    listed = re.findall(r"^language_model.\S+", out, re.MULTILINE)
    base = "language_model.model.layers.2.feed_forward.experts.3."
    assert listed == [f"{base}{name}_proj.weight" for name in ("gate", "up", "down")]
    assert len(re.findall(r"^model-0000\d-of-00006.safetensors +\d+ ", out, re.MULTILINE)) == 6
    _, out, _ = run(capsys, scout_tiny, "--stored", "--filter", "experts.gate_up")
    assert re.search(r"layers\.{0-3}\.feed_forward\.experts\.gate_up_proj +4 +4 × 256 × 768 +BF16 +6 MiB", out)
    assert "no tensor's name fits nothing" in run(capsys, scout_tiny, "--filter", "nothing")[1]
    assert run(capsys, scout_tiny, "--filter", "/(/")[0] == 64


def test_json(scout_tiny, capsys):
    code, out, _ = run(capsys, scout_tiny, "--json")
    facts = json.loads(out)
    assert code == 0 and facts["layout"] == "hf" and facts["architecture"]["text"]["num_layers"] == 4


def test_a_broken_folder_is_shown_as_far_as_it_goes(scout_tiny, tmp_path, capsys):
    folder = checkpoints.copy(scout_tiny, tmp_path / "model")
    first, second = checkpoints.shards(folder)[:2]
    second.unlink()
    code, out, err = run(capsys, folder)
    assert code == 66 and f"{second.name} does not exist: 12 tensor(s) are lost" in err and "Hugging Face" in out
    first.write_bytes(first.read_bytes()[:-9])
    (folder / "config.json").unlink()
    code, out, err = run(capsys, folder)
    assert code == 66 and "truncated" in err and "config.json does not exist" in err
    assert re.search(r"routed experts +6 +BF16", out)
    assert "Traceback" not in err


def test_a_broken_file_of_metas(tmp_path, capsys):
    (tmp_path / "params.json").write_text('{"dim": 5120, "n_layers": 48}')
    (tmp_path / "consolidated.00.pth").write_bytes(bytes(10))
    code, out, err = run(capsys, tmp_path)
    assert code == 65 and "dim 5120, n_layers 48" in out and "not a sound .pth file" in err


def test_no_folder(tmp_path, capsys):
    code, _, err = run(capsys, tmp_path / "nowhere")
    assert code == 66 and "is not a folder" in err


@pytest.mark.parametrize("quantized", [False, True])
def test_a_repository_costs_a_few_kilobytes(scout_tiny, tmp_path, quantized):
    folder = checkpoints.compress(scout_tiny, tmp_path / "model", "mixed") if quantized else scout_tiny
    with HubServer() as hub:
        hub.add_repo("demo/Scout", folder)
        env = os.environ | {"HF_ENDPOINT": hub.url, "XDG_CACHE_HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hf")}
        remote = subprocess.run([SCRIPT, "inspect", "demo/Scout", "--json"], capture_output=True, text=True, env=env)
        assert remote.returncode == 0, remote.stderr
        assert hub.bytes_sent() < 2 * 2**20
        local = subprocess.run([SCRIPT, "inspect", folder, "--json"], capture_output=True, text=True, env=env)
        missing = subprocess.run([SCRIPT, "inspect", "demo/None"], capture_output=True, text=True, env=env)
    theirs, ours = json.loads(remote.stdout), json.loads(local.stdout)
    for key in ("layout", "architecture", "parameters", "tensors", "classes", "shards", "quantization"):
        assert theirs[key] == ours[key], key
    assert missing.returncode == 66 and "Traceback" not in missing.stderr
