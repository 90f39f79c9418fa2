"""What the warm-up makes ready is what a run needs: each case in a process of its own, where nothing is ready yet."""

import json
import subprocess
import sys

import pytest

from l4tool.main import main

PROBE = """
import gc, json, sys
from pathlib import Path
from batch.backends.base import ListSource
from batch.backends.embedded import EmbeddedBackend, EmbeddedOptions
from batch.backends.warm_up import tiny_steps
from batch.kernels.parallel import Kernel
from batch.model.model import load_model
from batch.requests import PreparedRequest, SamplingParams
from batch.tokenizer import Tokenizer
from converters.detect import open_checkpoint

folder, dtype = Path(sys.argv[1]), sys.argv[2]

def ready():
    return sorted(k.__name__ for k in gc.get_objects() if isinstance(k, Kernel) and "compiled" in vars(k))

def run(backend, lengths):
    requests = [PreparedRequest(i, [5 + i] * n, SamplingParams(4)) for i, n in enumerate(lengths)]
    assert all(r.error_code is None for r in backend.run(ListSource(requests)))

reader = open_checkpoint(folder)
steps = sum(1 for _ in tiny_steps(reader, dtype))
warm = ready()
options = EmbeddedOptions(dtype=dtype, max_batch_tokens=512)
backend = EmbeddedBackend(load_model(reader, "cpu", dtype), Tokenizer.load(folder), options, ())
for lengths in ([1], [700], [30] * 12, [400, 1, 90, 90, 20]):
    run(backend, lengths)
print(json.dumps({"steps": steps, "warm": warm, "needed": ready()}))
"""


@pytest.fixture(scope="module")
def int4(scout_tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("int4") / "model"
    assert main(["quantize", str(scout_tiny), "-o", str(folder), "--int4"]) == 0
    return folder


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("scout", "bfloat16"), ("scout", "float32"), ("maverick", "bfloat16"), ("int4", "bfloat16"), ("int4", "float32")],
)
def test_a_run_needs_no_kernel_that_the_warm_up_did_not_make_ready(name, dtype, scout_tiny, maverick_tiny, request):
    folder = {"scout": scout_tiny, "maverick": maverick_tiny}.get(name) or request.getfixturevalue("int4")
    done = subprocess.run([sys.executable, "-c", PROBE, folder, dtype], stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["warm"] and set(found["needed"]) <= set(found["warm"])
    assert found["steps"] < 20


def test_a_failing_warm_up_leaves_the_run_alone(scout_tiny, tokenizer, monkeypatch):
    from batch.backends import warm_up
    from batch.backends.embedded import EmbeddedBackend, EmbeddedOptions

    def broken(reader, dtype, activations):
        raise RuntimeError("no compiler")
        yield

    monkeypatch.setattr(warm_up, "tiny_steps", broken)
    switch_s = sys.getswitchinterval()
    EmbeddedBackend(scout_tiny, tokenizer, EmbeddedOptions(dtype="float32", kv_memory_bytes=8 << 20)).close()
    assert sys.getswitchinterval() == switch_s
