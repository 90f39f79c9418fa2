"""What convert writes as GGUF, loaded and run by llama.cpp: its logits, greedy tokens and token ids against ours.

Opt-in: `make test-gguf` builds llama-cpp-python from source, and L4TOOL_LLAMA_PYTHON is the interpreter that has it.
"""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from converters.conversion import How, convert
from converters.detect import open_checkpoint
from converters.targets import Options
from tests.batch.model.driver import Driver, Row, ours
from tests.converters.test_gguf import for_llama_cpp
from tests.threads import one_thread  # noqa: F401

PYTHON = os.environ.get("L4TOOL_LLAMA_PYTHON")
pytestmark = [
    pytest.mark.llama_cpp,
    pytest.mark.skipif(PYTHON is None, reason="L4TOOL_LLAMA_PYTHON is not set: run `make test-gguf`"),
]
PEER = Path(__file__).resolve().parents[2] / "bench" / "peers" / "llama_logits.py"
TEXTS = ["Hello, world! It's 12345 o'clock; WE'LL see.", "  two\n\n\ttabs é 你好 👩\u200d👩\u200d👧", "a" * 70 + "\r\n"]
NEW_TOKENS = 16


@pytest.fixture(scope="module", params=["scout_tiny", "maverick_tiny"])
def source(request, tmp_path_factory):
    from tests import checkpoints

    folder = tmp_path_factory.mktemp("source") / "model"
    return for_llama_cpp(checkpoints.copy(request.getfixturevalue(request.param), folder))


def prompts():
    rng = torch.Generator().manual_seed(1)
    return [torch.randint(0, 2000, (size,), generator=rng).tolist() for size in (9, 60, 150)]


def in_llama_cpp(source, folder, dtype):
    """(logits of each prompt, what follows, ids of TEXTS) of `source` as GGUF."""
    convert(open_checkpoint(source), folder / "out", Options("gguf", dtype=dtype, text_only=True), How())
    file = next((folder / "out").glob("*.gguf"))
    job = {"gguf": str(file), "prompts": prompts(), "new_tokens": NEW_TOKENS, "texts": TEXTS, "out": str(folder)}
    job |= json.loads(os.environ.get("L4TOOL_LLAMA_JOB", "{}"))  # another build of llama.cpp: "build", "binding"
    (folder / "job.json").write_text(json.dumps(job))
    done = subprocess.run(
        [PYTHON, str(PEER), str(folder / "job.json"), str(folder / "result.json")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((folder / "result.json").read_text())
    logits = [torch.from_numpy(np.load(folder / f"{n}.npy")) for n in range(len(prompts()))]
    return logits, result["generated"], result["tokens"]


def test_float32_logits_and_tokens_are_ours(source, tmp_path):
    logits, generated, _ = in_llama_cpp(source, tmp_path, "f32")
    model = ours(source)
    for prompt, theirs, follows in zip(prompts(), logits, generated, strict=True):
        row = Row(list(prompt))
        expected = Driver(model).logits(row)
        assert (theirs - expected).abs().max() <= 1e-5 * expected.abs().max()
        whole = Driver(model).logits(Row(prompt + follows[:-1]))
        assert whole[len(prompt) - 1 :].argmax(-1).tolist() == follows


@pytest.mark.parametrize(("dtype", "bound"), [("bf16", 0.02), ("q8_0", 0.06), ("q4_0", 0.35)])
def test_other_types_come_close(dtype, bound, source, tmp_path):
    """Mean error of the logits over their spread: rounding, now and then another expert, no wrong tensor."""
    logits, _, _ = in_llama_cpp(source, tmp_path, dtype)
    model = ours(source)
    for prompt, theirs in zip(prompts(), logits, strict=True):
        expected = Driver(model).logits(Row(list(prompt)))
        assert (theirs - expected).abs().mean() <= bound * expected.std()


def test_text_becomes_the_same_tokens(source, tmp_path):
    from tokenizers import Tokenizer

    _, _, ids = in_llama_cpp(source, tmp_path, "bf16")
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    assert ids == [tokenizer.encode(text, add_special_tokens=False).ids for text in TEXTS]


def test_features_of_a_tile_are_transformers(source, tmp_path):
    """The vision tower's file in libmtmd. It lists the tile's tokens by columns, transformers and Meta by rows, which
    may be why it warns of degraded quality; each token's feature is the same."""
    if "L4TOOL_LLAMA_JOB" in os.environ:
        pytest.skip("the other build of llama.cpp may be without libmtmd")
    from tests.batch.model.driver import theirs

    convert(open_checkpoint(source), tmp_path / "out", Options("gguf", dtype="f32"), How())
    files = {path.name.startswith("mmproj"): str(path) for path in (tmp_path / "out").glob("*.gguf")}
    pixels = np.random.default_rng(0).integers(0, 256, (56, 56, 3), dtype=np.uint8)
    np.save(tmp_path / "pixels.npy", pixels)
    job = {"gguf": files[False], "mmproj": files[True], "pixels": str(tmp_path / "pixels.npy")}
    (tmp_path / "job.json").write_text(json.dumps(job | {"out": str(tmp_path / "features.npy")}))
    command = [PYTHON, str(PEER.with_name("llama_vision.py")), str(tmp_path / "job.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    model, tile = theirs(source), (torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255 - 0.5) / 0.5
    with torch.no_grad():
        expected = model.multi_modal_projector(model.vision_model(tile).last_hidden_state).view(4, -1)
    found = torch.from_numpy(np.load(tmp_path / "features.npy")).view(2, 2, -1).transpose(0, 1).reshape(4, -1)
    assert (found - expected).abs().max() <= 5e-3 * expected.abs().max()
