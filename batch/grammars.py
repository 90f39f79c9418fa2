"""Forms of answers → grammars by xgrammar, which say token by token what may come next.

Compiling happens in a process of its own, with limits of time and memory; each form once, however many lines ask for
it. xgrammar is an extra (`pip install l4tool[json]`), imported when the first line asks for a form.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import struct
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from concurrent.futures import Future
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from batch.grammar_child import read_frame, tokenizer_info, write_frame
from batch.requests import TokenMask
from batch.schema import LineError
from batch.structured import Form
from batch.tokenizer import Tokenizer

COMPILE_TIMEOUT_S = 30.0
START_TIMEOUT_S = 120.0  # importing xgrammar, from a cold disk
CACHE_BYTES = 256 * 2**20  # compiled grammars kept for the next line that asks
CACHE_FORMS = 10_000
FREE_MASK_S = 0.05  # a mask takes well under a millisecond; what goes beyond this counts against the next
SLOW_MASKS_S = 10.0

_BOOT = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from batch.grammar_child import main; main()"


class Grammars:
    """Compiles forms for one tokenizer and a model's size of vocabulary. Thread-safe."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self.tokenizer, self.vocab_size = tokenizer, vocab_size
        self._compiler = _Compiler(tokenizer, vocab_size)
        self._lock = threading.Lock()
        self._known: OrderedDict[Form, Future[_Compiled]] = OrderedDict()
        self._infos: dict[bool, Any] = {}  # xgrammar's view of the vocabulary, for JSON and for other text

    def grammar(self, form: Form, stop_ids: frozenset[int]) -> XGrammar:
        """The grammar of a form; `stop_ids` may come when it is complete, and only then. Raises LineError."""
        if importlib.util.find_spec("xgrammar") is None:
            raise LineError("unsupported_field", f"{form.field} needs the package xgrammar: pip install 'l4tool[json]'")
        stop_ids = frozenset(token for token in stop_ids if token < self.vocab_size)
        if not stop_ids:
            raise LineError("invalid_request", f"{form.field} needs a token that ends the answer; drop ignore_eos")
        with self._lock:
            future = self._known.get(form)
            is_new = future is None
            if future is None:
                future = self._known[form] = Future()
            self._known.move_to_end(form)
        if is_new:
            self._compile(form, future)
        try:
            return XGrammar(self, form, stop_ids, future.result())
        except LineError as error:
            raise LineError(error.code, f"{form.field}: {error.message}") from None

    def close(self) -> None:
        """End the process; no new form is compiled any more."""
        self._compiler.close()

    def _compile(self, form: Form, future: Future[_Compiled]) -> None:
        try:
            data = self._compiler.compile(form)
            import xgrammar

            with self._lock:
                if form.is_json not in self._infos:
                    tokens = self.tokenizer.text_tokens(self.vocab_size)
                    self._infos[form.is_json] = tokenizer_info(tokens, form.is_json)
            compiled = xgrammar.CompiledGrammar.deserialize_json(data.decode(), self._infos[form.is_json])
            future.set_result(_Compiled(compiled, compiled.memory_size_bytes))
        except BaseException as error:  # whoever waits for it must not wait for ever
            future.set_exception(error)
        self._forget_old()

    def _forget_old(self) -> None:
        with self._lock:
            done = [(form, f) for form, f in self._known.items() if f.done()]
            size = sum(f.result().num_bytes for _, f in done if f.exception() is None)
            while done and (size > CACHE_BYTES or len(self._known) > CACHE_FORMS) and len(self._known) > 1:
                form, future = done.pop(0)
                del self._known[form]
                size -= future.result().num_bytes if future.exception() is None else 0


class _Compiled:
    def __init__(self, grammar: Any, num_bytes: int) -> None:
        self.grammar, self.num_bytes = grammar, num_bytes


class XGrammar:
    """A `Grammar` (batch/requests.py). It travels to another process by its form, and is compiled there anew."""

    def __init__(
        self, grammars: Grammars, form: Form, stop_ids: frozenset[int], compiled: _Compiled | None = None
    ) -> None:
        self._grammars, self._form, self._stop_ids, self._compiled = grammars, form, stop_ids, compiled

    def start(self) -> TokenMask:
        """The mask of a new answer. Raises LineError, in another process only."""
        if self._compiled is None:
            self._compiled = self._grammars.grammar(self._form, self._stop_ids)._compiled
        assert self._compiled is not None
        return _XGrammarMask(self._compiled.grammar, self._stop_ids)

    def __reduce__(self) -> tuple[Any, ...]:
        return _revive, (self._grammars.tokenizer.folder, self._grammars.vocab_size, self._form, self._stop_ids)


def _revive(folder: Path, vocab_size: int, form: Form, stop_ids: frozenset[int]) -> XGrammar:
    return XGrammar(_grammars_of(folder, vocab_size), form, stop_ids)


@lru_cache(maxsize=2)
def _grammars_of(folder: Path, vocab_size: int) -> Grammars:
    return Grammars(Tokenizer.load(folder), vocab_size)


class _XGrammarMask:
    """A `TokenMask` by xgrammar's matcher. One whose masks take too long ends its answer, not the batch."""

    def __init__(self, compiled: Any, stop_ids: frozenset[int]) -> None:
        import xgrammar

        self._matcher = xgrammar.GrammarMatcher(compiled, override_stop_tokens=sorted(stop_ids))
        self._slow_s = 0.0
        self._is_broken = False

    @property
    def is_done(self) -> bool:
        return bool(self._matcher.is_terminated())

    def fill(self, row: np.ndarray) -> None:
        began = time.monotonic()
        try:
            self._matcher.fill_next_token_bitmask(row[None, :], 0)
        except RuntimeError:
            self._is_broken = True
            row.fill(-1)
        self._slow_s += max(time.monotonic() - began - FREE_MASK_S, 0)

    def accept(self, token: int) -> bool:
        if self._is_broken or self._slow_s > SLOW_MASKS_S:
            return False
        return bool(self._matcher.accept_token(token))


class _Compiler:
    """Starts the process, talks to it, ends it when it takes too long. One form at a time."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._is_closed = False

    def compile(self, form: Form) -> bytes:
        """The serialized grammar. Raises LineError."""
        with self._lock:
            if self._child is None or self._child.poll() is not None:
                self._start()
            request = {"kind": form.kind, "source": form.source, "strict": form.strict, "is_json": form.is_json}
            answer = self._ask(json.dumps(request).encode(), COMPILE_TIMEOUT_S)
        if answer[:1] == b"+":
            return answer[1:]
        reason = " ".join(answer[1:].decode("utf-8", "replace").split())
        raise LineError("invalid_grammar", f"it cannot be compiled: {_without_source(reason)[:300]}")

    def close(self) -> None:
        """End the process, also in the middle of its work."""
        self._is_closed = True
        child = self._child
        if child is not None:
            child.kill()
        with self._lock:
            self._end()

    def _start(self) -> None:
        if self._is_closed:
            raise LineError("cancelled", "stopped")
        vocabulary = self._tokenizer.text_tokens(self._vocab_size)
        path = json.dumps([entry for entry in sys.path if entry])
        self._child = subprocess.Popen(
            [sys.executable, "-I", "-c", _BOOT, path],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        assert self._child.stdin is not None
        lengths = b"".join(struct.pack("<I", len(token)) for token in vocabulary)
        write_frame(self._child.stdin, lengths)
        write_frame(self._child.stdin, b"".join(vocabulary))
        first = json.dumps({"kind": "regex", "source": "a", "strict": True, "is_json": False}).encode()
        answer = self._ask(first, START_TIMEOUT_S)  # so that the first form's time limit is its own
        if answer[:1] != b"+":
            self._end()
            raise LineError("internal_error", f"xgrammar does not start: {answer[1:300].decode('utf-8', 'replace')}")

    def _ask(self, frame: bytes, timeout_s: float) -> bytes:
        """One question, one answer; a child that takes longer or dies is ended. Raises LineError."""
        assert self._child is not None and self._child.stdin is not None and self._child.stdout is not None
        child = self._child
        timer = threading.Timer(timeout_s, child.kill)  # ends the read below
        timer.start()
        began = time.monotonic()
        try:
            write_frame(self._child.stdin, frame)
            answer = read_frame(self._child.stdout)
        except OSError:
            answer = None
        finally:
            timer.cancel()
        if answer is not None:
            return answer
        self._end()
        if time.monotonic() - began >= timeout_s:
            raise LineError("invalid_grammar", f"it does not compile within {timeout_s:.0f} s: make it simpler")
        raise LineError("invalid_grammar", "compiling it takes too much memory or brings the compiler down")

    def _end(self) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


def _without_source(reason: str) -> str:
    """xgrammar's message without the place in its own source that it begins with."""
    return reason.rsplit(".cc:", 1)[-1].split(": ", 1)[-1] if ".cc:" in reason else reason
