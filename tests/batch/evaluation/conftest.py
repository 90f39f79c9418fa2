"""Evaluations over tiny models that are loaded once, float32."""

import json
from types import SimpleNamespace

import pytest

from batch.backends.embedded import EmbeddedOptions
from batch.backends.scoring import ScoringBackend
from batch.evaluation.job import EvalOptions, run_eval
from batch.generation import SamplingOptions
from batch.job import BatchOptions, load_front
from batch.model.model import load_model
from batch.state import StateOptions
from converters.detect import open_checkpoint
from tests import checkpoints
from tests.threads import one_thread  # noqa: F401


@pytest.fixture(scope="package")
def other_tiny(tmp_path_factory):
    """Scout-like with other weights, the same tokenizer."""
    return checkpoints.make(tmp_path_factory.mktemp("other") / "model", seed=1)


@pytest.fixture(scope="package")
def models(scout_tiny, other_tiny):
    """folder → its model."""
    return {folder: load_model(open_checkpoint(folder), "cpu", "float32") for folder in (scout_tiny, other_tiny)}


@pytest.fixture(scope="package")
def front(scout_tiny):
    return load_front(BatchOptions("in", "out", scout_tiny))


@pytest.fixture
def evaluate(tmp_path, scout_tiny, models):
    """evaluate(lines or None to leave the input, against=folder, force=…, fields of BatchOptions …) → figures as JSON,
    output lines, the evaluation. `output` False: none is kept."""

    def call(lines=None, against=None, force=False, output=True, engine=None, **options):
        source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
        if lines is not None:
            source.write_bytes(b"".join(encode(line) + b"\n" for line in lines))

        def backend(run, front, other):
            paths = [run.model] if other is None else [run.model, other]
            return ScoringBackend([models[p] for p in paths], front.tokenizer, engine or EmbeddedOptions())

        sampling = SamplingOptions(max_tokens=options.pop("max_tokens", 6), temperature=0.0)
        model = options.pop("model", scout_tiny)
        run = BatchOptions(source, None, model, sampling, state=StateOptions(force=force), dtype="float32", **options)
        kept = target if output else None
        found = run_eval(EvalOptions(run, against, tmp_path / "figures.json", kept), options.get("backend", backend))
        figures = json.loads((tmp_path / "figures.json").read_text())
        raw = target.read_bytes().splitlines() if output else []
        return SimpleNamespace(figures=figures, lines=list(map(json.loads, raw)), found=found)

    return call


def encode(line):
    return line if isinstance(line, bytes) else json.dumps(line).encode()
