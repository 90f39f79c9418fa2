"""One run over the lines of an input, whatever is done with them: what is done already, what comes next, what is
written. `batch` answers lines, `eval` scores them; nothing grows with the file."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from batch.backends.base import Backend
from batch.failures import device_errors, guarded
from batch.inputs import Input, Lines, open_input
from batch.journal import NO_KEY
from batch.jsonl import LineReader, RawLine, dump_line
from batch.line_keys import LineKeys, id_key
from batch.prepare import LineInfo, Preparer, PreparingSource
from batch.requests import GenerationResult, PreparedRequest
from batch.schema import LineError
from batch.spool import Delivery
from batch.state import RunState
from batch.summary import Summary, engine_stats, license_duty, model_fingerprint
from batch.tokenizer import read_json_object
from converters.origin import read_origin
from l4tool.core.console import Progress, note
from l4tool.core.errors import L4Error, UsageError, WriteError
from l4tool.core.signals import GracefulStop

if TYPE_CHECKING:
    from batch.job import BatchOptions, Front

COUNT_AT_MOST_BYTES = 2**30  # larger inputs: the number of lines is estimated from the first GiB


class LineWriter(Protocol):
    """Results and errors → output lines."""

    def success(self, info: LineInfo, result: Any) -> dict[str, Any]: ...

    def error(self, info: LineInfo, code: str, message: str) -> dict[str, Any]: ...


@dataclass(frozen=True)
class LineWork:
    """What a run does with its lines. `facts` of the job and the model's fingerprint must stay the same between runs
    that make one output; `writer` gets the fingerprint and the time of the first run. `at_end` sees the state when
    every line has its result. `is_kept` False: the output is nobody's business and goes when the run ends."""

    name: str
    load: Callable[[BatchOptions], Front]
    make_backend: Callable[[BatchOptions, Front], Backend]
    facts: Callable[[BatchOptions, Front, str], dict[str, Any]]
    preparer: Callable[[BatchOptions, Front], Preparer]
    writer: Callable[[BatchOptions, Front, str, int], LineWriter]
    at_end: Callable[[RunState], None] = lambda state: None
    is_kept: bool = True


def run_lines(options: BatchOptions, work: LineWork, deliveries: Sequence[Delivery] = ()) -> Summary:
    """Do every line of the input that has no result yet, and deliver the files that the complete output goes to.
    Raises L4Error; what was written until then is whole lines, and the same call carries on."""
    with contextlib.ExitStack() as stack:
        source = open_input(options.input)
        file = stack.enter_context(source.open())
        check_targets(source, {"the output": options.output, "--errors": options.errors, "--summary": options.summary})
        lines = Lines(LineReader(file, options.max_line_bytes, options.limit), source.name)
        front = work.load(options)
        fingerprint = model_fingerprint(options.model)
        state = RunState(options.output, options.errors, work.facts(options, front, fingerprint), options.state)
        stack.callback(state.close)
        stop = stack.enter_context(GracefulStop(options.grace_s))
        duty = license_duty(read_origin(options.model, read_json_object(options.model / "config.json")))
        summary = Summary(str(options.input), str(options.output), str(options.model), fingerprint, duty, state.totals)
        try:
            _answer(options, work, front, source, lines, state, summary, stop, deliveries)
        except BaseException:
            _report_unfinished(options, state, summary, work.is_kept)
            raise
    if options.summary is not None:
        summary.save(options.summary)
    return summary


def _answer(
    options: BatchOptions, work: LineWork, front: Front, source: Input, lines: Lines, state: RunState,
    summary: Summary, stop: GracefulStop, deliveries: Sequence[Delivery],
) -> None:  # fmt: skip
    """Load the model and run, unless there is nothing to do."""
    keys = LineKeys(image_base(options), options.shard)
    total = _look_ahead(options, source, state, keys)
    wanted = state.wanted(lines, keys)
    first = next(wanted, None)
    if first is None:
        lines.raise_if_broken()
        note(_nothing_to_do(options, keys, deliveries))
    else:
        if state.has_results:
            note(f"carrying on: {state.totals.lines:,} lines of {options.output} are done")
        run = _Run(options, work, front, state, summary, stop, total, itertools.chain([first], wanted))
        with contextlib.closing(run.source):
            if not source.is_stream:
                run.source.start()  # the first lines are prepared while the model loads
            started_s = time.monotonic()
            with device_errors():
                made = work.make_backend(options, front)
            with contextlib.closing(made) as backend:
                summary.load_seconds = time.monotonic() - started_s
                state.start()
                run.run(backend)
        stop.raise_if_requested()
        lines.raise_if_broken()
    summary.lines, summary.blank_lines = keys.lines, lines.reader.blank_lines
    work.at_end(state)
    if first is not None or options.limit is None or not state.is_complete:
        state.finish(lines.reader.lines, keys.digest(), options.in_order)
    if options.limit is None and (gone := state.num_gone()):
        note(f"{gone:,} lines of {options.output} answer lines that the input does not have any more")
    for delivery in deliveries:
        delivery.deliver()
    summary.is_complete = True


def _look_ahead(options: BatchOptions, source: Input, state: RunState, keys: LineKeys) -> int | None:
    """The number of lines to be answered; where there are results already, also which of them are still asked for."""
    if source.is_stream:
        return options.limit
    if state.has_results:
        with source.open() as file:
            lines = Lines(LineReader(file, options.max_line_bytes, options.limit), source.name)
            return state.meet(lines, keys)
    total = source.count_lines(COUNT_AT_MOST_BYTES)
    if total is not None and options.limit is not None:
        total = min(total, options.limit)
    return total if total is None or options.shard is None else round(total / options.shard.count)


def _nothing_to_do(options: BatchOptions, keys: LineKeys, deliveries: Sequence[Delivery]) -> str:
    lines = f"lines of {options.input}" + (f" in shard {options.shard}" if options.shard else "")
    if not keys.lines:
        return f"nothing to do: there are no {lines}"
    if not all(delivery.is_done() for delivery in deliveries):
        return f"all {keys.lines:,} {lines} are done; now they are delivered"
    return f"nothing to do: all {keys.lines:,} {lines} are done"


def _report_unfinished(options: BatchOptions, state: RunState, summary: Summary, is_kept: bool) -> None:
    """A run that was stopped: say what is there; the error that stopped it comes next."""
    summary.lines = done = state.totals.lines
    if done and is_kept:
        again = "; the same command carries on" if state.journal is not None else ""
        note(f"stopped: {options.output} has the {done:,} lines that were done, all of them whole{again}")
    if options.summary is not None:
        try:
            summary.save(options.summary)
        except L4Error as error:  # must not hide the error that stopped the run
            note(error.message)


class _Run:
    """The loop: results become lines as they come; `pending` holds only what the backend is working on."""

    def __init__(
        self, options: BatchOptions, work: LineWork, front: Front, state: RunState, summary: Summary,
        stop: GracefulStop, total_lines: int | None, lines: Iterator[tuple[RawLine, bytes]],
    ) -> None:  # fmt: skip
        self.state, self.summary, self.stop, self.max_errors = state, summary, stop, options.max_errors
        self.pending: dict[int, tuple[LineInfo, int]] = {}  # with the number of pictures
        self.name = work.name
        self.writer = work.writer(options, front, summary.fingerprint, state.created_s)
        keyed = (RawLine(raw.number, raw.data, raw.too_long, key) for raw, key in lines)
        self.source = PreparingSource(
            keyed, work.preparer(options, front), self._on_request, self._on_error, self._claim,
            lambda: self.stop.is_requested,
        )  # fmt: skip
        self.total_lines = total_lines

    def run(self, backend: Backend) -> None:
        self.started_s = time.monotonic()
        self.progress = Progress(self.name, self.total_lines, unit="lines", initial=self.state.totals.lines)
        try:
            with self.progress:
                for result in guarded(backend.run(self.source)):
                    self._on_result(result)
                while (request := self.source.take(wait=True)) is not None:  # a backend that ends early
                    self._on_error(self.pending[request.key][0], _lost())
                for info, _ in list(self.pending.values()):  # or loses requests must not lose lines
                    self._on_error(info, _lost())
        finally:
            self.source.close()
            self.summary.seconds = time.monotonic() - self.started_s
            self.summary.engine = engine_stats(backend)

    def _claim(self, info: LineInfo) -> LineError | None:
        if info.id is None or self.state.claim(id_key(info.id), info.number):
            return None
        return LineError(
            "duplicate_id", f"the id {str(info.id)[:100]!r} occurs twice (--duplicates run-each runs both)"
        )

    def _on_request(self, info: LineInfo, request: PreparedRequest) -> None:
        self.pending[request.key] = (info, len(request.images))

    def _on_error(self, info: LineInfo, error: LineError) -> None:
        self.pending.pop(info.number, None)
        known_as = NO_KEY if info.id is None or error.code == "duplicate_id" else id_key(info.id)
        line = dump_line(self.writer.error(info, error.code, error.message))
        self.state.write(info.key, known_as, info.number, line, error.code)
        self._advance()
        if self.max_errors is not None:
            self.max_errors.check(self.summary)

    def _on_result(self, result: GenerationResult) -> None:
        info, images = self.pending.pop(result.key)
        if result.error_code is not None:
            self._on_error(info, LineError(result.error_code, result.error_message or ""))
            return
        completion_tokens = sum(len(choice.token_ids) for choice in result.choices)
        self.state.write(
            info.key, NO_KEY if info.id is None else id_key(info.id), info.number,
            dump_line(self.writer.success(info, result)), "", result.prompt_tokens, completion_tokens, images,
        )  # fmt: skip
        for choice in result.choices:
            self.summary.finish_reasons[choice.finish_reason] += 1
        self._advance()

    def _advance(self) -> None:
        self.progress.advance(1, self._speed)

    def _speed(self) -> str:
        return self.summary.speed_text(time.monotonic() - self.started_s)


def _lost() -> LineError:
    return LineError("internal_error", "the backend ended without an answer")


def image_base(options: BatchOptions) -> Path | None:
    """Where relative paths of pictures begin and what none may leave: beside the input; a pipe has no
    folder, and what lies beside a remote input is not looked at."""
    if options.image_root is not None:
        return options.image_root
    return open_input(options.input).folder


def check_targets(source: Input, targets: Mapping[str, Path | None]) -> None:
    """Every file to be written, by what it is for, has a folder and is neither the input nor another one of them.
    Raises UsageError, WriteError."""
    seen: dict[Path, str] = {}
    for name, target in targets.items():
        if target is None or str(target) == "-":
            continue
        if source.is_file(target):
            raise UsageError(f"{target} is the input", hint="choose another file to write to")
        if not target.resolve().parent.is_dir():
            raise WriteError(f"no such folder: {target.parent}", hint=f"mkdir -p {target.parent}")
        if target.is_dir():
            raise WriteError(f"{target} is a folder", hint="give the name of a file")
        if target.resolve() in seen:
            raise UsageError(f"{name} and {seen[target.resolve()]} are the same file", hint="choose another name")
        seen[target.resolve()] = name
