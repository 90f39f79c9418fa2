"""Streamed weights give what weights in memory give, and never more than two parts of them are in memory."""

import gc
import threading
import weakref

import pytest
import torch

from batch.model import slices as slicing
from batch.model.model import load_model, stream_model
from batch.model.stream import PartStream
from batch.requests import ImageTiles
from converters.detect import open_checkpoint
from l4tool.core.errors import CheckpointError
from tests.batch.model.driver import Driver, Row
from tests.checkpoints import compress, copy, shards

TOKENS = [[(7 * i + 3 * n) % 1900 + 5 for i in range(length)] for n, length in enumerate((40, 9, 17))]


@pytest.fixture
def streamed():
    """streamed(folder, dtype, ahead=1, keep_cached=False) → a model; all of them are closed at the end."""
    models = []

    def make(folder, dtype=torch.float32, ahead=1, keep_cached=False):
        models.append(stream_model(open_checkpoint(folder), dtype, "auto", ahead, keep_cached))
        return models[-1]

    yield make
    for model in models:
        model.close()


def some_steps(model):
    """Logits of three sequences over a prefill that is cut in two, and three decode steps."""
    driver = Driver(model)
    rows = [Row(list(tokens)) for tokens in TOKENS]
    found = driver.step([(rows[0], 32), (rows[1], 9)]) + driver.step([(rows[0], 8), (rows[2], 17)])
    for step in range(3):
        for row in rows:
            row.tokens.append(11 + step)
        found += driver.step([(row, 1) for row in rows])
    return torch.cat(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("arch", ["scout_tiny", "maverick_tiny", "scout_tiny_text"])
def test_logits_are_those_of_weights_in_memory(request, streamed, arch, dtype):
    folder = request.getfixturevalue(arch)
    whole = some_steps(load_model(open_checkpoint(folder), "cpu", dtype))
    for ahead in (0, 1):
        for keep_cached in (False, True):
            assert torch.equal(some_steps(streamed(folder, dtype, ahead, keep_cached)), whole)


@pytest.mark.parametrize("kind", ["int4", "int4-all", "fp8", "mixed"])
def test_quantized_checkpoints(streamed, scout_tiny, tmp_path, kind):
    folder = compress(scout_tiny, tmp_path / kind, kind)
    whole = some_steps(load_model(open_checkpoint(folder), "cpu", torch.bfloat16))
    assert torch.equal(some_steps(streamed(folder, torch.bfloat16)), whole)


def test_pictures(streamed, scout_tiny):
    model, whole = streamed(scout_tiny), load_model(open_checkpoint(scout_tiny), "cpu", torch.float32)
    size = model.arch.vision.image_size
    pixels = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    (expected,) = whole.encode_images([ImageTiles(pixels.numpy(), (1, 2))])
    for _ in range(2):
        assert torch.equal(model.encode_images([ImageTiles(pixels.numpy(), (1, 2))])[0], expected)
        assert model.vision._model is not None
        some_steps(model)
        assert model.vision._model is None  # its memory is the layers' now


def test_slices_do_not_change_float32(scout_tiny, maverick_tiny, monkeypatch):
    """A step of many tokens cut anywhere, sequences included; images are embedded before."""
    for folder in (scout_tiny, maverick_tiny):
        model = load_model(open_checkpoint(folder), "cpu", torch.float32)
        whole = some_steps(model)
        for most in (1, 7, 8, 40):
            with monkeypatch.context() as patch:
                patch.setattr(slicing.slices, "__defaults__", (most,))
                assert torch.equal(some_steps(model), whole), most


def test_at_most_two_parts_are_alive(streamed, scout_tiny, monkeypatch):
    """One is computed with, one is loaded. Counted at every load and at every use."""
    for ahead in (0, 1):
        model = streamed(scout_tiny, ahead=ahead)
        alive, counts, order = weakref.WeakSet(), [], []
        parts = model.text.weights._parts
        load = parts._load

        def counted(index, load=load, alive=alive, counts=counts, order=order):
            gc.collect()
            counts.append(len(alive) + 1)
            part = load(index)
            alive.add(part)
            order.append(index)
            return part

        parts._load = counted
        some_steps(model)
        model.close()
        assert max(counts) <= 1 + ahead
        steps = model.arch.text.num_layers + 1
        started = order.index(0, 1 if order[0] != 0 else 0)  # parts loaded before the count began
        assert order[started : started + 3 * steps] == list(range(steps)) * 3


def test_the_next_step_begins_with_a_loaded_layer(streamed, scout_tiny):
    model = streamed(scout_tiny)
    some_steps(model)
    parts = model.text.weights._parts
    with parts._changed:
        assert parts._changed.wait_for(lambda: bool(parts._ready), timeout=30)
        assert parts._ready[0][0] == 0


def test_an_interrupted_step_starts_over(streamed, scout_tiny, monkeypatch):
    """A kernel that fails in the middle leaves the stream at a later layer; the next step begins with the first."""
    model = streamed(scout_tiny)
    expected = some_steps(model)
    attention, calls = model.text._attention, []

    def failing(index, *args):
        calls.append(index)
        if len(calls) == 3:
            raise MemoryError("can't allocate memory")
        return attention(index, *args)

    with monkeypatch.context() as patch:
        patch.setattr(model.text, "_attention", failing)
        with pytest.raises(MemoryError):
            some_steps(model)
    assert torch.equal(some_steps(model), expected)


def test_a_file_cut_short_is_an_error_and_no_crash(streamed, scout_tiny, tmp_path):
    folder = copy(scout_tiny, tmp_path / "cut")
    model = streamed(folder)
    some_steps(model)
    largest = max(shards(folder), key=lambda path: path.stat().st_size)
    with open(largest, "r+b") as file:
        file.truncate(largest.stat().st_size // 2)
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"was changed while it was read|is truncated") as caught:
            some_steps(model)
        assert str(largest) in caught.value.message and caught.value.hint


def test_a_deleted_file_is_read_to_the_end(streamed, scout_tiny, tmp_path):
    folder = copy(scout_tiny, tmp_path / "gone")
    model = streamed(folder)
    expected = some_steps(model)
    for path in shards(folder):
        path.unlink()
    assert torch.equal(some_steps(model), expected)


def test_what_a_load_raises_is_raised_by_the_next_take():
    tries = []

    def load(index):
        tries.append(index)
        if index == 1 and tries.count(1) < 3:
            raise CheckpointError("broken")
        return index

    stream = PartStream(load, 3, ahead=1)
    for _ in range(2):
        assert stream.take(0) == 0
        with pytest.raises(CheckpointError, match="broken"):
            stream.take(1)
    assert [stream.take(index) for index in (0, 1, 2, 0)] == [0, 1, 2, 0]
    stream.close()


def test_close_while_a_part_is_loading_ends_the_thread(scout_tiny):
    before = threading.active_count()
    model = stream_model(open_checkpoint(scout_tiny), torch.float32, "auto", 1, False)
    model.close()
    assert threading.active_count() == before
    with pytest.raises(AssertionError):
        model.text.weights.layer(0)


def test_threads_of_kernels_are_left_alone(streamed, scout_tiny):
    before = torch.get_num_threads()
    seen = []
    streamed(scout_tiny)
    assert torch.get_num_threads() == before
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert seen == [before]
