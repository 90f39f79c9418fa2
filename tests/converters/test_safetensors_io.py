"""Headers: the safetensors library's files read alike, spoiled ones are refused; views do not copy."""

import json
import random
import threading
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from converters.safetensors_io import DTYPES, SafetensorsFile, read_header
from l4tool.core.errors import CheckpointError, InputMissing


def sample(dtype):
    generator = torch.Generator().manual_seed(1)
    raw = torch.randint(0, 2 if dtype == torch.bool else 120, (3, 5, 8), generator=generator, dtype=torch.uint8)
    return raw.view(dtype) if dtype == torch.bool else raw.to(dtype)


TENSORS = {str(dtype): sample(dtype) for dtype in DTYPES.values()} | {
    "empty": torch.empty(0, 7),
    "scalar": torch.tensor(2.5),
    "odd": torch.arange(3, dtype=torch.uint8),
}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("safetensors") / "x.safetensors"
    save_file(TENSORS, path, metadata={"format": "pt"})
    return path


def build(path, header, data=b""):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tolist() == b.tolist()


def test_every_dtype_reads_as_the_library_reads_it(path):
    file = SafetensorsFile(path)
    theirs = load_file(path)
    assert file.tensors.keys() == theirs.keys() and file.metadata == {"format": "pt"}
    for name, tensor in theirs.items():
        assert same(file.view(name), tensor), name
        assert file.tensors[name].nbytes == tensor.nbytes


def test_views_share_the_map_and_outlive_close(path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        file = SafetensorsFile(path)
        first, second = file.view("torch.float32"), file.view("torch.float32")
    assert first.data_ptr() == second.data_ptr()
    start = first.data_ptr() - file.tensors["torch.float32"].start
    for name, stored in file.tensors.items():
        if stored.nbytes:
            assert file.view(name).data_ptr() == start + stored.start, name
    stored = file.tensors["torch.float32"]
    file.release(stored.start, stored.stop)
    file.close()
    file.close()
    assert same(first, TENSORS["torch.float32"])
    assert same(file.view("torch.int32"), TENSORS["torch.int32"])  # maps again


def test_released_pages_read_the_same_again(tmp_path):
    path = tmp_path / "big.safetensors"
    tensors = {"a": torch.arange(40_000, dtype=torch.int64), "b": torch.ones(9000)}
    save_file(tensors, path)
    file = SafetensorsFile(path)
    view = file.view("a")
    assert torch.equal(view, tensors["a"])
    file.release(file.tensors["a"].start, file.tensors["a"].stop)
    assert torch.equal(view, tensors["a"]) and torch.equal(file.view("b"), tensors["b"])


def test_threads_share_one_map(path):
    file = SafetensorsFile(path)
    pointers = []
    threads = [threading.Thread(target=lambda: pointers.append(file.view("odd").data_ptr())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(pointers)) == 1


def test_a_tensor_at_an_odd_offset_is_read(tmp_path):
    data = torch.tensor([1.5, -2.0]).numpy().tobytes()
    header = {
        "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
    }
    file = SafetensorsFile(build(tmp_path / "odd.safetensors", header, b"\x07" + data))
    assert file.view("b").tolist() == [1.5, -2.0]


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
BAD = [
    (b"{ ", "not valid JSON"),
    (b"[]", "not a JSON object"),
    (b"\xff\xff", "not valid JSON"),
    (b'{"a": {"dtype":"U8","shape":[0],"data_offsets":[0,0]}, "a": {}}', "occurs twice"),
    (b"[" * 200_000, "not valid JSON"),
    ({"a": 3}, "dtype, shape and data_offsets"),
    ({"a": {"dtype": "F32", "shape": [2]}}, "dtype, shape and data_offsets"),
    ({"a": ENTRY | {"more": 1}}, "dtype, shape and data_offsets"),
    ({"a": ENTRY | {"dtype": "F33"}}, "unknown dtype 'F33'"),
    ({"a": ENTRY | {"dtype": ["F32"]}}, "unknown dtype"),
    ({"a": ENTRY | {"shape": [-2]}}, "malformed"),
    ({"a": ENTRY | {"shape": [True, 2]}}, "malformed"),
    ({"a": ENTRY | {"shape": 2}}, "malformed"),
    ({"a": ENTRY | {"data_offsets": [8, 0]}}, "malformed"),
    ({"a": ENTRY | {"data_offsets": [0, 8, 9]}}, "malformed"),
    ({"a": ENTRY | {"shape": [3]}}, "needs 12 bytes, its offsets span 8"),
    ({"a": ENTRY | {"shape": [2**40, 2**40]}}, "needs"),
    ({"a": ENTRY | {"data_offsets": [4, 12]}}, "gap"),
    ({"a": ENTRY, "b": ENTRY | {"data_offsets": [4, 12]}}, "overlaps"),
    ({"a": ENTRY, "b": ENTRY | {"data_offsets": [8, 16]}}, "truncated: tensor 'b' ends"),
    ({"a": ENTRY | {"shape": [1], "data_offsets": [0, 4]}}, "4 bytes follow"),
    ({"__metadata__": {"a": 1}, "a": ENTRY}, "__metadata__"),
]


@pytest.mark.parametrize("header, said", BAD)
def test_headers_that_lie(tmp_path, header, said):
    path = build(tmp_path / "bad.safetensors", header, bytes(8))
    with pytest.raises(CheckpointError, match=said) as caught:
        read_header(path)
    assert str(path) in caught.value.message and caught.value.hint


@pytest.mark.parametrize("raw", [b"", b"\x02\0\0", b"\xff" * 8, (2**40).to_bytes(8, "little") + b"{}", bytes(16)])
def test_files_that_are_too_short_for_their_header(tmp_path, raw):
    path = tmp_path / "short.safetensors"
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match="header cannot be"):
        read_header(path)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(InputMissing, match=r"none\.safetensors"):
        read_header(tmp_path / "none.safetensors")
    with pytest.raises(InputMissing):
        read_header(tmp_path)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_mutated_headers_are_refused_or_harmless(path, tmp_path_factory, data):
    raw = bytearray(path.read_bytes())
    rng = random.Random(data.draw(st.integers(0, 2**32)))
    end = 8 + int.from_bytes(raw[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        place = rng.choice([rng.randrange(8), rng.randrange(end), rng.randrange(end)])
        raw[place] = rng.choice([rng.randrange(256), ord(rng.choice('0123456789"[]{},: '))])
    spoiled = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    spoiled.write_bytes(raw)
    try:
        file = SafetensorsFile(spoiled)
    except CheckpointError as error:
        assert str(spoiled) in error.message
        return
    theirs = load_file(spoiled)  # what we take, the library takes too, with the same contents
    assert file.tensors.keys() == theirs.keys()
    for name, tensor in theirs.items():
        ours = file.view(name)
        assert ours.dtype == tensor.dtype and ours.shape == tensor.shape
        assert torch.equal(ours.contiguous().view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8))


def test_every_truncation_is_refused(path, tmp_path):
    raw = path.read_bytes()
    cut = tmp_path / "cut.safetensors"
    for length in range(0, len(raw), 7):
        cut.write_bytes(raw[:length])
        with pytest.raises(CheckpointError):
            read_header(cut)
