"""What the demo model is trained with: questions and their answers, the split, the network, a whole small training."""

import argparse
import json
import random
import re
import sys

import pytest
import torch
import torch.nn.functional as F

from batch.chat import ChatFormat, find_template
from batch.generation import SamplingDefaults, SamplingOptions
from batch.images import TileSpec
from batch.jsonl import RawLine
from batch.prepare import LinePreparer
from batch.tokenizer import Tokenizer
from converters.arch_io import arch_from_config
from examples.demo_model import pictures, questions, train
from examples.demo_model.encoding import Encoder, collate
from examples.demo_model.held_out import line_of
from examples.demo_model.initial import new_parameters
from examples.demo_model.muon import orthogonal
from examples.demo_model.network import Network
from examples.demo_model.questions import Draw

TASKS = [pytest.param(task, id=task.__name__) for task in train.TASKS]


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A checkpoint folder without weights, and what reads it."""
    folder = tmp_path_factory.mktemp("bare")
    config = train.model_config()
    train.write_side_files(folder, config, seed=0)
    arch = arch_from_config(config, "the demo model's config")
    return folder, arch, Encoder(Tokenizer.load(folder), arch)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("held_out", [True, False])
def test_every_question_is_on_its_side_of_the_split(task, held_out, monkeypatch):
    taken = []

    def wants(draw, key):
        found = original(draw, key)
        taken.extend([key] if found else [])
        return found

    original = Draw.wants
    monkeypatch.setattr(Draw, "wants", wants)
    draw = Draw(random.Random(3), held_out)
    for number in range(1, 41):
        task(draw)
        assert len(taken) >= number  # each asked for its key
    assert all(questions.is_held_out(key) == held_out for key in taken)


def test_no_sum_is_both_trained_and_examined():
    """Of these there are so few that training asks nearly all: 2,000 in three wordings."""

    def sums(held_out, number):
        draw = Draw(random.Random(3), held_out)
        return {question for _ in range(number) for question, _ in questions.arithmetic(draw).turns}

    trained, examined = sums(False, 3000), sums(True, 300)
    assert len(trained) > 4000 and len(examined) > 150 and not trained & examined


@pytest.mark.parametrize("task", TASKS)
def test_questions_are_the_same_for_everybody(task):
    def made():
        draw = Draw(random.Random(5), held_out=True)
        return [task(draw) for _ in range(5)]

    for one, other in zip(made(), made(), strict=True):
        assert (one.turns, one.system) == (other.turns, other.system)
        assert [image.tobytes() for image in one.pictures] == [image.tobytes() for image in other.pictures]


@pytest.mark.parametrize("task", TASKS)
def test_harder_questions_are_longer(task):
    def longest(growth):
        draw = Draw(random.Random(4), held_out=True, growth=growth)
        return max(sum(len(question) for question, _ in task(draw).turns) for _ in range(40))

    grows = task in (*questions.TEXT_TASKS[1:6], questions.instructions, questions.memory)
    assert longest(2.0) > longest(1.0) if grows else longest(2.0) > 0


def test_answers_are_right():
    draw = Draw(random.Random(1), held_out=False)
    for _ in range(300):
        for question, answer in questions.arithmetic(draw).turns:
            a, b = (int(part) for part in "".join(c if c.isdigit() else " " for c in question).split())
            minus = "-" in question or "Take" in question
            assert int(answer) == (abs(a - b) if minus else a + b) and min(a, b) <= 9
        for question, answer in questions.sorting(draw).turns:
            order = [int(digit) for digit in question.partition(":")[2].split()]
            assert [int(digit) for digit in answer.split()] == sorted(order, reverse="largest" in question)
        for question, answer in questions.extraction(draw).turns:
            wanted = question.rpartition("Give ")[2].removesuffix(" as JSON.").split(", ")
            fields = json.loads(answer)
            assert list(fields) == wanted and all(str(value) in question for value in fields.values())
        told = questions.look_up(draw)
        table = told.turns[0][0].partition(". ")[0] + ","
        for question, answer in told.turns:
            key = re.search(r"(?:Where does|Who lives in) (\w+)(?: live)?\?$", question)[1]
            assert f" {key} {answer}," in table
        listed = questions.listing(draw)
        table = listed.turns[0][0].partition(". ")[0] + ","
        for question, answer in listed.turns:
            pairs = answer.split(", ")
            assert [pair.split()[0] for pair in pairs] == question.rpartition("List: ")[2].split()
            assert all(f" {pair}," in table for pair in pairs)


def test_every_shape_and_digit_can_be_told_apart():
    def ink(image):
        grey = torch.tensor(list(image.convert("L").tobytes())).view(image.height, image.width)
        return grey < 200

    shapes = [ink(pictures.draw_scene(random.Random(2), {4: (shape, "black")})) for shape in pictures.SHAPES]
    assert len({tuple(shape.flatten().tolist()) for shape in shapes}) == len(pictures.SHAPES)
    assert len(set(pictures.DIGITS)) == 10
    scene = {0: ("circle", "red"), 8: ("square", "blue")}
    inked = ink(pictures.draw_scene(random.Random(2), scene))
    cells = [int(inked[row : row + 28, column : column + 28].sum()) for row in (0, 28, 56) for column in (0, 28, 56)]
    assert [cell > 0 for cell in cells] == [True, *[False] * 7, True]


@pytest.mark.parametrize("task", TASKS)
def test_training_sees_what_batch_makes_of_the_line(bare, task, tmp_path):
    folder, arch, encoder = bare
    chat = ChatFormat(encoder.tokenizer, find_template(folder), arch.vision.tokens_per_tile)
    defaults = SamplingDefaults.build(SamplingOptions(), {}, arch.text.eos_token_ids)
    preparer = LinePreparer(arch, chat, TileSpec(arch.vision.image_size), defaults, tmp_path, 48)
    draw = Draw(random.Random(6), held_out=True)
    for number in range(5):
        made = task(draw)
        seen = encoder.encode(made)
        line = {key: value for key, value in line_of(made, f"x{number}", tmp_path).items() if key in ("id", "messages")}
        request = preparer.prepare(RawLine(1, json.dumps(line).encode())).request
        answer = [*encoder.tokenizer.encode(made.turns[-1][1]), encoder.id["<|eot|>"]]
        assert seen.ids == [*request.prompt, *answer]
        assert seen.answer[-len(answer) :] == [True] * len(answer) and not seen.answer[-len(answer) - 1]
        tiles = [image.pixels for image in request.images]
        assert len(tiles) == len(seen.tiles) and all((a == b).all() for a, b in zip(tiles, seen.tiles, strict=True))
    preparer.close()


@pytest.mark.parametrize("kind", ["scout", "maverick"])
def test_network_equals_transformers_gradients_too(bare, kind, tmp_path):
    import transformers

    _, _, encoder = bare
    config = train.model_config(kind)
    arch = arch_from_config(config, "config")
    parameters = new_parameters(arch, encoder.tokenizer, seed=1)
    with torch.no_grad():
        for tensor in parameters.values():
            tensor.copy_(tensor.bfloat16())
    train.write_checkpoint(tmp_path, config, parameters)
    model = transformers.Llama4ForConditionalGeneration.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    )
    draw = Draw(random.Random(8), held_out=False)
    made = [encoder.encode(task(draw)) for task in train.TASKS]
    long = next(e for e in iter(lambda: encoder.encode(questions.memory(draw)), None) if len(e.ids) > 140)  # two chunks
    batch = collate([*made, long], arch.text.pad_token_id)
    logits, routing = Network(arch, parameters).forward(batch.tokens, batch.real, batch.tiles, batch.wanted)
    F.cross_entropy(logits, batch.targets).backward()
    assert int(routing.counts.sum()) == len(arch.text.moe_layers) * int(batch.real.sum())
    pixels = (batch.tiles.float() / 255 - 0.5) / 0.5
    theirs = model(
        input_ids=batch.tokens, attention_mask=batch.real.long(), pixel_values=pixels, use_cache=False
    ).logits[batch.wanted]  # fmt: skip
    assert float((logits - theirs).detach().abs().max()) < 2e-4
    F.cross_entropy(theirs, batch.targets).backward()
    named = {name.removeprefix("model."): tensor for name, tensor in model.named_parameters()}
    names = ("embed_tokens.weight", "layers.0.self_attn.q_proj.weight", "layers.1.feed_forward.experts.gate_up_proj",
             "layers.1.feed_forward.router.weight", "layers.3.self_attn.k_proj.weight")  # fmt: skip
    for name in [*(f"language_model.model.{name}" for name in names), "vision_model.class_embedding"]:
        expected = named[name if name in named else name.replace("language_model.model.", "language_model.")].grad
        assert float((parameters[name].grad - expected).norm()) < 1e-3 * float(expected.norm()), name


def options(**changed):
    plain = {"seed": 0, "steps": 6, "batch": 8, "group": 4, "every": 3, "adam_rate": 3e-3,
             "muon_rate": 2e-2, "until": None, "polish": None}  # fmt: skip
    return argparse.Namespace(**plain | changed)


def test_training_is_reproducible_and_learns(bare, tmp_path, monkeypatch, capsys):
    _, arch, encoder = bare
    monkeypatch.setattr(train, "EXAMINED", 2)
    saved = []

    def run(given, log):
        return train.train(arch, encoder, given, log, train.Company(), saved.append).parameters

    first, second = (run(options(), tmp_path / f"{n}.jsonl") for n in (1, 2))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    entries = [json.loads(line) for line in (tmp_path / "1.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [0, 3, 6] and entries[2]["loss"] < entries[1]["loss"]
    assert all(abs(sum(layer) - 1) < 0.01 for layer in entries[2]["routing"])
    other = run(options(seed=1), tmp_path / "3.jsonl")
    assert not torch.equal(first["language_model.lm_head.weight"], other["language_model.lm_head.weight"])
    assert len(saved) == 9 and saved[2] is first
    capsys.readouterr()


def test_a_training_is_stopped_and_polished(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "EXAMINED", 2)
    first, second = tmp_path / "first", tmp_path / "second"
    sizes = ["--processes", "1", "--batch", "4", "--group", "4"]
    for options in ([first, "--steps", "9", "--until", "2"], [second, "--polish", first, "--steps", "2"]):
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, options), *sizes])
        train.main()
    entries = [json.loads(line) for line in (second / "training.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [0, 2, 4]
    assert entries[:2] == [json.loads(line) for line in (first / "training.jsonl").read_text().splitlines()]
    before, after = (train.read_parameters(path)["language_model.lm_head.weight"] for path in (first, second))
    assert 0 < float((after - before).detach().norm()) < 0.5 * float(before.detach().norm())
    capsys.readouterr()


def test_orthogonal_matrices_of_both_shapes():
    for shape in ((3, 64, 128), (2, 128, 64)):
        made = orthogonal(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
        values = torch.linalg.svdvals(made)
        assert made.shape == shape and float(values.min()) > 0.5 and float(values.max()) < 1.3
