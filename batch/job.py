"""One batch run: lines in, lines out. Everything is checked before the model loads; nothing grows with the file."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from batch.backends.base import Backend
from batch.chat import ChatFormat, find_template
from batch.generation import SamplingDefaults, SamplingOptions
from batch.images import TileSpec
from batch.jsonl import MAX_LINE_BYTES
from batch.line_keys import Shard
from batch.prepare import LinePreparer
from batch.responses import ResponseWriter
from batch.run import LineWork, image_base, run_lines
from batch.spool import Delivery
from batch.state import StateOptions
from batch.summary import MaxErrors, Summary
from batch.tokenizer import Tokenizer, read_json_object
from batch.url_images import DEFAULT_MAX_BYTES, UrlFetcher, UrlLimits
from batch.web_addresses import HostRule, UrlPolicy
from converters.arch_io import read_arch
from l4tool.core.arch import Arch
from l4tool.core.errors import CheckpointError, InputMissing, UsageError

DEFAULT_MAX_IMAGES = 48


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
    kv_dtype: str = "auto"
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
    engine = engine_options(options)
    if options.workers > 1:
        from batch.backends.workers import embedded_workers

        return embedded_workers(options.model, engine, options.workers)
    from batch.backends.embedded import EmbeddedBackend, EmbeddedOptions

    # Alone in a step that reads all weights, a first line would cost as much as thousands.
    with_defaults = EmbeddedOptions(**engine, first_alone=options.weights != "stream")
    return EmbeddedBackend(options.model, front.tokenizer, with_defaults, eos_token_ids=())


def engine_options(options: BatchOptions) -> dict[str, Any]:
    """What the built-in engine is given: fields of EmbeddedOptions. Raises UsageError."""
    require_consistent(options)
    return {
        "device": _device(options),
        "dtype": None if options.dtype == "auto" else options.dtype,
        "activations": options.activations,
        "kv_dtype": options.kv_dtype,
        "max_batch_tokens": options.max_batch_tokens,
        "kv_memory_bytes": options.kv_memory_bytes,
        "max_seqs": options.max_seqs,
        "prefix_cache": options.prefix_cache,
        "stream_weights": options.weights == "stream",
        "memory_bytes": options.memory_bytes,
    }


def require_consistent(options: BatchOptions) -> None:
    """Raises UsageError for what no machine can do."""
    streams, has_fp8 = options.weights == "stream", options.kv_dtype == "fp8"
    if options.memory_bytes is not None and not streams:
        raise UsageError("--memory goes with --weights stream", hint="leave it away, or add --weights stream")
    if streams and options.workers > 1:
        raise UsageError(
            "--weights stream and --workers exclude each other: each worker would read all weights from the disk",
            hint="leave --workers away; one process uses all cores",
        )
    on_cpu = {"--weights stream": streams, "--activations int8": options.activations == "int8"}
    on_cuda = {"--kv-dtype fp8": has_fp8, "--device cuda": options.device == "cuda"}
    for ours in (name for name, asked in on_cpu.items() if asked):
        for theirs in (name for name, asked in on_cuda.items() if asked):
            why = "runs on the CPU only" + (
                ", --kv-dtype fp8 on a CUDA device only" if theirs.startswith("--kv") else ""
            )
            raise UsageError(f"{ours} {why}", hint=f"leave out {theirs}, or {ours}")
    if has_fp8 and options.device == "cpu":
        raise UsageError("--kv-dtype fp8 needs a CUDA device", hint="leave out --device cpu, or --kv-dtype")


def _device(options: BatchOptions) -> str:
    """What "auto" means on this machine, for what is asked."""
    if options.device != "auto":
        return options.device
    if options.weights == "stream" or options.activations == "int8":
        return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def load_front(options: BatchOptions) -> Front:
    """Read config, tokenizer and template; the weights are checked by the backend. Raises CheckpointError."""
    if not options.model.is_dir():
        raise InputMissing(f"no such checkpoint folder: {options.model}", hint="give the folder of a checkpoint")
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
    require_consistent(options)  # wrong options before anything is read
    _url_fetcher(options)
    work = LineWork("batch", load, make_backend, job_facts, make_preparer, _response_writer)
    return run_lines(options, work, deliveries)


def _response_writer(options: BatchOptions, front: Front, fingerprint: str, created_s: int) -> ResponseWriter:
    return ResponseWriter(front.tokenizer, _model_name(options.model), "l4_" + fingerprint, created_s)


def make_preparer(options: BatchOptions, front: Front) -> LinePreparer:
    """What turns lines into requests."""
    base, fetcher = image_base(options), _url_fetcher(options)
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
        **({} if options.kv_dtype == "auto" else {"kv_dtype": options.kv_dtype}),
        "max_images": options.max_images,
        "error_file": None if options.errors is None else options.errors.name,
        "duplicates": "run-each" if options.state.run_each else "error",
        "shard": None if options.shard is None else str(options.shard),
    }


def _url_fetcher(options: BatchOptions) -> UrlFetcher | None:
    """None: no picture comes from the web. Raises UsageError."""
    rules = tuple(HostRule.parse(text) for text in options.allow_hosts)
    if not options.allow_url_images:
        if rules:
            raise UsageError("--allow-host without --allow-url-images", hint="add --allow-url-images")
        return None
    return UrlFetcher(UrlPolicy(rules), UrlLimits(max_bytes=options.max_image_bytes))


def _model_name(folder: Path) -> str:
    """The folder's name; in the shared cache, where that is a commit, the repository's."""
    path = folder.resolve()
    return path.parent.parent.name.rpartition("--")[2] if path.parent.name == "snapshots" else path.name
