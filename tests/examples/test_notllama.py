"""The shipped demo model: it answers right, through the commands as they are typed, and as transformers does."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from batch.images import TileSpec, make_tiles
from batch.tokenizer import Tokenizer
from converters.arch_io import read_arch
from converters.origin import read_origin
from examples.demo_model import held_out, plot, train
from examples.demo_model.questions import Draw

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "examples" / "demo_model" / "notllama-3m"
SCRIPT = Path(sys.executable).with_name("l4tool")
PER_TASK = 20


def l4tool(*arguments):
    done = subprocess.run([SCRIPT, *map(str, arguments)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """text.jsonl and pictures.jsonl of held-out questions."""
    folder = tmp_path_factory.mktemp("held-out")
    held_out.write_lines(folder / "text.jsonl", train.TEXT_TASKS, PER_TASK, seed=1)
    held_out.write_lines(folder / "pictures.jsonl", train.PICTURE_TASKS, PER_TASK, seed=1)
    return folder


@pytest.fixture(scope="module")
def int4(tmp_path_factory):
    out = tmp_path_factory.mktemp("int4") / "model"
    l4tool("quantize", MODEL, "--int4", "-o", out)
    return out


@pytest.mark.parametrize(("name", "least"), [("text", 0.97), ("pictures", 0.95)])
def test_held_out_questions_are_answered_right(questions, tmp_path, name, least):
    out = tmp_path / "out.jsonl"
    l4tool("batch", questions / f"{name}.jsonl", out, "--model", MODEL)
    given = {line["id"]: line["text"] for line in map(json.loads, out.read_text().splitlines())}
    asked = [json.loads(line) for line in (questions / f"{name}.jsonl").read_text().splitlines()]
    wrong = [(line["id"], line["answer"], given[line["id"]]) for line in asked if given[line["id"]] != line["answer"]]
    assert len(wrong) <= (1 - least) * len(asked), wrong


def test_eval_says_what_quantizing_costs(questions, int4, tmp_path):
    figures = {}
    for model in (MODEL, int4):
        l4tool("eval", model, "--data", questions / "text.jsonl", "--against", MODEL, "--json", tmp_path / "f.json")
        figures[model] = json.loads((tmp_path / "f.json").read_text())["all"]
    assert figures[MODEL]["kl_mean"] == 0 and figures[MODEL]["exact_match"] >= 0.97
    assert 0 < figures[int4]["kl_mean"] < 0.1 and figures[int4]["exact_match"] > 0.9


@pytest.mark.parametrize("quantized", [False, True])
def test_the_examples_are_answered_right(int4, tmp_path, quantized):
    out = tmp_path / "out.jsonl"
    l4tool("batch", ROOT / "examples" / "requests.jsonl", out, "--model", int4 if quantized else MODEL)
    shown = subprocess.run(
        [sys.executable, ROOT / "examples" / "show_answers.py", ROOT / "examples" / "requests.jsonl", out],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert "11 of 11 answers are right." in shown and "images/tiles.png" in shown, shown


def test_transformers_generates_the_same_answers(questions, tmp_path):
    import transformers

    arch, _ = read_arch(MODEL)
    tokenizer = Tokenizer.load(MODEL)
    encoder = train.Encoder(tokenizer, arch)
    model = transformers.Llama4ForConditionalGeneration.from_pretrained(MODEL, dtype=torch.float32)
    answers, lines = {}, tmp_path / "in.jsonl"
    with lines.open("w") as file:
        for task in train.TASKS:
            made = task(Draw(random.Random(12), held_out=True))
            line = held_out.line_of(made, made.task, tmp_path)
            file.write(json.dumps(line) + "\n")
            seen = encoder.encode(made)
            prompt = seen.ids[: len(seen.ids) - seen.answer[::-1].index(False)]
            pictures = {}
            if made.pictures:
                tiles = [make_tiles(picture, TileSpec(arch.vision.image_size)).pixels for picture in made.pictures]
                pixels = torch.cat([torch.from_numpy(each) for each in tiles]).float()
                pictures["pixel_values"] = (pixels / 255 - 0.5) / 0.5
            ids = model.generate(
                input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
                max_new_tokens=48, do_sample=False, **pictures,
            )[0, len(prompt) :].tolist()  # fmt: skip
            answers[made.task] = tokenizer.decode(ids)
    out = tmp_path / "out.jsonl"
    l4tool("batch", lines, out, "--model", MODEL, "--dtype", "float32", "--max-tokens", 48)
    assert answers == {line["id"]: line["text"] for line in map(json.loads, out.read_text().splitlines())}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["text", "pictures"])
def test_a_gpu_gives_the_cpus_answers(questions, tmp_path, name):
    answers = {}
    for device in ("cpu", "cuda"):
        out = tmp_path / f"{device}.jsonl"
        l4tool("batch", questions / f"{name}.jsonl", out, "--model", MODEL, "--device", device, "--dtype", "float32")
        answers[device] = {line["id"]: line["text"] for line in map(json.loads, out.read_text().splitlines())}
    assert answers["cuda"] == answers["cpu"]


def test_it_is_small_free_and_uses_all_experts():
    assert sum(path.stat().st_size for path in MODEL.glob("*.safetensors")) <= 12e6
    origin = read_origin(MODEL, json.loads((MODEL / "config.json").read_text()))
    assert origin.licence_id == "apache-2.0" and not origin.is_llama
    assert (MODEL / "README.md").read_bytes() == (MODEL.parent / "card.md").read_bytes()
    counts, by_token = plot.routing(MODEL)
    shares = counts.sum(0) / counts.sum((0, 2))[:, None]
    assert float(shares.min()) > 0.01
    assert torch.equal(counts.sum(0), by_token.sum(0))
    assert all(plot.information(counts[:, layer]) > 0.02 for layer in range(counts.shape[1]))
    assert all(plot.information(by_token[:, layer]) > 0.5 for layer in range(counts.shape[1]))
