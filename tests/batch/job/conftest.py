"""A small real backend for the job's tests: it runs requests without a model."""

import hashlib
import json

import pytest

from batch.job import BatchOptions, load_front, run_batch
from batch.requests import Choice, GenerationResult, TokenLogprob
from batch.state import StateOptions

FORCE = StateOptions(force=True)


class EchoBackend:
    """Answers with the end of the prompt; what it says depends on the prompt, the pictures and the seed alone.

    It keeps up to `window` requests in work and finishes them last in, first out, as an engine may.
    """

    def __init__(self, options, front, window=4):
        self.front, self.window = front, window
        self.is_closed = False
        self.stats = {"steps": 0}

    def run(self, source):
        work = []
        while True:
            while len(work) < self.window:
                request = source.take(wait=not work)
                if request is None:
                    break
                work.append(request)
            if not work:
                return
            self.stats["steps"] += 1
            yield self.answer(work.pop())

    def answer(self, request):
        if len(request.prompt) > 2000:
            return GenerationResult(request.key, [], len(request.prompt), "out_of_memory", "can never fit")
        digest = hashlib.sha256(repr((request.prompt, request.sampling.seed)).encode())
        for image in request.images:
            digest.update(image.pixels.tobytes())
        choices = []
        for index in range(request.n):
            ids = request.prompt[-min(request.sampling.max_tokens, 5) :]
            text = f"{self.front.tokenizer.decode(ids)} {index} {digest.hexdigest()[:8]}"
            logprobs = None
            if request.sampling.logprobs is not None:
                top = tuple((i, -1.0 - i) for i in range(request.sampling.logprobs))
                logprobs = [TokenLogprob(i, float("-inf") if i == ids[0] else -0.5, top) for i in ids]
            choices.append(Choice(index, ids, text, "length", logprobs))
        return GenerationResult(request.key, choices, len(request.prompt))

    def close(self):
        self.is_closed = True


@pytest.fixture(scope="session")
def front(scout_tiny):
    """The front of the shared tiny checkpoint, with default options."""
    from pathlib import Path

    return load_front(BatchOptions(Path("in"), Path("out"), scout_tiny))


@pytest.fixture
def run(tmp_path, scout_tiny):
    """run(lines or bytes, **options) → (summary, output lines as parsed JSON)."""

    def call(lines, make_backend=EchoBackend, **options):
        data = lines if isinstance(lines, bytes) else b"".join(encode(line) + b"\n" for line in lines)
        source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
        source.write_bytes(data)
        summary = run_batch(BatchOptions(source, target, scout_tiny, **{"state": FORCE} | options), make_backend)
        raw = target.read_bytes()
        assert not raw or raw.endswith(b"\n")
        return summary, [json.loads(line) for line in raw.splitlines()]

    return call


def encode(line):
    return line if isinstance(line, bytes) else json.dumps(line).encode()
