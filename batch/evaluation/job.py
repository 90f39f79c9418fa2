"""One evaluation: a run over the lines as `batch` does one, with another preparer, backend and writer."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from batch.backends.base import Backend
from batch.evaluation.figures import Figures
from batch.evaluation.lines import ScoredPreparer, ScoreWriter
from batch.inputs import open_input
from batch.job import BatchOptions, Front, engine_options, job_facts, load_front, make_preparer, require_consistent
from batch.run import LineWork, check_targets, run_lines
from batch.state import RunState
from batch.summary import Summary, model_fingerprint, versions
from l4tool.core.atomic import write_file
from l4tool.core.errors import EXIT_ERROR_LINES, EXIT_OK, CheckpointError, UsageError


@dataclass(frozen=True)
class EvalOptions:
    """The command's options; `run` has no output of its own. `output` None: nothing is kept, and a run that is stopped
    begins anew. `json`: where the figures go, too."""

    run: BatchOptions
    against: Path | None = None
    json: Path | None = None
    output: Path | None = None


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation."""

    figures: Figures
    summary: Summary
    facts: dict[str, Any]

    @property
    def exit_code(self) -> int:
        return EXIT_ERROR_LINES if self.figures.all.errors else EXIT_OK

    def as_json(self) -> str:
        """The figures, and what they are of. The same lines and models give the same text."""
        found = {**self.facts, **self.figures.as_json(), "versions": versions()}
        return json.dumps(found, indent=2, ensure_ascii=False) + "\n"


def scoring_backend(run: BatchOptions, front: Front, against: Path | None) -> Backend:
    """The built-in engine, once for each model, in this process."""
    from batch.backends.embedded import EmbeddedOptions
    from batch.backends.scoring import ScoringBackend

    paths = [run.model] if against is None else [run.model, against]
    return ScoringBackend(paths, front.tokenizer, EmbeddedOptions(**engine_options(run)))


MakeBackend = Callable[[BatchOptions, Front, Path | None], Backend]


def run_eval(options: EvalOptions, make_backend: MakeBackend = scoring_backend) -> Evaluation:
    """Score every line of the input that has no scores yet. Raises L4Error; with an output the same call carries
    on."""
    run, against = options.run, options.against
    require_consistent(run)
    if options.output is not None and (str(options.output) == "-" or _is_special(options.output)):
        raise UsageError("-o takes a file: what it holds is read again", hint="leave -o away to keep nothing")
    check_targets(open_input(run.input), {"-o": options.output, "--json": options.json})
    figures = Figures(against is not None)
    facts: dict[str, Any] = {"data": str(run.input), "model": str(run.model)}
    inexact = {"activations": run.activations, "kv_dtype": run.kv_dtype}
    facts |= {name: value for name, value in inexact.items() if value != "auto"}

    def job(run: BatchOptions, front: Front, fingerprint: str) -> dict[str, Any]:
        other = None if against is None else model_fingerprint(against)
        facts["model_fingerprint"] = fingerprint
        if against is not None:
            facts.update(against=str(against), against_fingerprint=other)
        return {"command": "eval", "against": other, **job_facts(run, front, fingerprint)}

    work = LineWork(
        "eval",
        load=lambda run: _load_front(run, against),
        make_backend=lambda run, front: make_backend(run, front, against),
        facts=job,
        preparer=lambda run, front: ScoredPreparer(make_preparer(run, front)),
        writer=lambda *_: ScoreWriter(),
        at_end=lambda state: _collect(state, figures),
        is_kept=options.output is not None,
    )
    with _output(options.output) as output:
        summary = run_lines(replace(run, output=output, in_order=True), work)
    found = Evaluation(figures, summary, facts)
    if options.json is not None and str(options.json) != "-":
        write_file(options.json, found.as_json())
    return found


@contextlib.contextmanager
def _output(path: Path | None) -> Iterator[Path]:
    """Where lines are written: a file that goes again, where none is asked for."""
    if path is not None:
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="l4tool-eval-") as folder:
        yield Path(folder) / "scores.jsonl"


def _is_special(path: Path) -> bool:
    return path.exists() and not path.is_file() and not path.is_dir()


def _collect(state: RunState, figures: Figures) -> None:
    figures.read(state.results())


def _load_front(run: BatchOptions, against: Path | None) -> Front:
    """The model's front, once the other one's is seen to speak of the same tokens. Raises CheckpointError."""
    front = load_front(run)
    if against is not None:
        _check_alike(front, load_front(replace(run, model=against)), run.model, against)
    return front


def _check_alike(front: Front, other: Front, model: Path, against: Path) -> None:
    """What one model is given, the other one understands, and what both say can be compared."""
    ours, theirs = front.tokenizer.vocabulary(), other.tokenizer.vocabulary()
    if ours != theirs:
        token = min((t for t in {**ours, **theirs} if ours.get(t) != theirs.get(t)), key=lambda t: (len(t), t))
        raise CheckpointError(
            f"{against} has another tokenizer than {model}: the token {token!r} is {_place(theirs, token)} there and "
            f"{_place(ours, token)} here",
            hint="only models with the same vocabulary can be compared",
        )
    sizes = [each.arch.text.vocab_size for each in (front, other)]
    if sizes[0] != sizes[1]:
        raise CheckpointError(f"{against} gives {sizes[1]:,} logits, {model} {sizes[0]:,}: they cannot be compared")
    pictures = [
        (f.tiles, f.arch.vision.tokens_per_tile, f.arch.image_token_id) for f in (front, other) if f.arch.vision
    ]
    if len(pictures) == 2 and pictures[0] != pictures[1]:
        raise CheckpointError(f"{against} sees pictures in other tiles than {model}: they cannot be compared")


def _place(vocabulary: dict[str, int], token: str) -> str:
    return f"number {vocabulary[token]:,}" if token in vocabulary else "absent"
