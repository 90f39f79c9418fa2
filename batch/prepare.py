"""Input line → PreparedRequest, in worker threads, in input order, with bounded memory.

`LinePreparer` does one line; `PreparingSource` is the RequestSource that a backend pulls from.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from batch.chat import ChatFormat
from batch.generation import SamplingDefaults
from batch.grammars import Grammars
from batch.images import TileSpec, load_tiles, read_source
from batch.jsonl import BadJson, RawLine, parse_json
from batch.requests import ImageTiles, PreparedRequest, SamplingParams
from batch.schema import Line, LineError, is_openai, line_id, parse_line
from batch.structured import wanted_form
from batch.url_images import PARALLEL_FETCHES, UrlFetcher
from l4tool.core.arch import Arch
from l4tool.core.sizes import format_bytes

MAX_AHEAD = 64  # lines read but not yet pulled by the backend
GROUP_LINES, SMALL_BYTES = 16, 4096  # small lines without pictures are prepared so many at a time
IMAGE_BUDGET_BYTES = 512 * 2**20
LINE_FETCH_S = 60.0  # for all pictures that one line has on the web
_MAYBE_URL = re.compile(rb'"https?:', re.IGNORECASE)
_CUSTOM_ID = re.compile(rb'"custom_id"\s*:\s*("(?:[^"\\]|\\.)*")')


@dataclass(frozen=True)
class LineInfo:
    """What answering a line needs to know about it. `digest` is 16 hex characters of its content and place, `key` what
    the journal knows it by."""

    number: int
    is_openai: bool
    id: str | int | None
    digest: str
    endpoint: str = "chat"
    model: str | None = None
    key: bytes = b""
    tool_names: frozenset[str] = frozenset()  # that the answer may call
    task: str | None = None  # that the line belongs to, in an evaluation


@dataclass(frozen=True)
class Prepared:
    """A line with either a request or an error."""

    info: LineInfo
    request: PreparedRequest | None = None
    error: LineError | None = None


Gate = Callable[[int], None]


class Preparer(Protocol):
    """What makes requests of lines: LinePreparer, and what builds on it."""

    def prepare(self, raw: RawLine, gate: Gate | None = None) -> Prepared: ...

    def waits_for_the_web(self, raw: RawLine) -> bool: ...

    def close(self) -> None: ...


class LinePreparer:
    """Parses, renders, tokenizes and tiles one line. Thread-safe; never raises for what a line contains."""

    def __init__(
        self, arch: Arch, chat: ChatFormat, tiles: TileSpec | None, defaults: SamplingDefaults, image_base: Path | None,
        max_images: int, fetcher: UrlFetcher | None = None,
    ) -> None:  # fmt: skip
        self.arch, self.chat, self.tiles, self.defaults = arch, chat, tiles, defaults
        self.image_base, self.max_images, self.fetcher = image_base, max_images, fetcher
        self.grammars = Grammars(chat.tokenizer, arch.text.vocab_size)

    def prepare(
        self, raw: RawLine, gate: Gate | None = None, take: Callable[[Any], Any] = lambda value: value
    ) -> Prepared:
        """RawLine → Prepared. `gate` is called with each picture's bytes and may block (back-pressure). `take` gets
        the parsed line and gives back the request in it; it may raise LineError."""
        digest = hashlib.blake2b(raw.data, digest_size=8, key=raw.number.to_bytes(8, "big")).hexdigest()
        info = LineInfo(raw.number, b'"custom_id"' in raw.data, None, digest, key=raw.key)
        try:
            if raw.too_long:
                raise LineError("line_too_long", "the line is longer than the limit")
            try:
                value = parse_json(raw.data)
            except BadJson as error:
                raise LineError("invalid_json", str(error)) from None
            try:
                line = parse_line(take(value))
            except LineError:
                if isinstance(value, dict):
                    info = replace(info, is_openai=is_openai(value), id=line_id(value))
                raise
            tools = frozenset(tool["function"]["name"] for tool in line.tools)
            is_openai_form = line.form == "openai"
            info = LineInfo(raw.number, is_openai_form, line.id, digest, line.endpoint, line.model, raw.key, tools)
            return Prepared(info, self._request(raw, line, gate))
        except LineError as error:
            if info.id is None and info.is_openai:
                info = replace(info, id=_custom_id(raw.data))
            return Prepared(info, error=error)
        except Exception as error:  # our own bug must cost this line, not the run
            return Prepared(info, error=LineError("internal_error", f"{type(error).__name__}: {error}"[:500]))

    def close(self) -> None:
        """End what helps: the process that compiles grammars, and what is being fetched."""
        self.grammars.close()
        if self.fetcher is not None:
            self.fetcher.close()

    def _request(self, raw: RawLine, line: Line, gate: Gate | None) -> PreparedRequest:
        form = wanted_form(line)
        images = self._images(line, gate)
        if line.turns:
            prompt = self.chat.encode(line.turns, images, line.tools)
        elif isinstance(line.prompt, str):
            prompt = self.chat.encode_raw(line.prompt, line.parse_special)
        else:
            prompt = list(line.prompt or ())
        if not line.turns:
            self._check_tokens(prompt)
        context = self.arch.text.max_position_embeddings
        if len(prompt) >= context:
            message = f"the prompt has {len(prompt):,} tokens; the context of {context:,} leaves no room for an answer"
            raise LineError("prompt_too_long", message)
        sampling = self.defaults.params(line, raw.data, context - len(prompt))
        self._check_biases(sampling)
        return PreparedRequest(
            key=raw.number,
            prompt=prompt,
            sampling=sampling,
            images=tuple(images),
            stop=self.defaults.stop if line.stop is None else line.stop,
            n=line.sampling.n,
            grammar=None if form is None else self.grammars.grammar(form, sampling.stop_token_ids),
        )

    def _images(self, line: Line, gate: Gate | None) -> list[ImageTiles]:
        found = line.images
        if len(found) > self.max_images:
            raise LineError("too_many_images", f"{len(found)} images; at most {self.max_images} (--max-images)")
        if not found:
            return []
        if self.tiles is None:
            raise LineError("no_vision", "this checkpoint is text-only: it cannot look at images")
        tiles = []
        fetch = self._fetch_until(time.monotonic() + LINE_FETCH_S)
        for place, image in enumerate(found, 1):
            if gate is not None:
                gate(0)
            try:
                tiles.append(load_tiles(read_source(image.source, self.image_base, fetch), self.tiles))
            except LineError as error:
                raise LineError(error.code, f"image {place}: {error.message}") from None
            if gate is not None:
                gate(tiles[-1].pixels.nbytes)
        return tiles

    def _fetch_until(self, deadline_s: float) -> Callable[[str], bytes] | None:
        fetcher = self.fetcher
        return None if fetcher is None else lambda url: fetcher.fetch(url, deadline_s)

    def waits_for_the_web(self, raw: RawLine) -> bool:
        """Whether the line may hold a picture's URL; a wrong guess costs nothing but a place in the other queue."""
        return self.fetcher is not None and _MAYBE_URL.search(raw.data) is not None

    def _check_biases(self, sampling: SamplingParams) -> None:
        largest, size = max((token for token, _ in sampling.logit_bias), default=0), self.arch.text.vocab_size
        if largest >= size:
            raise LineError(
                "invalid_request", f"logit_bias: token id {largest} is not below the vocabulary size {size}"
            )

    def _check_tokens(self, prompt: list[int]) -> None:
        if not prompt:
            raise LineError("invalid_request", "the prompt is empty")
        largest, size = max(prompt), self.arch.text.vocab_size
        if largest >= size:
            raise LineError("invalid_request", f"token id {largest} is not below the vocabulary size {size}")
        if self.arch.image_token_id is not None and self.arch.image_token_id in prompt:
            raise LineError("invalid_request", "a completion's prompt cannot hold image tokens; use a chat")


def _is_quick(raw: RawLine) -> bool:
    """Whether a line is small and names no picture."""
    return len(raw.data) < SMALL_BYTES and b'"image' not in raw.data


def _custom_id(data: bytes) -> str | None:
    """Best effort for a line that is not JSON: what custom_id it probably has."""
    match = _CUSTOM_ID.search(data[:65536])
    try:
        found = parse_json(match.group(1)) if match else None
    except BadJson:
        return None
    return found if isinstance(found, str) else None


class PreparingSource:
    """A RequestSource over raw lines. Requests come in input order; error lines go to `on_error` as they are met.

    `claim` sees every line once, in input order, and may turn it into an error. Once `is_stopping` says so, nothing
    comes any more.
    At most MAX_AHEAD lines are prepared ahead. Pictures wait while IMAGE_BUDGET_BYTES of tiles are waiting to be
    pulled, except those of the line that is next, so there is always progress.
    """

    def __init__(
        self,
        lines: Iterator[RawLine],
        preparer: Preparer,
        on_request: Callable[[LineInfo, PreparedRequest], None],
        on_error: Callable[[LineInfo, LineError], None],
        claim: Callable[[LineInfo], LineError | None] = lambda info: None,
        is_stopping: Callable[[], bool] = lambda: False,
        num_threads: int = 2,
        image_budget_bytes: int = IMAGE_BUDGET_BYTES,
    ) -> None:
        self._lines, self._preparer = lines, preparer
        self._on_request, self._on_error = on_request, on_error
        self._claim, self._is_stopping = claim, is_stopping
        self._budget_bytes = image_budget_bytes
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="prepare")
        # Quick lines hold the interpreter's lock: a second thread would only get in the way.
        self._quick_pool = ThreadPoolExecutor(1, thread_name_prefix="prepare-quick")
        # Lines that wait for the web have threads of their own: those on this machine are prepared meanwhile.
        self._web_pool = ThreadPoolExecutor(PARALLEL_FETCHES, thread_name_prefix="prepare-web")
        self._queue: deque[Future[list[Prepared]]] = deque()
        self._ready: deque[Prepared] = deque()  # of the group that is being handed out
        self._submitted = 0
        self._next: RawLine | None = None  # read, and not yet submitted
        self._changed = threading.Condition()
        self._head = 0  # place of the line that take() hands out next
        self._held: dict[int, int] = {}  # place → bytes of tiles that wait
        self._is_closed = False

    def start(self) -> None:
        """Read the first lines and let them be prepared; `take` hands them out."""
        self._fill()

    def take(self, wait: bool) -> PreparedRequest | None:
        """The next request; see RequestSource."""
        while not self._is_stopping():
            if not self._ready:
                self._fill()
                if not self._queue or (not wait and not self._queue[0].done()):
                    return None
                self._ready.extend(self._queue.popleft().result())
            prepared = self._ready.popleft()
            with self._changed:
                self._head += 1
                if self._held:  # else nobody waits for room
                    self._held.pop(self._head - 1, None)
                    self._changed.notify_all()
            clash = self._claim(prepared.info)
            if prepared.request is not None and clash is None:
                self._on_request(prepared.info, prepared.request)
                return prepared.request
            error = prepared.error or clash
            assert error is not None
            self._on_error(prepared.info, error)
        return None

    def close(self) -> None:
        """Stop the threads; what was prepared and not pulled is dropped."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._preparer.close()
        for pool in (self._quick_pool, self._pool, self._web_pool):
            pool.shutdown(wait=True, cancel_futures=True)
        self._queue.clear()

    def _fill(self) -> None:
        while self._submitted - self._head < MAX_AHEAD and (group := self._group()):
            self._queue.append(self._pool_for(group[0]).submit(self._prepare, self._submitted, group))
            self._submitted += len(group)

    def _pool_for(self, raw: RawLine) -> ThreadPoolExecutor:
        if _is_quick(raw):
            return self._quick_pool
        return self._web_pool if self._preparer.waits_for_the_web(raw) else self._pool

    def _group(self) -> list[RawLine]:
        """The next line, or several quick ones; none at the end."""
        first = self._next or next(self._lines, None)
        self._next = None
        if first is None:
            return []
        group = [first]
        if not _is_quick(first):
            return group
        for raw in itertools.islice(self._lines, GROUP_LINES - 1):
            if not _is_quick(raw):
                self._next = raw
                break
            group.append(raw)
        return group

    def _prepare(self, place: int, group: list[RawLine]) -> list[Prepared]:
        gate = functools.partial(self._gate, place)  # a group is the next one as a whole, or it would wait for itself
        return [self._preparer.prepare(raw, gate) for raw in group]

    def _gate(self, place: int, num_bytes: int) -> None:
        """Account for a picture's tiles (num_bytes > 0), or wait until there is room for one more (0)."""
        with self._changed:
            if num_bytes:
                self._held[place] = self._held.get(place, 0) + num_bytes
                return
            while not self._is_closed and place != self._head and sum(self._held.values()) >= self._budget_bytes:
                self._changed.wait()
            if self._is_closed:
                raise LineError("cancelled", f"stopped; {format_bytes(sum(self._held.values()))} of pictures dropped")
