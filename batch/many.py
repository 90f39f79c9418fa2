"""Runs of what the command line names: one input, or many that share one model, loaded when the first needs it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from batch import job
from batch.backends.base import Backend, RequestSource
from batch.places import Places, check_folders, find_inputs, is_being_written, is_many, pair_up
from batch.remote import is_url
from batch.requests import GenerationResult
from batch.spool import Delivery, spooled
from batch.summary import Summary, TooManyErrors
from l4tool.core.atomic import write_file
from l4tool.core.console import note, table
from l4tool.core.errors import EXIT_OK, CheckpointError, DeviceError, L4Error


def run_places(
    places: Places, options: job.BatchOptions, make_backend: job.MakeBackend | None = None
) -> Summary | ManySummary:
    """Run what is named; `options` has the rest. Raises L4Error; with many inputs only for what ends them all."""
    job.require_consistent(options)
    if is_many(places.input):
        return _run_many(places, options, make_backend or job.embedded_backend)
    with _one(places, options) as (one, deliveries):
        backend = () if make_backend is None else (make_backend,)
        summary = job.run_batch(one, *backend, deliveries=deliveries)
    summary.output = places.output
    return summary


@contextlib.contextmanager
def _one(places: Places, options: job.BatchOptions) -> Iterator[tuple[job.BatchOptions, list[Delivery]]]:
    """The options of one run, with local files in the places of what cannot be appended to."""
    in_order, force = options.in_order, options.state.force
    with contextlib.ExitStack() as stack:
        output, deliveries = stack.enter_context(spooled(places.output, places.spool, in_order, force))
        errors = None
        if places.errors is not None:
            errors, more = stack.enter_context(spooled(places.errors, places.spool, False, force))
            deliveries += more
        source = places.input if is_url(places.input) else Path(places.input)
        yield replace(options, input=source, output=output, errors=errors), deliveries


@dataclass(frozen=True)
class Row:
    """What became of one input: its summary, the error that ended its run, or neither where it was left for later."""

    input: str
    output: str
    summary: Summary | None = None
    error: L4Error | None = None

    @property
    def state(self) -> str:
        if self.error is not None:
            return "failed"
        return "left for the next run" if self.summary is None else "done"

    @property
    def exit_code(self) -> int:
        if self.error is not None:
            return self.error.exit_code
        return EXIT_OK if self.summary is None else self.summary.exit_code

    def counts(self) -> tuple[int, int, int, int]:
        """Lines, answers, error lines, and lines done by this run."""
        found = self.summary
        return (0, 0, 0, 0) if found is None else (found.lines, found.ok, found.num_errors, found.new("lines_done"))


@dataclass
class ManySummary:
    """What became of many inputs."""

    input: str
    rows: list[Row] = field(default_factory=list)
    num_inputs: int = 0

    @property
    def is_complete(self) -> bool:
        return len(self.rows) == self.num_inputs and all(row.state == "done" for row in self.rows)

    @property
    def exit_code(self) -> int:
        """The worst: the largest."""
        return max((row.exit_code for row in self.rows), default=EXIT_OK)

    @property
    def num_errors(self) -> int:
        return sum(row.counts()[2] for row in self.rows)

    def as_table(self) -> str:
        header = ("input", "lines", "answered", "errors", "by this run", "")
        rows = [(row.input, *(f"{count:,}" for count in row.counts()), row.state) for row in self.rows]
        if len(rows) > 1:
            totals = [sum(column) for column in zip(*(row.counts() for row in self.rows), strict=True)]
            rows.append((f"{len(self.rows)} inputs", *(f"{count:,}" for count in totals), ""))
        return table(rows, header) if rows else ""

    def as_json(self) -> dict[str, Any]:
        names = ("lines", "ok", "errors", "lines_by_this_run")
        totals = [sum(column) for column in zip(*(row.counts() for row in self.rows), strict=True)] or [0] * len(names)
        files = []
        for row in self.rows:
            one: dict[str, Any] = {"input": row.input, "output": row.output, "state": row.state}
            if row.error is not None:
                one |= {"error": row.error.message, "exit_code": row.error.exit_code}
            files.append(one | ({} if row.summary is None else row.summary.as_json()))
        return {"input": self.input, "inputs": self.num_inputs, "complete": self.is_complete} | {
            **dict(zip(names, totals, strict=True)),
            "files": files,
        }

    def save(self, path: Path) -> None:
        """Write the JSON, whole or not at all. Raises WriteError."""
        write_file(path, json.dumps(self.as_json(), indent=2, ensure_ascii=False) + "\n")


def _run_many(places: Places, options: job.BatchOptions, make_backend: job.MakeBackend) -> ManySummary:
    inputs = find_inputs(places.input)
    summary = ManySummary(places.input, num_inputs=len(inputs))
    if not inputs:
        note(f"nothing to do: there are no inputs in {places.input}")
    pairs = pair_up(places, inputs)
    check_folders(places)
    with contextlib.closing(SharedModel(make_backend)) as model:
        try:
            for pair in pairs:
                summary.rows.append(_run_pair(pair, replace(options, summary=None), model))
        finally:
            if options.summary is not None:
                summary.save(options.summary)
    return summary


def _run_pair(pair: Places, options: job.BatchOptions, model: SharedModel) -> Row:
    """One of many: what is wrong with it alone does not end the others."""
    if is_being_written(pair.input):
        note(f"{pair.input} is still being written: left for the next run")
        return Row(pair.input, pair.output)
    try:
        with _one(pair, options) as (one, deliveries):
            found = job.run_batch(one, model.lend, load=model.load, deliveries=deliveries)
    except (DeviceError, CheckpointError, TooManyErrors):
        raise
    except L4Error as error:
        model.forget()
        where = "" if pair.input in error.message else f"{pair.input}: "
        note(where + error.message + (f"\n  hint: {error.hint}" if error.hint else ""))
        return Row(pair.input, pair.output, error=error)
    found.output = pair.output
    return Row(pair.input, pair.output, found)


class SharedModel:
    """The model of many runs: its front is read once, its backend made when a run first needs it."""

    def __init__(self, make_backend: job.MakeBackend) -> None:
        self._make_backend = make_backend
        self._front: job.Front | None = None
        self._backend: Backend | None = None

    def load(self, options: job.BatchOptions) -> job.Front:
        if self._front is None:
            self._front = job.load_front(options)
        return self._front

    def lend(self, options: job.BatchOptions, front: job.Front) -> Backend:
        """The backend, for one run; closing it then leaves it open for the next."""
        if self._backend is None:
            self._backend = self._make_backend(options, front)
        return _Lent(self._backend)

    def forget(self) -> None:
        """The next run gets a backend of its own: who knows how far the last one came."""
        backend, self._backend = self._backend, None
        if backend is not None:
            backend.close()

    close = forget


class _Lent:
    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    @property
    def stats(self) -> object:
        return getattr(self._backend, "stats", None)

    def run(self, source: RequestSource) -> Iterator[GenerationResult]:
        return self._backend.run(source)

    def close(self) -> None:
        """Its owner closes it."""
