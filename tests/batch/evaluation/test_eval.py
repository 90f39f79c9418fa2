"""Whole evaluations: figures against transformers, every kind of line, and runs that end early."""

import json
import math

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from batch.backends import scoring
from batch.backends.embedded import EmbeddedOptions
from batch.evaluation.figures import Figures
from batch.evaluation.job import EvalOptions, run_eval
from batch.generation import SamplingOptions
from batch.images import load_tiles
from batch.job import BatchOptions
from batch.journal import journal_path
from batch.schema import ImageRef, Turn
from l4tool.core.errors import CheckpointError, LockHeld, UsageError, WriteError
from l4tool.core.prompt import EOT
from tests import checkpoints

TEXT = "The water goes down to the old house. " * 6
LINES = [
    {"id": "a", "prompt": "What is water?", "answer": "A good thing to have", "task": "words"},
    {"id": "b", "prompt": "What is this?", "images": ["wide.png"], "answer": ["a picture", "an image"], "task": "seen"},
    {"text": TEXT, "id": "t"},
    {"custom_id": "c", "method": "POST", "url": "/v1/chat/completions", "task": "words", "answer": "there",
     "body": {"messages": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "hi"}]}},
    {"id": "d", "prompt": "Once upon a", "raw": True, "answer": " time"},
]  # fmt: skip


@pytest.fixture(autouse=True)
def image(tmp_path):
    Image.linear_gradient("L").resize((150, 60)).save(tmp_path / "wide.png")


@pytest.fixture(scope="module")
def references(scout_tiny, other_tiny):
    kind = transformers.Llama4ForConditionalGeneration
    return [kind.from_pretrained(path, dtype=torch.float32).eval() for path in (scout_tiny, other_tiny)]


def prompts_and_references(front, folder):
    """id → (prompt ids, reference ids, pixels or None), put together by hand."""
    tokenizer, eot = front.tokenizer, front.tokenizer.control_tokens[EOT]
    end = front.tokenizer.control_tokens["<|end_of_text|>"]
    tiles = load_tiles((folder / "wide.png").read_bytes(), front.tiles)
    bos = [front.tokenizer.control_tokens["<|begin_of_text|>"]]
    system = [Turn("system", ("Be short.",)), Turn("user", ("hi",))]
    seen = [Turn("user", (ImageRef("wide.png"), "What is this?"))]
    return {
        "a": (front.chat.encode([Turn("user", ("What is water?",))], []),
              [*tokenizer.encode("A good thing to have"), eot], None),
        "b": (front.chat.encode(seen, [tiles]), [*tokenizer.encode("a picture"), eot], tiles.pixels),
        "t": (bos, tokenizer.encode(TEXT), None),
        "c": (front.chat.encode(system, []), [*tokenizer.encode("there"), eot], None),
        "d": ([*bos, *tokenizer.encode("Once upon a")], [*tokenizer.encode(" time"), end], None),
    }  # fmt: skip


def logs(reference, prompt, answer, pixels):
    """log-probabilities float64 [tokens of the answer, V]."""
    inputs = {}
    if pixels is not None:
        inputs["pixel_values"] = (torch.from_numpy(pixels).float() / 255 - 0.5) / 0.5
    with torch.inference_mode():
        logits = reference(torch.tensor([[*prompt, *answer]]), **inputs).logits[0]
    return logits[len(prompt) - 1 : -1].double().log_softmax(-1)


def test_figures_are_those_of_transformers(evaluate, references, front, tmp_path, other_tiny):
    got = evaluate(LINES, against=other_tiny)
    assert [line["id"] for line in got.lines] == ["a", "b", "t", "c", "d"]  # in input order
    nll, kls, same = [[], []], [], []
    for line in got.lines:
        prompt, answer, pixels = prompts_and_references(front, tmp_path)[line["id"]]
        ours, theirs = (logs(r, prompt, answer, pixels) for r in references)
        for place, log in enumerate((ours, theirs)):
            nll[place].append(-log.gather(1, torch.tensor(answer)[:, None]).sum().item())
        kl = (theirs.exp() * (theirs - ours)).sum(-1)
        kls.append(kl)
        same.append(int((ours.argmax(-1) == theirs.argmax(-1)).sum()))
        assert line["tokens"] == len(answer) and line["same_top"] == same[-1]
        assert line["nll"] == pytest.approx(nll[0][-1], rel=1e-4)
        assert line["against"]["nll"] == pytest.approx(nll[1][-1], rel=1e-4)
        assert line["kl"] == pytest.approx(kl.sum().item(), rel=1e-3)
        assert line["kl_max"] == pytest.approx(kl.max().item(), rel=1e-3)
    figures, every = got.figures["all"], torch.cat(kls).numpy()
    assert figures["perplexity"] == pytest.approx(math.exp(sum(nll[0]) / len(every)), rel=1e-4)
    assert figures["against"]["perplexity"] == pytest.approx(math.exp(sum(nll[1]) / len(every)), rel=1e-4)
    assert figures["kl_mean"] == pytest.approx(every.mean(), rel=1e-3)
    assert figures["kl_max"] == pytest.approx(every.max(), rel=1e-3)
    assert figures["kl_p99"] == pytest.approx(np.quantile(every, 0.99, method="inverted_cdf"), rel=0.03)
    assert figures["same_top"] == pytest.approx(sum(same) / len(every))
    assert set(got.figures["tasks"]) == {"words", "seen"} and got.figures["tasks"]["words"]["lines"] == 2
    assert got.found.exit_code == 0 and figures["tokens"] == len(every) and figures["answers"] == 4


def test_answers_are_those_of_batch_and_right_where_accepted(evaluate, tmp_path, scout_tiny, other_tiny):
    from batch.job import run_batch
    from batch.state import StateOptions

    def answers(model):
        plain = [{k: v for k, v in line.items() if k not in ("answer", "task")} for line in LINES if "text" not in line]
        (tmp_path / "b.jsonl").write_text("".join(json.dumps(line) + "\n" for line in plain))
        sampling, out = SamplingOptions(max_tokens=6, temperature=0.0), tmp_path / "b.out"
        run_batch(BatchOptions(tmp_path / "b.jsonl", out, model, sampling, dtype="float32", state=StateOptions(True)))
        found = {}
        for line in map(json.loads, out.read_text().splitlines()):
            body = line["response"]["body"]["choices"][0]["message"]["content"] if "response" in line else line["text"]
            found[line.get("custom_id", line.get("id"))] = body
        return found

    ours, theirs = answers(scout_tiny), answers(other_tiny)
    lines = [dict(line) for line in LINES]
    lines[0]["answer"] = ["no", f"  {ours['a']}\n"]
    lines[3]["answer"] = theirs["c"].strip()
    got = evaluate(lines, against=other_tiny)
    by_id = {line["id"]: line for line in got.lines}
    assert {i: by_id[i]["answer"] for i in ours} == ours
    assert {i: by_id[i]["against"]["answer"] for i in theirs} == theirs
    assert "answer" not in by_id["t"] and "correct" not in by_id["t"]["against"]
    assert by_id["a"]["correct"] and not by_id["b"]["correct"] and by_id["c"]["against"]["correct"]
    words = got.figures["tasks"]["words"]
    assert words["exact_match"] == (1 + by_id["c"]["correct"]) / 2 and words["against"]["correct"] >= 1
    table = got.found.figures.as_table().splitlines()
    assert table[0].split()[:2] == ["task", "lines"] and table[-1].startswith("all") and "KL mean" in table[0]
    assert [row.split()[0] for row in table[2:]] == ["seen", "words", "all"]


def test_a_line_that_asks_for_sampling_is_answered_greedily(evaluate):
    greedy = evaluate([LINES[0]]).lines[0]
    asked = {**LINES[0], "temperature": 1.5, "n": 3, "logprobs": True, "seed": 4}
    assert evaluate([asked], force=True).lines[0] == greedy


def test_company_cuts_and_cache_do_not_show(evaluate, other_tiny):
    lines = [*LINES, *({"prompt": f"number {i} " * 20, "answer": f"is {i}"} for i in range(6))]
    together = evaluate(lines, against=other_tiny)
    for engine in (EmbeddedOptions(max_batch_tokens=9, max_seqs=3), EmbeddedOptions(prefix_cache=False, max_seqs=2)):
        again = evaluate(lines, against=other_tiny, engine=engine, force=True)
        assert again.lines == together.lines and again.figures == together.figures


def test_a_model_against_itself(evaluate, scout_tiny):
    figures = evaluate(LINES, against=scout_tiny).figures["all"]
    assert (figures["kl_mean"], figures["kl_p99"], figures["kl_max"], figures["same_top"]) == (0, 0, 0, 1)
    assert figures["against"]["perplexity"] == figures["perplexity"]


BAD = [
    (b"not json", "invalid_json"),
    ({"id": 1, "prompt": "x"}, "no_answer"),
    ({"prompt": "x", "answer": None}, "no_answer"),
    ({"prompt": "x", "answer": []}, "invalid_request"),
    ({"prompt": "x", "answer": 4}, "invalid_request"),
    ({"prompt": "x", "answer": "y", "task": ""}, "invalid_request"),
    ({"prompt": "x", "answer": "y", "nonsense": 1}, "unknown_field"),
    ({"prompt": "x", "answer": "y", "task": "t", "images": ["missing.png"]}, "image_not_found"),
    ({"text": ""}, "invalid_request"),
    ({"text": "x", "max_tokens": 3}, "unknown_field"),
    ({"text": "x", "answer": "y"}, "invalid_request"),
    ({"answer": "y"}, "invalid_request"),
    ({"text": "word " * 5000}, "prompt_too_long"),
    ({"prompt": "hi", "answer": "word " * 5000}, "prompt_too_long"),
    ([1], "invalid_line"),
]


def test_bad_lines_are_error_lines_and_the_rest_is_scored(evaluate):
    lines = [item for line, _ in BAD for item in (line, LINES[0] | {"id": None})]
    got = evaluate(lines)
    found = {line["line"]: line["error"]["code"] for line in got.lines if "error" in line}
    assert found == {1 + 2 * place: code for place, (_, code) in enumerate(BAD)}
    assert all(line["error"]["message"] for line in got.lines if "error" in line)
    assert got.found.exit_code == 3 and got.figures["all"]["answers"] == len(BAD)
    assert got.figures["all"]["errors"] == len(BAD) and got.figures["tasks"]["t"]["errors"] == 1
    assert got.figures["errors_by_code"]["no_answer"] == 2
    assert evaluate().found.exit_code == 3  # nothing to do, and still errors in it


def test_only_errors_and_no_lines_at_all(evaluate):
    figures = evaluate([{"prompt": "x"}]).figures["all"]
    assert figures["perplexity"] is None and figures["exact_match"] is None and figures["tokens"] == 0
    assert evaluate([], force=True).figures["all"]["lines"] == 0
    assert evaluate([], output=False).found.figures.as_table()


def test_text_and_one_model_alone(evaluate):
    got = evaluate([{"text": TEXT, "task": "prose"}])
    assert set(got.lines[0]) == {"id", "line", "task", "tokens", "nll"}
    assert "kl_mean" not in got.figures["all"] and "against" not in got.figures
    assert "KL" not in got.found.figures.as_table()


# -- carrying on


class Stopped(Exception):
    pass


def test_an_interrupted_run_carries_on_with_the_same_figures(evaluate, other_tiny, monkeypatch, tmp_path):
    lines = [*LINES, *({"id": i, "prompt": f"number {i}", "answer": f"is {i}", "task": "n"} for i in range(12))]
    whole = evaluate(lines, against=other_tiny)
    from batch.evaluation.lines import ScoreWriter

    real, done = ScoreWriter.success, []

    def fails(self, info, result):
        if len(done) == 7:
            raise Stopped
        done.append(info.number)
        return real(self, info, result)

    monkeypatch.setattr(ScoreWriter, "success", fails)
    with pytest.raises(Stopped):
        evaluate(against=other_tiny, force=True, engine=EmbeddedOptions(max_seqs=4))
    monkeypatch.undo()
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 7
    again = evaluate(against=other_tiny)
    assert again.lines == whole.lines and again.figures == whole.figures
    assert again.found.summary.new("lines_done") == len(lines) - 7


def test_figures_are_of_the_lines_that_the_input_has(evaluate):
    lines = [{"id": i, "prompt": f"number {i}", "answer": "x"} for i in range(4)]
    evaluate(lines)
    assert evaluate(limit=2).figures["all"]["lines"] == 2
    assert evaluate(lines[1:]).figures["all"]["lines"] == 3
    lines[1] = {**lines[1], "answer": "other"}
    got = evaluate(lines)
    assert got.figures["all"]["lines"] == 4 and len(got.lines) == 4
    assert got.figures == evaluate(force=True).figures


def test_another_model_or_option_or_a_second_run_is_refused(evaluate, other_tiny, scout_tiny, maverick_tiny, tmp_path):
    evaluate(LINES[:1])
    for change, what in (
        ({"against": other_tiny}, "against was None"), ({"model": maverick_tiny}, "model was"),
        ({"max_tokens": 7}, "max_tokens was 6"),
    ):  # fmt: skip
        with pytest.raises(WriteError, match=what):
            evaluate(**change)
    from batch.journal import Journal

    held = Journal(journal_path(tmp_path / "out.jsonl"))
    with pytest.raises(LockHeld):
        evaluate()
    held.close()
    options = BatchOptions(tmp_path / "in.jsonl", tmp_path / "out.jsonl", scout_tiny)
    from batch.job import run_batch

    with pytest.raises(WriteError, match="command was 'eval'"):
        run_batch(options)


@pytest.mark.parametrize("output", ["-", "/dev/null"])
def test_an_output_that_cannot_be_read_again_is_refused(output, scout_tiny, tmp_path):
    (tmp_path / "in.jsonl").write_text("{}\n")
    with pytest.raises(UsageError, match="-o takes a file"):
        run_eval(EvalOptions(BatchOptions(tmp_path / "in.jsonl", None, scout_tiny), None, None, type(tmp_path)(output)))


def test_targets_are_checked_first(scout_tiny, tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text("{}\n")
    run = BatchOptions(source, None, scout_tiny)
    with pytest.raises(UsageError, match="is the input"):
        run_eval(EvalOptions(run, None, source))
    with pytest.raises(UsageError, match="the same file"):
        run_eval(EvalOptions(run, None, tmp_path / "x", tmp_path / "x"))
    with pytest.raises(WriteError, match="no such folder"):
        run_eval(EvalOptions(run, None, tmp_path / "no" / "x"))


def test_models_that_cannot_be_compared(evaluate, scout_tiny, tmp_path):
    wide = checkpoints.copy(scout_tiny, tmp_path / "wide")
    checkpoints.edit_config(wide, lambda config: config["text_config"].update(vocab_size=5000))
    with pytest.raises(CheckpointError, match="gives 5,000 logits"):
        evaluate(LINES, against=wide)
    tiles = checkpoints.copy(scout_tiny, tmp_path / "tiles")
    name = next(n for n in ("preprocessor_config.json", "processor_config.json") if (tiles / n).exists())
    content = json.loads((tiles / name).read_text())
    content.get("image_processor", content)["max_patches"] = 3
    (tiles / name).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="other tiles"):
        evaluate(LINES, against=tiles)
    swapped = checkpoints.copy(scout_tiny, tmp_path / "swapped")
    path = swapped / "tokenizer.json"
    content = json.loads(path.read_text())
    vocab = content["model"]["vocab"]
    first, second = list(vocab)[300:302]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"the token .* is number [\d,]+ there and number [\d,]+ here"):
        evaluate(LINES, against=swapped)
    assert not (tmp_path / "out.jsonl").exists()


def test_tasks_are_bounded(monkeypatch):
    monkeypatch.setattr("batch.evaluation.figures.MAX_TASKS", 2)
    figures = Figures(False)
    figures.read(json.dumps({"task": str(i % 4), "tokens": 1, "nll": 1.0}).encode() for i in range(8))
    assert set(figures.tasks) == {"0", "1"} and figures.all.lines == 8


def test_what_costs_exactness_is_asked_of_the_first_model_alone(front, scout_tiny, other_tiny, monkeypatch):
    asked, load = [], scoring.load_whole

    def noted(reader, device, dtype, activations, copies, kv_dtype):
        asked.append((activations, kv_dtype))
        return load(reader, device, dtype, "auto", copies)

    monkeypatch.setattr(scoring, "load_whole", noted)
    options = EmbeddedOptions(activations="int8", dtype="float32", kv_memory_bytes=4 << 20)
    scoring.ScoringBackend([scout_tiny, other_tiny], front.tokenizer, options).close()
    assert asked == [("int8", "auto"), ("auto", "auto")]
