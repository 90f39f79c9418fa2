"""The backend of `eval`: one checkpoint, or two side by side, that answer requests and score their references.

Requests are done in groups: the first model answers them, then the other one, then both score the references together,
with the caches that answering has filled. So no more than one group is in memory, or lost when a run is killed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from batch.backends.base import ListSource, RequestSource
from batch.backends.embedded import Detokenizer, EmbeddedBackend, EmbeddedOptions, engine_config, load
from batch.backends.loading import load_whole, require_memory
from batch.backends.memory import available_bytes, used_bytes
from batch.backends.warm_up import warm_up
from batch.engine.engine import MAX_PIXEL_BYTES, EngineConfig
from batch.engine.scorer import LOGITS_BYTES, Scorer, Target
from batch.model.model import Model
from batch.requests import GenerationResult, PreparedRequest, ScoredRequest, ScoredResult
from converters.detect import open_checkpoint

GROUP_TOKENS = 1 << 20  # of one group's prompts and references
SCORING_BYTES = 2 * LOGITS_BYTES  # logits, and what they are compared in


@dataclass(eq=False)
class _Work:
    """One request of a group: what the models said so far, or the error of one of them."""

    request: ScoredRequest
    answers: list[GenerationResult]
    error: tuple[str, str] | None = None


class ScoringBackend:
    """Runs ScoredRequests on the checkpoints in `paths`, or on loaded models; the second is the one compared with, and
    without what costs exactness: `activations` and `kv_dtype` are of the first alone.

    Raises UsageError, DeviceError, CheckpointError, InputMissing.
    """

    def __init__(
        self, paths: Sequence[str | Path | Model], tokenizer: Detokenizer, options: EmbeddedOptions | None = None
    ) -> None:
        options = options or EmbeddedOptions()
        self._stack = ExitStack()  # what must be closed
        with ExitStack() as stack:
            found = _load_all(paths, options, stack)
            self.backends = []
            for model, config in found:
                kept = EmbeddedOptions(
                    prefix_cache=config.prefix_cache, max_batch_tokens=config.max_batch_tokens,
                    kv_memory_bytes=config.kv_bytes, max_seqs=config.max_seqs, block_size=config.block_size,
                )  # fmt: skip
                backend = EmbeddedBackend(model, tokenizer, kept, eos_token_ids=())
                self.backends.append(backend)
                stack.callback(backend.close)
            self.scorer = Scorer([backend.engine for backend in self.backends])
            self._stack = stack.pop_all()

    @property
    def stats(self) -> Any:
        return self.backends[0].stats

    def close(self) -> None:
        """Free the weights and the caches."""
        self._stack.close()

    def run(self, source: RequestSource) -> Iterator[ScoredResult]:
        """One result per request, group by group."""
        while group := self._take(source):
            yield from self._group([_Work(request, []) for request in group])

    def _take(self, source: RequestSource) -> list[ScoredRequest]:
        """The next group: as many as run at a time, fewer where they are large."""
        group: list[ScoredRequest] = []
        tokens = pixels = 0
        while len(group) < self.scorer.max_seqs and tokens < GROUP_TOKENS and pixels < MAX_PIXEL_BYTES:
            request = source.take(wait=True)
            if request is None:
                break
            assert isinstance(request, ScoredRequest)
            group.append(request)
            tokens += len(request.prompt) + len(request.reference)
            pixels += sum(image.pixels.nbytes for image in request.images)
        return group

    def _group(self, group: list[_Work]) -> Iterator[ScoredResult]:
        for place, backend in enumerate(self.backends):
            asked = {n: work for n, work in enumerate(group) if work.request.accepted and work.error is None}
            requests = [_plain(work.request, n) for n, work in asked.items()]
            for result in backend.run(ListSource(requests)):
                if result.error_code is not None:
                    asked[result.key].error = _named(result.error_code, result.error_message or "", place)
                asked[result.key].answers.append(result)
        sound = [work for work in group if work.error is None]
        for work in group:
            if work.error is not None:
                yield _failed(work)
        targets = [
            Target([*w.request.prompt, *w.request.reference], len(w.request.prompt), w.request.images) for w in sound
        ]
        for number, scored in self.scorer.run(targets):
            work = sound[number]
            if scored.error is not None:
                work.error = _named(*scored.error)
                yield _failed(work)
                continue
            choices = [answer.choices[0] for answer in work.answers]
            yield ScoredResult(
                work.request.key, choices[:1], _num_tokens(work), request=work.request,
                other=choices[1] if len(choices) > 1 else None, scores=scored.scores,
            )  # fmt: skip


def _plain(request: ScoredRequest, key: int) -> PreparedRequest:
    """The request as `batch` runs it."""
    fields = {field.name: getattr(request, field.name) for field in dataclasses.fields(PreparedRequest)}
    return PreparedRequest(**fields | {"key": key})


def _named(code: str, message: str, place: int) -> tuple[str, str]:
    return code, message if place == 0 else f"--against: {message}"


def _num_tokens(work: _Work) -> int:
    return len(work.request.prompt) + len(work.request.reference)


def _failed(work: _Work) -> ScoredResult:
    assert work.error is not None
    return ScoredResult(work.request.key, [], _num_tokens(work), *work.error, request=work.request)


def _load_all(
    paths: Sequence[str | Path | Model], options: EmbeddedOptions, stack: ExitStack
) -> list[tuple[Model, EngineConfig]]:
    """The models, each with the same limits for its engine; `stack` closes those that are loaded here."""
    readers = {n: open_checkpoint(path) for n, path in enumerate(paths) if not isinstance(path, Model)}
    if not options.stream_weights and torch.device(options.device).type == "cpu":
        require_memory(list(readers.values()), options.dtype)
    limits = options
    models: list[Model] = []
    left_bytes = _streaming_bytes(options)
    for n, path in enumerate(paths):
        if isinstance(path, Model):
            models.append(path)
            continue
        own = options if n == 0 else replace(options, activations="auto", kv_dtype="auto")
        with warm_up(readers[n], own.device, own.dtype, own.activations):
            if own.stream_weights:
                each = replace(own, memory_bytes=used_bytes() + left_bytes // len(paths))
                model, config = load(readers[n], each)
                limits = _smaller(limits, config)
            else:
                model = load_whole(readers[n], own.device, own.dtype, own.activations, 1, own.kv_dtype)
        stack.callback(model.close)
        models.append(model)
    configs = [engine_config(model, replace(limits, memory_share=len(paths))) for model in models]
    kv_bytes, size = min(config.kv_bytes for config in configs), min(config.block_size for config in configs)
    return [
        (model, replace(config, kv_bytes=kv_bytes, block_size=size))
        for model, config in zip(models, configs, strict=True)
    ]


def _streaming_bytes(options: EmbeddedOptions) -> int:
    """What streamed models may take together, beside what the process has taken and what scoring takes."""
    if options.memory_bytes is None:
        return max(available_bytes() - SCORING_BYTES, 0)
    return max(min(available_bytes(), options.memory_bytes - used_bytes()) - SCORING_BYTES, 0)


def _smaller(limits: EmbeddedOptions, config: EngineConfig) -> EmbeddedOptions:
    """`limits` that a streamed model keeps, too."""

    def least(asked: int | None, has: int) -> int:
        return has if asked is None else min(asked, has)

    return replace(
        limits, max_batch_tokens=least(limits.max_batch_tokens, config.max_batch_tokens),
        max_seqs=least(limits.max_seqs, config.max_seqs),
        kv_memory_bytes=least(limits.kv_memory_bytes, config.kv_bytes),
    )  # fmt: skip
