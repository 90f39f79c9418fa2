"""`l4tool convert` as a user types it; and killed anywhere, the same command carries on to the same bytes."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from converters.writing import journal
from l4tool.main import main
from tests import checkpoints

ROOT = Path(__file__).resolve().parents[2]


def run(capsys, *args):
    code = main(["convert", *map(str, args)])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A checkpoint that every target can hold: llama.cpp's and Meta's constants."""
    folder = checkpoints.make(tmp_path_factory.mktemp("source") / "tiny")

    def edit(config):
        config["text_config"] |= {"attention_chunk_size": 8192, "floor_scale": 8192}
        config["text_config"]["rope_parameters"]["original_max_position_embeddings"] = 8192

    return checkpoints.edit_config(folder, edit)


def test_around_the_world(source, tmp_path, capsys):
    """hf → meta → gguf → per expert → hf: every command by name, and the weights are the first ones again."""
    pytest.importorskip("gguf")
    steps = [("a", "meta", "--shards", "2"), ("b", "gguf"), ("c", "hf-experts"), ("d", "hf", "--shard-size", "4MB")]
    at = source
    for name, to, *options in steps:
        code, out, err = run(capsys, at, "-o", tmp_path / name, "--to", to, *options)
        assert code == 0, err
        assert "tensors" in out and "speed" in out
        at = tmp_path / name
    for path in source.glob("*.safetensors"):
        assert path.read_bytes() == (at / path.name).read_bytes()
    assert (at / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert main(["verify", str(tmp_path / "b"), "--against", str(source)]) == 0
    assert "133 copied bit for bit" in capsys.readouterr().out


def test_dry_run_writes_nothing(source, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = run(capsys, source, "--to", "meta", "--shards", "2", "--dry-run")
    assert code == 0 and not list(tmp_path.iterdir())
    line = next(line for line in out.splitlines() if "consolidated.{0-1}.pth/layers.{0-3}.attention.wqkv" in line)
    assert line.split()[1:3] == ["256×256", "BF16"] and "q_proj.weight[0:128]" in line
    assert "consolidated.01.pth" in out and "params.json" in out
    code, out, _ = run(capsys, source, "--to", "hf-experts", "--dry-run", "--tensors")
    assert out.count(".gate_proj.weight  ") == 4 * 4 + 4


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [(["SRC", "--to", "hf"], 64, "where shall it go"), (["nowhere", "-o", "OUT", "--to", "hf"], 66, "nowhere"),
     (["SRC", "-o", "OUT", "--to", "onnx"], 64, "onnx"),
     (["SRC", "-o", "OUT", "--to", "hf", "--dtype", "q8_0"], 64, "takes"),
     (["SRC", "-o", "OUT", "--to", "gguf", "--shards", "2"], 64, "does not go with"),
     (["SRC", "-o", "OUT", "--to", "hf", "--shard-size", "much"], 64, "much"),
     (["SRC", "-o", "OUT", "--to", "meta"], 64, "use --shards 2"),
     (["SRC", "-o", "OUT", "--to", "compressed-tensors"], 64, "l4tool quantize"),
     (["SRC", "-o", "OUT", "--to", "hf", "--memory", "100MB"], 64, "too little"),
     (["SRC", "-o", "OUT", "--to", "hf", "--vision-from", "SRC"], 64, "vision tower of its own"),
     (["SRC", "-o", "SRC/sub", "--to", "hf"], 64, "lies inside the source"),
     (["meta-llama/Llama-4-Nonesuch", "-o", "OUT", "--to", "hf"], 66, "l4tool fetch")],
)  # fmt: skip
def test_errors(args, code, said, source, tmp_path, capsys):
    """One message, what to type next, an exit code; nothing is left behind."""
    words = [arg.replace("SRC", str(source)).replace("OUT", str(tmp_path / "out")) for arg in args]
    found, _, err = run(capsys, *words)
    assert found == code and said in err and "Traceback" not in err
    assert not (tmp_path / "out").exists() and not (source / "sub").exists()


def test_a_full_disk_is_seen_beforehand(source, tmp_path, capsys, monkeypatch):
    from converters.writing import checks

    usage = checks.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda path: usage._replace(free=2**20))
    code, _, err = run(capsys, source, "-o", tmp_path / "out", "--to", "hf")
    assert code == 73 and "still to be written" in err


@pytest.mark.parametrize("options", ["--to meta --shards 2", "--to hf-experts --shard-size 2MB"])
def test_killed_anywhere_it_carries_on(options, source, tmp_path):
    """Stopped all over a run, at times in the middle of a write; the same command then ends with the same bytes."""
    _, ended, _ = interrupted(options, source, tmp_path, ["whole/run"])
    points = [ended[0]["steps"] * (n + 1) // 7 for n in range(6)]
    stops = [f"{n}/{'torn' if n % 2 else 'kill'}:{point}" for n, point in enumerate(points)]
    results, _, errors = interrupted(options, source, tmp_path, stops + [f"{n}/run" for n in range(6)])
    assert [result["code"] for result in results] == [-signal.SIGKILL] * 6 + [0] * 6, errors
    expected = contents(tmp_path / "whole")
    for n in range(6):
        assert contents(tmp_path / str(n)) == expected
    assert "carrying on" in errors
    last = "params.json" if "meta" in options else "config.json"
    for result in results[:6]:
        assert last not in result["names"]


def interrupted(options, source, parent, stops):
    """(results, what those that ended say, stderr) of tests/quant/interrupted.py."""
    command = [sys.executable, "-m", "tests.quant.interrupted", str(source), str(parent), "0", *stops]
    environment = os.environ | {"CONVERT": options}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return [line for line in lines if "stop" in line], [line for line in lines if "steps" in line], done.stderr


def contents(folder):
    files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    report = json.loads(files.pop(journal.REPORT))
    del report["run"]
    return files | {"report": report}


def test_memory_stays_small(source, tmp_path):
    """Anonymous memory of a run over a checkpoint several times its size: what the budget says, whatever the size."""
    script = (
        "import sys, resource; from l4tool.main import main; from pathlib import Path\n"
        "code = main(sys.argv[1:])\n"
        "status = dict(l.split(':', 1) for l in Path('/proc/self/status').read_text().splitlines())\n"
        "print('anon', int(status['RssAnon'].split()[0]) // 1024)\n"
        "sys.exit(code)\n"
    )
    big = checkpoints.make(tmp_path / "big", layers=4, experts=64, text_only=True)
    command = [sys.executable, "-c", script, "convert", str(big), "-o", str(tmp_path / "out"), "--to", "hf-experts"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    anonymous = int(done.stdout.rpartition("anon ")[2])
    assert anonymous < 1024


def test_batch_answers_alike_from_what_meta_files_become(source, tmp_path, capsys):
    """Text and pictures through `batch`: tokenizer, chat template, processor files and weights made of Meta's files."""
    pytest.importorskip("PIL")
    assert run(capsys, source, "-o", tmp_path / "meta", "--to", "meta", "--shards", "2")[0] == 0
    assert run(capsys, tmp_path / "meta", "-o", tmp_path / "hf", "--to", "hf")[0] == 0
    answers = []
    for model in (source, tmp_path / "hf"):
        out = tmp_path / f"{len(answers)}.jsonl"
        command = ["batch", str(ROOT / "examples" / "requests.jsonl"), str(out), "--model", str(model)]
        main([*command, "--temperature", "0", "--max-tokens", "8", "--order", "input"])
        lines = [json.loads(line) for line in out.read_text().splitlines()]
        answers.append([{key: line[key] for key in line if key not in ("id", "request_id")} for line in lines])
    capsys.readouterr()
    texts = [[json.dumps(line.get("response") or line, sort_keys=True) for line in lines] for lines in answers]
    assert len(texts[0]) == len(texts[1]) > 3
    for one, other in zip(*texts, strict=True):
        assert strip_names(one) == strip_names(other)


def strip_names(text):
    """Without what names the model and the moment."""
    return re.sub(r'"(id|request_id|created|model|system_fingerprint)": ("[^"]*"|\d+)', "", text)


def test_quantized_and_written_anew_inspects_the_same(source, tmp_path, capsys):
    quantized = tmp_path / "int4"
    assert main(["quantize", str(source), "-o", str(quantized), "--mixed"]) == 0
    code, _, err = run(capsys, quantized, "-o", tmp_path / "again", "--to", "compressed-tensors", "--shard-size", "2MB")
    assert code == 0, err
    facts = []
    for folder in (quantized, tmp_path / "again"):
        main(["inspect", str(folder), "--json"])
        facts.append(json.loads(capsys.readouterr().out))
    same = ("layout", "architecture", "parameters", "quantization", "classes", "kinds", "tokenizer", "findings")
    assert {key: facts[0][key] for key in same} == {key: facts[1][key] for key in same}
    assert len(facts[1]["shards"]) > len(facts[0]["shards"])
