"""One batch run: lines in, lines out. Everything is checked before the model loads; nothing grows with the file."""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from batch.backends.base import Backend
from batch.chat import ChatFormat, find_template
from batch.generation import SamplingDefaults, SamplingOptions
from batch.images import TileSpec
from batch.jsonl import MAX_LINE_BYTES, LineReader, RawLine, count_lines, dump_line
from batch.output import OutputFile
from batch.prepare import LineInfo, LinePreparer, PreparingSource
from batch.requests import GenerationResult, PreparedRequest
from batch.responses import ResponseWriter
from batch.schema import LineError
from batch.summary import Summary, engine_stats, license_duty, model_fingerprint
from batch.tokenizer import Tokenizer, read_json_object
from converters.detect import open_checkpoint
from converters.origin import read_origin
from l4tool.core.arch import Arch
from l4tool.core.console import Progress, note
from l4tool.core.errors import CheckpointError, InputMissing, L4Error, UsageError, WriteError

DEFAULT_MAX_IMAGES = 48
COUNT_AT_MOST_BYTES = 2**30  # larger inputs: the number of lines is estimated from the first GiB


@dataclass(frozen=True)
class BatchOptions:
    """The command's options. `limit` counts input lines; memory and batch sizes are passed on to the backend."""

    input: Path
    output: Path
    model: Path
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    limit: int | None = None
    max_images: int = DEFAULT_MAX_IMAGES
    max_line_bytes: int = MAX_LINE_BYTES
    force: bool = False
    summary: Path | None = None
    device: str = "auto"
    dtype: str = "auto"
    max_batch_tokens: int | None = None
    kv_memory_bytes: int | None = None
    max_seqs: int | None = None


@dataclass(frozen=True)
class Front:
    """A checkpoint's front: everything but its weights."""

    arch: Arch
    tokenizer: Tokenizer
    chat: ChatFormat
    tiles: TileSpec | None
    defaults: SamplingDefaults


MakeBackend = Callable[[BatchOptions, Front], Backend]


def embedded_backend(options: BatchOptions, front: Front) -> Backend:
    """The built-in engine. Which tokens end a completion is in every request, so it gets none of its own."""
    import torch

    from batch.backends.embedded import EmbeddedBackend, EmbeddedOptions

    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    embedded = EmbeddedOptions(
        device=device,
        dtype=None if options.dtype == "auto" else options.dtype,
        max_batch_tokens=options.max_batch_tokens,
        kv_memory_bytes=options.kv_memory_bytes,
        max_seqs=options.max_seqs,
    )
    return EmbeddedBackend(options.model, front.tokenizer, embedded, eos_token_ids=())


def load_front(options: BatchOptions) -> Front:
    """Read what the front needs; opening the checkpoint checks every weight file's header. Raises CheckpointError."""
    if not options.model.is_dir():
        raise InputMissing(f"no such checkpoint folder: {options.model}", hint="--model takes a folder")
    reader = open_checkpoint(options.model)
    try:
        arch = reader.arch
    finally:
        reader.close()
    tokenizer = Tokenizer.load(options.model)
    if tokenizer.vocab_size > arch.text.vocab_size:
        raise CheckpointError(
            f"{options.model}: the tokenizer has {tokenizer.vocab_size} tokens, the model only {arch.text.vocab_size}"
        )
    tiles = None
    if arch.vision is not None:
        if arch.image_token_id != tokenizer.control_id("<|patch|>"):
            raise CheckpointError(f"{options.model}: config.json's image token is not the tokenizer's <|patch|>")
        tiles = TileSpec.from_config(_image_config(options.model), arch.vision)
    chat = ChatFormat(tokenizer, find_template(options.model), arch.vision.tokens_per_tile if arch.vision else None)
    generation = read_json_object(options.model / "generation_config.json")
    defaults = SamplingDefaults.build(options.sampling, generation, arch.text.eos_token_ids)
    return Front(arch, tokenizer, chat, tiles, defaults)


def _image_config(folder: Path) -> dict[str, Any]:
    """preprocessor_config.json, or where transformers 5 keeps it: inside processor_config.json."""
    found = read_json_object(folder / "preprocessor_config.json")
    nested = read_json_object(folder / "processor_config.json").get("image_processor")
    return found or (nested if isinstance(nested, dict) else {})


def run_batch(options: BatchOptions, make_backend: MakeBackend = embedded_backend) -> Summary:
    """Answer every line of the input. Raises L4Error; what was written until then is whole lines."""
    with contextlib.ExitStack() as stack:
        source_file = stack.enter_context(_open_input(options))
        front = load_front(options)
        fingerprint = model_fingerprint(options.model)
        output = OutputFile(options.output, options.force)
        stack.push(lambda kind, error, trace: output.close(discard_if_empty=error is not None))
        reader = LineReader(source_file, options.max_line_bytes, options.limit)
        duty = license_duty(read_origin(options.model, read_json_object(options.model / "config.json")))
        summary = Summary(str(options.input), str(options.output), str(options.model), fingerprint, duty)
        try:
            _answer(options, front, reader, output, summary, make_backend)
        except BaseException:
            _report_unfinished(options, summary)
            raise
    if options.summary is not None:
        summary.save(options.summary)
    return summary


def _answer(
    options: BatchOptions, front: Front, reader: LineReader, output: OutputFile, summary: Summary,
    make_backend: MakeBackend,
) -> None:  # fmt: skip
    """Load the model and run, unless there is nothing to do."""
    lines = iter(reader)
    first = next(lines, None)
    if first is None:
        output.start()
        note(f"nothing to do: {options.input} has no lines")
    else:
        started_s = time.monotonic()
        with contextlib.closing(make_backend(options, front)) as backend:
            summary.load_seconds = time.monotonic() - started_s
            output.start()
            _Run(options, front, output, summary).run(backend, itertools.chain([first], lines))
    summary.lines, summary.blank_lines = reader.lines, reader.blank_lines
    output.sync()
    summary.is_complete = True


def _report_unfinished(options: BatchOptions, summary: Summary) -> None:
    """A run that was stopped: say what is there; the error that stopped it comes next."""
    done = summary.ok + summary.num_errors
    summary.lines = done
    if done:
        note(f"stopped: {options.output} has the {done:,} lines that were done, all of them whole")
    if options.summary is not None:
        try:
            summary.save(options.summary)
        except L4Error as error:  # must not hide the error that stopped the run
            note(error.message)


class _Run:
    """The loop: results become lines as they come; `pending` holds only what the backend is working on."""

    def __init__(self, options: BatchOptions, front: Front, output: OutputFile, summary: Summary) -> None:
        self.output, self.summary = output, summary
        self.pending: dict[int, LineInfo] = {}
        self.responses = ResponseWriter(
            front.tokenizer, options.model.resolve().name, "l4_" + summary.fingerprint, int(time.time())
        )
        beside = options.input.absolute().parent if options.input.is_file() else Path.cwd()  # a pipe has no folder
        self.preparer = LinePreparer(front.arch, front.chat, front.tiles, front.defaults, beside, options.max_images)
        self.started_s = time.monotonic()
        self.progress = Progress("batch", _total_lines(options), unit="lines")

    def run(self, backend: Backend, lines: Iterator[RawLine]) -> None:
        source = PreparingSource(lines, self.preparer, self._on_request, self._on_error)
        try:
            with self.progress:
                for result in backend.run(source):
                    self._on_result(result)
                while (request := source.take(wait=True)) is not None:  # a backend that ends early
                    self._on_error(self.pending[request.key], _lost())
                for info in list(self.pending.values()):  # or loses requests must not lose lines
                    self._on_error(info, _lost())
        finally:
            source.close()
            self.summary.seconds = time.monotonic() - self.started_s
            self.summary.engine = engine_stats(backend)

    def _on_request(self, info: LineInfo, request: PreparedRequest) -> None:
        self.pending[request.key] = info
        self.summary.images += len(request.images)

    def _on_error(self, info: LineInfo, error: LineError) -> None:
        self.pending.pop(info.number, None)
        self.output.write(dump_line(self.responses.error(info, error.code, error.message)))
        self.summary.errors[error.code] += 1
        self._advance()

    def _on_result(self, result: GenerationResult) -> None:
        info = self.pending.pop(result.key)
        if result.error_code is not None:
            self._on_error(info, LineError(result.error_code, result.error_message or ""))
            return
        self.output.write(dump_line(self.responses.success(info, result)))
        self.summary.ok += 1
        self.summary.prompt_tokens += result.prompt_tokens
        self.summary.completion_tokens += sum(len(choice.token_ids) for choice in result.choices)
        for choice in result.choices:
            self.summary.finish_reasons[choice.finish_reason] += 1
        self._advance()

    def _advance(self) -> None:
        self.progress.advance(1, self.summary.speed_text(time.monotonic() - self.started_s))


def _lost() -> LineError:
    return LineError("internal_error", "the backend ended without an answer")


def _open_input(options: BatchOptions) -> BinaryIO:
    """The input, open for reading, after the checks that need no more than paths. Raises L4Error."""
    path = options.input
    try:
        file = open(path, "rb")
    except OSError as error:
        raise InputMissing(f"cannot read {path}: {error.strerror}") from None
    written = [options.output, *([options.summary] if options.summary else [])]
    try:
        for target in written:
            if target.exists() and os.path.samestat(os.fstat(file.fileno()), target.stat()):
                raise UsageError(f"{target} is the input", hint="choose another file to write to")
            if not target.resolve().parent.is_dir():
                raise WriteError(f"no such folder: {target.parent}", hint=f"mkdir -p {target.parent}")
            if target.is_dir():
                raise WriteError(f"{target} is a folder", hint="give the name of a file")
        if options.summary and options.summary.resolve() == options.output.resolve():
            raise UsageError("--summary and the output are the same file", hint="choose another name for the summary")
    except BaseException:
        file.close()
        raise
    return file


def _total_lines(options: BatchOptions) -> int | None:
    """How many lines there are to do, for the ETA; None for a pipe."""
    if not options.input.is_file():
        return options.limit
    total = count_lines(options.input, COUNT_AT_MOST_BYTES)
    return total if options.limit is None or total is None else min(total, options.limit)
