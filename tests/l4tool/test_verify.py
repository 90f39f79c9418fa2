"""`l4tool verify`: verdict, tables, exit codes and the picture."""

import json
import re
import sys

import pytest

from converters.detect import open_checkpoint
from l4tool.main import main
from quant import pipeline
from quant.schemes import make_recipe
from tests import checkpoints


@pytest.fixture(scope="module")
def quantized(maverick_tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("quantized") / "out"
    pipeline.quantize(open_checkpoint(maverick_tiny), out, make_recipe("mixed"), pipeline.Options())
    return out


def run(capsys, *arguments):
    code = main(["verify", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out, err


def test_a_sound_checkpoint(quantized, maverick_tiny, capsys):
    code, out, err = run(capsys, quantized)
    assert code == 0 and err == ""
    assert re.match(
        rf"sound: {quantized}, \d\.\d+ MiB in 1 file\n\nhashes +1 of 1 files as l4tool-report.json says\n", out
    )
    code, out, _ = run(capsys, quantized, "--against", maverick_tiny, "--worst", 3)
    assert code == 0 and re.search(r"against +36 quantized tensors, 71 copied bit for bit", out)
    assert re.search(r"experts +int4 +24 +0\.1\d+ ", out) and re.search(r"shared +fp8 +12 +0\.02\d+ ", out)
    assert len(re.findall(r"_proj\.weight +int4 +0\.1\d+ +1\d\.\d dB", out)) == 3


def test_findings_and_exit_code(quantized, tmp_path, capsys):
    folder = checkpoints.copy(quantized, tmp_path / "model")
    (shard,) = checkpoints.shards(folder)
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x55")
    code, out, _ = run(capsys, folder)
    assert code == 76 and out.startswith("not sound: ") and ": 1 error\n" in out
    assert f"error: {shard} is not what l4tool-report.json says" in out and "hint: " in out
    code, out, _ = run(capsys, folder, "--json")
    outcome = json.loads(out)
    assert code == outcome["exit_code"] == 76 and not outcome["sound"]
    assert [(f["kind"], f["file"], f["severity"]) for f in outcome["findings"]] == [("checksum", shard.name, "error")]
    shard.unlink()
    assert run(capsys, folder)[0] == 66


def test_json_holds_every_error(quantized, maverick_tiny, capsys):
    _, out, _ = run(capsys, quantized, "--against", maverick_tiny, "--json")
    against = json.loads(out)["against"]
    assert len(against["tensors"]) == 36 and against["copies"] == 71
    assert against["tensors"][0]["relative_error"] == max(one["relative_error"] for one in against["tensors"])


def test_json_of_nan_is_json(quantized, maverick_tiny, tmp_path, capsys):
    folder = checkpoints.copy(quantized, tmp_path / "model")
    tensors = checkpoints.load(folder)
    name = "language_model.model.layers.1.feed_forward.experts.0.up_proj.weight"
    tensors[f"{name}_scale"][0, 0] = float("nan")
    checkpoints.save(folder, tensors)
    (folder / "l4tool-report.json").unlink()
    code, out, _ = run(capsys, folder, "--against", maverick_tiny, "--json")
    outcome = json.loads(out, parse_constant=pytest.fail)
    assert code == 65 and outcome["against"]["tensors"][0]["relative_error"] is None
    code, out, _ = run(capsys, folder, "--against", maverick_tiny, "--plot", tmp_path / "x.png")
    assert (tmp_path / "x.png").exists()
    assert code == 65 and re.search(r"up_proj\.weight +int4 +nan", out)


def test_picture(quantized, maverick_tiny, tmp_path, capsys):
    from PIL import Image

    path = tmp_path / "errors.png"
    assert run(capsys, quantized, "--against", maverick_tiny, "--plot", path)[0] == 0
    with Image.open(path) as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(10**6)}
        assert picture.size == (1350, 1050) and {(0, 114, 178), (230, 159, 0)} <= colours
    assert run(capsys, quantized, "--against", maverick_tiny, "--plot", tmp_path / "no" / "x.png")[0] == 73


def test_nothing_to_draw(maverick_tiny, tmp_path, capsys):
    folder = checkpoints.copy(maverick_tiny, tmp_path / "model")
    code, out, err = run(capsys, folder, "--against", maverick_tiny, "--plot", tmp_path / "x.png")
    assert code == 0 and "0 quantized tensors, 107 copied bit for bit" in out
    assert "there is no picture" in err and not (tmp_path / "x.png").exists()


def test_usage(quantized, maverick_tiny, tmp_path, capsys, monkeypatch):
    assert run(capsys, quantized, "--plot", "x.png")[0] == 64
    code, _, err = run(capsys, "meta-llama/Llama-4-Nonesuch")
    assert code == 66 and "l4tool fetch meta-llama/Llama-4-Nonesuch" in err
    assert run(capsys, quantized, "--against", tmp_path / "nowhere")[0] == 66
    assert run(capsys, maverick_tiny, "--against", quantized)[0] == 65
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = run(capsys, quantized, "--against", maverick_tiny, "--plot", tmp_path / "x.png")
    assert code == 64 and "pip install 'l4tool[plot]'" in err
