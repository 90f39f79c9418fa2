"""One batch run: lines in, lines out. Everything is checked before the model loads; nothing grows with the file."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from batch.backends.base import Backend
from batch.chat import ChatFormat, find_template
from batch.failures import device_errors, guarded
from batch.generation import SamplingDefaults, SamplingOptions
from batch.images import TileSpec
from batch.inputs import Input, Lines, open_input
from batch.journal import NO_KEY
from batch.jsonl import MAX_LINE_BYTES, LineReader, RawLine, dump_line
from batch.line_keys import LineKeys, Shard, id_key
from batch.prepare import LineInfo, LinePreparer, PreparingSource
from batch.requests import GenerationResult, PreparedRequest
from batch.responses import ResponseWriter
from batch.schema import LineError
from batch.spool import Delivery
from batch.state import RunState, StateOptions
from batch.summary import MaxErrors, Summary, engine_stats, license_duty, model_fingerprint
from batch.tokenizer import Tokenizer, read_json_object
from batch.url_images import DEFAULT_MAX_BYTES, UrlFetcher, UrlLimits
from batch.web_addresses import HostRule, UrlPolicy
from converters.arch_io import read_arch
from converters.origin import read_origin
from l4tool.core.arch import Arch
from l4tool.core.console import Progress, note
from l4tool.core.errors import CheckpointError, InputMissing, L4Error, UsageError, WriteError
from l4tool.core.signals import GracefulStop

DEFAULT_MAX_IMAGES = 48
COUNT_AT_MOST_BYTES = 2**30  # larger inputs: the number of lines is estimated from the first GiB


@dataclass(frozen=True)
class BatchOptions:
    """The command's options. `limit` counts input lines; memory and batch sizes are passed on to the backend. Error
    lines go to `errors` where it is given. `in_order`: the finished output stands in input order. After a signal what
    runs may take `grace_s` to finish. `-` is standard input or output; the input may be a URL. With `shard` only
    its lines are answered. Pictures lie below `image_root` (None: beside the
    input); with `allow_url_images` they may come from the web, at most `max_image_bytes` each."""

    input: Path | str
    output: Path
    model: Path
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    limit: int | None = None
    shard: Shard | None = None
    max_images: int = DEFAULT_MAX_IMAGES
    image_root: Path | None = None
    allow_url_images: bool = False
    allow_hosts: tuple[str, ...] = ()
    max_image_bytes: int = DEFAULT_MAX_BYTES
    max_line_bytes: int = MAX_LINE_BYTES
    summary: Path | None = None
    errors: Path | None = None
    in_order: bool = False
    max_errors: MaxErrors | None = None
    grace_s: float = 30.0
    state: StateOptions = field(default_factory=StateOptions)
    device: str = "auto"
    dtype: str = "auto"
    activations: str = "auto"
    max_batch_tokens: int | None = None
    kv_memory_bytes: int | None = None
    max_seqs: int | None = None
    prefix_cache: bool = True
    weights: str = "memory"
    memory_bytes: int | None = None
    workers: int = 1


@dataclass(frozen=True)
class Front:
    """A checkpoint's front: everything but its weights."""

    arch: Arch
    tokenizer: Tokenizer
    chat: ChatFormat
    tiles: TileSpec | None
    defaults: SamplingDefaults


MakeBackend = Callable[[BatchOptions, Front], Backend]
LoadFront = Callable[[BatchOptions], Front]


def embedded_backend(options: BatchOptions, front: Front) -> Backend:
    """The built-in engine, in this process or in several. Which tokens end a completion is in every request, so it
    gets none of its own."""
    engine: dict[str, Any] = {
        "device": _device(options.device),
        "dtype": None if options.dtype == "auto" else options.dtype,
        "activations": options.activations,
        "max_batch_tokens": options.max_batch_tokens,
        "kv_memory_bytes": options.kv_memory_bytes,
        "max_seqs": options.max_seqs,
        "prefix_cache": options.prefix_cache,
        "stream_weights": options.weights == "stream",
        "memory_bytes": options.memory_bytes,
    }
    if options.memory_bytes is not None and options.weights != "stream":
        raise UsageError("--memory goes with --weights stream", hint="leave it away, or add --weights stream")
    if options.workers > 1:
        if options.weights == "stream":
            raise UsageError(
                "--weights stream and --workers exclude each other: each worker would read all weights from the disk",
                hint="leave --workers away; one process uses all cores",
            )
        from batch.backends.workers import embedded_workers

        return embedded_workers(options.model, engine, options.workers)
    from batch.backends.embedded import EmbeddedBackend, EmbeddedOptions

    # Alone in a step that reads all weights, a first line would cost as much as thousands.
    with_defaults = EmbeddedOptions(**engine, first_alone=options.weights != "stream")
    return EmbeddedBackend(options.model, front.tokenizer, with_defaults, eos_token_ids=())


def _device(name: str) -> str:
    """What "auto" means on this machine."""
    if name != "auto":
        return name
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def load_front(options: BatchOptions) -> Front:
    """Read config, tokenizer and template; the weights are checked by the backend. Raises CheckpointError."""
    if not options.model.is_dir():
        raise InputMissing(f"no such checkpoint folder: {options.model}", hint="--model takes a folder")
    arch, _ = read_arch(options.model)
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


def run_batch(
    options: BatchOptions, make_backend: MakeBackend = embedded_backend, *, load: LoadFront = load_front,
    deliveries: Sequence[Delivery] = (),
) -> Summary:  # fmt: skip
    """Answer every line of the input that has no answer yet, and deliver the files that the complete output goes to.
    Raises L4Error; what was written until then is whole lines, and the same call carries on."""
    with contextlib.ExitStack() as stack:
        source = open_input(options.input)
        file = stack.enter_context(source.open())
        _check_targets(options, source)
        lines = Lines(LineReader(file, options.max_line_bytes, options.limit), source.name)
        _url_fetcher(options)  # wrong options before anything is read
        front = load(options)
        fingerprint = model_fingerprint(options.model)
        state = RunState(options.output, options.errors, job_facts(options, front, fingerprint), options.state)
        stack.callback(state.close)
        stop = stack.enter_context(GracefulStop(options.grace_s))
        duty = license_duty(read_origin(options.model, read_json_object(options.model / "config.json")))
        summary = Summary(str(options.input), str(options.output), str(options.model), fingerprint, duty, state.totals)
        try:
            _answer(options, front, source, lines, state, summary, stop, make_backend, deliveries)
        except BaseException:
            _report_unfinished(options, state, summary)
            raise
    if options.summary is not None:
        summary.save(options.summary)
    return summary


def make_preparer(options: BatchOptions, front: Front) -> LinePreparer:
    """What turns lines into requests."""
    base, fetcher = _image_base(options), _url_fetcher(options)
    return LinePreparer(front.arch, front.chat, front.tiles, front.defaults, base, options.max_images, fetcher)


def job_facts(options: BatchOptions, front: Front, fingerprint: str) -> dict[str, Any]:
    """What must stay the same between two runs that make one output."""
    defaults = dataclasses.asdict(front.defaults)
    return {
        "model": fingerprint,
        **{name: sorted(value) if isinstance(value, frozenset) else value for name, value in defaults.items()},
        "stop": list(front.defaults.stop),
        "dtype": options.dtype,
        **({} if options.activations == "auto" else {"activations": options.activations}),
        "max_images": options.max_images,
        "error_file": None if options.errors is None else options.errors.name,
        "duplicates": "run-each" if options.state.run_each else "error",
        "shard": None if options.shard is None else str(options.shard),
    }


def _answer(
    options: BatchOptions, front: Front, source: Input, lines: Lines, state: RunState, summary: Summary,
    stop: GracefulStop, make_backend: MakeBackend, deliveries: Sequence[Delivery],
) -> None:  # fmt: skip
    """Load the model and run, unless there is nothing to do."""
    keys = LineKeys(_image_base(options), options.shard)
    total = _look_ahead(options, source, state, keys)
    wanted = state.wanted(lines, keys)
    first = next(wanted, None)
    if first is None:
        lines.raise_if_broken()
        note(_nothing_to_do(options, keys, deliveries))
    else:
        if state.has_results:
            note(f"carrying on: {state.totals.lines:,} lines of {options.output} are done")
        run = _Run(options, front, state, summary, stop, total, itertools.chain([first], wanted))
        with contextlib.closing(run.source):
            if not source.is_stream:
                run.source.start()  # the first lines are prepared while the model loads
            started_s = time.monotonic()
            with device_errors():
                made = make_backend(options, front)
            with contextlib.closing(made) as backend:
                summary.load_seconds = time.monotonic() - started_s
                state.start()
                run.run(backend)
        stop.raise_if_requested()
        lines.raise_if_broken()
    summary.lines, summary.blank_lines = keys.lines, lines.reader.blank_lines
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


def _report_unfinished(options: BatchOptions, state: RunState, summary: Summary) -> None:
    """A run that was stopped: say what is there; the error that stopped it comes next."""
    summary.lines = done = state.totals.lines
    if done:
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
        self, options: BatchOptions, front: Front, state: RunState, summary: Summary, stop: GracefulStop,
        total_lines: int | None, lines: Iterator[tuple[RawLine, bytes]],
    ) -> None:  # fmt: skip
        self.state, self.summary, self.stop, self.max_errors = state, summary, stop, options.max_errors
        self.pending: dict[int, tuple[LineInfo, int]] = {}  # with the number of pictures
        self.responses = ResponseWriter(
            front.tokenizer, _model_name(options.model), "l4_" + summary.fingerprint, state.created_s
        )
        keyed = (RawLine(raw.number, raw.data, raw.too_long, key) for raw, key in lines)
        self.source = PreparingSource(
            keyed, make_preparer(options, front), self._on_request, self._on_error, self._claim,
            lambda: self.stop.is_requested,
        )  # fmt: skip
        self.total_lines = total_lines

    def run(self, backend: Backend) -> None:
        self.started_s = time.monotonic()
        self.progress = Progress("batch", self.total_lines, unit="lines", initial=self.state.totals.lines)
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
        line = dump_line(self.responses.error(info, error.code, error.message))
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
            dump_line(self.responses.success(info, result)), "", result.prompt_tokens, completion_tokens, images,
        )  # fmt: skip
        for choice in result.choices:
            self.summary.finish_reasons[choice.finish_reason] += 1
        self._advance()

    def _advance(self) -> None:
        self.progress.advance(1, self._speed)

    def _speed(self) -> str:
        return self.summary.speed_text(time.monotonic() - self.started_s)


def _model_name(folder: Path) -> str:
    """The folder's name; in the shared cache, where that is a commit, the repository's."""
    path = folder.resolve()
    return path.parent.parent.name.rpartition("--")[2] if path.parent.name == "snapshots" else path.name


def _lost() -> LineError:
    return LineError("internal_error", "the backend ended without an answer")


def _url_fetcher(options: BatchOptions) -> UrlFetcher | None:
    """None: no picture comes from the web. Raises UsageError."""
    rules = tuple(HostRule.parse(text) for text in options.allow_hosts)
    if not options.allow_url_images:
        if rules:
            raise UsageError("--allow-host without --allow-url-images", hint="add --allow-url-images")
        return None
    return UrlFetcher(UrlPolicy(rules), UrlLimits(max_bytes=options.max_image_bytes))


def _image_base(options: BatchOptions) -> Path | None:
    """Where relative paths of pictures begin and what none may leave: beside the input; a pipe has no
    folder, and what lies beside a remote input is not looked at."""
    if options.image_root is not None:
        return options.image_root
    return open_input(options.input).folder


def _check_targets(options: BatchOptions, source: Input) -> None:
    """Every file to be written has a folder and is neither the input nor another one of them."""
    targets = {"the output": options.output, "--errors": options.errors, "--summary": options.summary}
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
