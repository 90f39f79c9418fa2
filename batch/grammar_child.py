"""The process that compiles grammars: what a hostile schema does to the compiler, it does to this process alone.

It reads frames from stdin (4 bytes of length, then the bytes): the vocabulary, twice a frame, then one grammar after
another; and answers each on stdout with "+" and the compiled grammar, or "-" and what is wrong. It ends with its stdin.
"""

from __future__ import annotations

import contextlib
import json
import re
import struct
import sys
import time
from typing import IO, Any

MAX_COMPILED_BYTES = 64 * 2**20
MAX_GROWTH_BYTES = 3 * 2**30  # of address space while compiling
MAX_FIRST_MASK_S = 1.0
MAX_WHITESPACE = 24  # characters in a row between two parts of JSON: an answer cannot be nothing but line breaks

_CONTROLS = re.compile(rb"[\x00-\x09\x0b\x0c\x0e-\x1f]")
_LENGTH = struct.Struct("<I")


def write_frame(file: IO[bytes], data: bytes) -> None:
    file.write(_LENGTH.pack(len(data)))
    file.write(data)
    file.flush()


def read_frame(file: IO[bytes]) -> bytes | None:
    """The next frame, None when the other side is gone."""
    head = file.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    (size,) = _LENGTH.unpack(head)
    data = file.read(size)
    return data if len(data) == size else None


def split_vocabulary(lengths: bytes, joined: bytes) -> list[bytes]:
    """The inverse of `lengths` (uint32 each) and the tokens' bytes in one piece."""
    tokens, start = [], 0
    for (length,) in _LENGTH.iter_unpack(lengths):
        tokens.append(joined[start : start + length])
        start += length
    return tokens


def tokenizer_info(vocabulary: list[bytes], is_json: bool) -> Any:
    """xgrammar's view of a vocabulary; tokens without bytes are special ones, which no grammar allows. In JSON those
    with control characters are no better: xgrammar would let them into strings of limited length."""
    import xgrammar

    if is_json:
        vocabulary = [b"" if _CONTROLS.search(token) else token for token in vocabulary]

    return xgrammar.TokenizerInfo(
        vocabulary, xgrammar.VocabType.RAW, vocab_size=len(vocabulary), stop_token_ids=[]
    )  # fmt: skip


def compile_form(compiler: Any, kind: str, source: str, strict: bool) -> Any:
    """xgrammar's CompiledGrammar of one form (batch/structured.py). Raises what xgrammar raises."""
    if kind == "schema":
        return compiler.compile_json_schema(source, strict_mode=strict, max_whitespace_cnt=MAX_WHITESPACE)
    if kind == "regex":
        return compiler.compile_regex(source)
    if kind == "tag":
        return compiler.compile_structural_tag(source)
    return compiler.compile_grammar(source)


def _answer(compiler: Any, request: dict[str, Any]) -> bytes:
    import numpy as np
    import xgrammar

    compiled = compile_form(compiler, request["kind"], request["source"], request["strict"])
    if compiled.memory_size_bytes > MAX_COMPILED_BYTES:
        raise ValueError(f"it takes {compiled.memory_size_bytes:,} bytes; at most {MAX_COMPILED_BYTES:,}")
    matcher = xgrammar.GrammarMatcher(compiled, terminate_without_stop_token=True)
    row = np.zeros((1, (compiled.tokenizer_info.vocab_size + 31) // 32), np.int32)
    began = time.monotonic()
    matcher.fill_next_token_bitmask(row, 0)
    if time.monotonic() - began > MAX_FIRST_MASK_S:
        raise ValueError("looking up which tokens may come first takes too long")
    if not row.any() and not matcher.is_completed():
        raise ValueError("nothing can satisfy it")
    return bytes(compiled.serialize_json().encode())


def _limit_memory() -> None:
    import resource

    with open("/proc/self/statm") as file:
        used_bytes = int(file.read().split()[0]) * resource.getpagesize()
    limit = used_bytes + MAX_GROWTH_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def main() -> None:
    """Serve until stdin ends."""
    import xgrammar

    source, target = sys.stdin.buffer, sys.stdout.buffer
    lengths, joined = read_frame(source), read_frame(source)
    if lengths is None or joined is None:
        return
    vocabulary = split_vocabulary(lengths, joined)
    compilers = {
        is_json: xgrammar.GrammarCompiler(tokenizer_info(vocabulary, is_json), max_threads=1, cache_enabled=False)
        for is_json in (False, True)
    }
    with contextlib.suppress(ImportError, OSError, ValueError):  # not Linux: the time limit remains
        _limit_memory()
    while (frame := read_frame(source)) is not None:
        try:
            request = json.loads(frame)
            answer = b"+" + _answer(compilers[request["is_json"]], request)
        except Exception as error:
            answer = b"-" + (str(error) or type(error).__name__).encode("utf-8", "replace")
        write_frame(target, answer)
