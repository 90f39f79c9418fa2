"""GGUF headers: our parser against the `gguf` package's writer and reader, and files that are broken on purpose."""

import random
import struct

import numpy as np
import pytest
import torch

gguf = pytest.importorskip("gguf")

from converters.detect import open_source  # noqa: E402
from converters.gguf_file import DTYPES, OTHER_TYPES, SCALARS, STRING, GgufFile  # noqa: E402
from l4tool.core.errors import CheckpointError, InputMissing, L4Error  # noqa: E402

KEYS = {  # every type of value
    "a.u8": (200, "add_uint8"), "a.i8": (-3, "add_int8"), "a.u16": (60000, "add_uint16"), "a.i16": (-300, "add_int16"),
    "a.u32": (2**32 - 1, "add_uint32"), "a.i32": (-(2**31), "add_int32"), "a.f32": (0.5, "add_float32"),
    "a.u64": (2**64 - 1, "add_uint64"), "a.i64": (-(2**63), "add_int64"), "a.f64": (0.1, "add_float64"),
    "a.yes": (True, "add_bool"), "a.text": ("grüße\n", "add_string"), "a.texts": (["", "é", "x" * 300], "add_array"),
    "a.ints": ([1, -2, 3], "add_array"), "a.floats": ([0.5, -1.0], "add_array"),
    "a.flags": ([True, False], "add_array"),
}  # fmt: skip


def write(path, tensors=None, keys=None, alignment=None, **options):
    """A file by the package's writer."""
    writer = gguf.GGUFWriter(path, "llama4", **options)
    if alignment:
        writer.add_custom_alignment(alignment)
    for key, (value, method) in (KEYS if keys is None else keys).items():
        getattr(writer, method)(key, value)
    for name, values in (tensors or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def arrays():
    rng = np.random.default_rng(1)
    return {
        "x.weight": rng.standard_normal((3, 4, 5)).astype(np.float32),
        "y.weight": rng.standard_normal((7,)).astype(np.float16),
        "z.weight": rng.standard_normal((2, 33)).astype(np.float32),
    }


@pytest.mark.parametrize("alignment", [None, 8, 256])
def test_what_the_package_writes(alignment, arrays, tmp_path):
    """Every type of value, every float type, any alignment."""
    file = GgufFile(write(tmp_path / "a.gguf", arrays, alignment=alignment))
    for key, (value, _) in KEYS.items():
        assert file.metadata[key] == value and type(file.metadata[key]) is type(value), key
    assert list(file.tensors) == list(arrays)
    for name, values in arrays.items():
        assert torch.equal(file.view(name), torch.from_numpy(values)), name
    theirs = {name: f.contents() for name, f in gguf.GGUFReader(tmp_path / "a.gguf").fields.items()}
    assert file.metadata == {name: value for name, value in theirs.items() if not name.startswith("GGUF.")}


def test_the_numbers_of_types_are_the_packages():
    names = {int(kind): kind.name for kind in gguf.GGMLQuantizationType}
    assert {kind: str(dtype).split(".")[1] for kind, dtype in DTYPES.items()} == {
        0: "float32",
        1: "float16",
        30: "bfloat16",
    }
    assert [names[kind] for kind in DTYPES] == ["F32", "F16", "BF16"]
    for kind, name in OTHER_TYPES.items():
        assert names[kind] == name
    assert set(names) - {40, 41, 42} <= set(DTYPES) | set(OTHER_TYPES)
    assert {int(kind) for kind in gguf.GGUFValueType} == {*SCALARS, STRING, gguf.GGUFValueType.ARRAY}


def test_big_endian_is_refused(arrays, tmp_path):
    """Its bytes would be floats too, of other values."""
    write(tmp_path / "a.gguf", arrays, endianess=gguf.GGUFEndian.BIG)
    with pytest.raises(CheckpointError, match="big-endian"):
        GgufFile(tmp_path / "a.gguf")


def test_a_quantized_tensor_is_named(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama4")
    writer.add_tensor("x.weight", np.zeros((2, 144), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q4_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"'x.weight' is Q4_K") as caught:
        GgufFile(tmp_path / "a.gguf")
    assert caught.value.hint


def header(keys=b"", num_keys=0, tensors=b"", num_tensors=0, version=3):
    return b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_keys) + keys + tensors


def text(value):
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def tensor(name="x", dims=(4,), kind=0, offset=0, num_dims=None):
    sizes = b"".join(struct.pack("<Q", size) for size in dims)
    return text(name) + struct.pack("<I", num_dims or len(dims)) + sizes + struct.pack("<IQ", kind, offset)


U32 = struct.pack("<I", 4)
BROKEN = {
    "empty": (b"", "does not begin with GGUF"),
    "only the magic": (b"GGUF", "truncated"),
    "a version of the future": (header(version=9), "version 9"),
    "more keys than bytes": (header(num_keys=2**40), "cannot hold"),
    "more tensors than bytes": (header(num_tensors=2**60), "cannot hold"),
    "a long key": (header(struct.pack("<Q", 2**63) + b"x" * 40, 1), "truncated"),
    "a key without a name": (header(text("") + U32 + bytes(4), 1), "name of 0"),
    "a key that is no text": (header(text(b"\xff\xfe") + U32 + bytes(4), 1), "not UTF-8"),
    "a key twice": (header((text("k") + U32 + bytes(4)) * 2, 2), "twice"),
    "an unknown value": (header(text("k") + struct.pack("<I", 13) + bytes(9), 1), "unknown type 13"),
    "a text that is none": (header(text("k") + struct.pack("<I", 8) + text(b"\xc3"), 1), "not UTF-8"),
    "an array of arrays": (header(text("k") + struct.pack("<IIQ", 9, 9, 1) + bytes(20), 1), "unknown type 9"),
    "an endless array": (header(text("k") + struct.pack("<IIQ", 9, 0, 2**62), 1), "cannot hold"),
    "endless texts": (header(text("k") + struct.pack("<IIQ", 9, 8, 2**61), 1), "cannot hold"),
    "a text too long": (header(text("k") + struct.pack("<IIQQ", 9, 8, 1, 2**62), 1), "truncated"),
    "texts that are none": (header(text("k") + struct.pack("<IIQ", 9, 8, 1) + text(b"\xff"), 1), "not UTF-8"),
    "no alignment": (header(text("general.alignment") + U32 + struct.pack("<I", 0), 1), "alignment"),
    "an odd alignment": (header(text("general.alignment") + U32 + struct.pack("<I", 24), 1), "alignment"),
    "five dimensions": (header(tensors=tensor(dims=(1,) * 5), num_tensors=1), "5 dimensions"),
    "no dimension": (header(tensors=tensor(dims=(), num_dims=0) + bytes(8), num_tensors=1), "0 dimensions"),
    "an unknown tensor type": (header(tensors=tensor(kind=77), num_tensors=1), "unknown type 77"),
    "a huge tensor": (header(tensors=tensor(dims=(2**63, 2**63)), num_tensors=1) + bytes(64), "truncated"),
    "a far tensor": (header(tensors=tensor(offset=2**63), num_tensors=1) + bytes(64), "truncated"),
    "a tensor off its place": (header(tensors=tensor(offset=4), num_tensors=1) + bytes(64), "not aligned"),
    "a tensor twice": (header(tensors=tensor() + tensor(offset=32), num_tensors=2) + bytes(96), "twice"),
    "overlapping tensors": (header(tensors=tensor("a", (64,)) + tensor("b", offset=32), num_tensors=2) + bytes(512),
                            "overlaps"),
}  # fmt: skip


@pytest.mark.parametrize("what", list(BROKEN))
def test_a_broken_header_is_one_error(what, tmp_path):
    data, words = BROKEN[what]
    (tmp_path / "a.gguf").write_bytes(data)
    with pytest.raises(CheckpointError, match=words) as caught:
        GgufFile(tmp_path / "a.gguf")
    assert "a.gguf" in caught.value.message


def test_every_cut_is_found(arrays, tmp_path):
    path = write(tmp_path / "a.gguf", arrays)
    whole = path.read_bytes()
    last = max(t.stop for t in GgufFile(path).tensors.values())
    for size in [*range(0, 1200, 7), last - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError):
            GgufFile(path)
    with pytest.raises(InputMissing):
        GgufFile(tmp_path / "no.gguf")


def test_flipped_bytes_never_raise_anything_else(tmp_path):
    """Wherever a header is spoilt, what comes out is a checkpoint or an error for people, and soon."""
    tokens = ["a", "b", "ab", "<|begin_of_text|>"]
    keys = {f"llama4.{key}": (value, "add_uint32") for key, value in {
        "block_count": 1, "context_length": 64, "embedding_length": 8, "feed_forward_length": 8, "expert_count": 2,
        "attention.head_count": 2, "attention.head_count_kv": 1, "attention.key_length": 4, "expert_used_count": 1,
        "expert_feed_forward_length": 8, "interleave_moe_layer_step": 1}.items()}  # fmt: skip
    keys |= {"llama4.rope.freq_base": (5e5, "add_float32"), "tokenizer.ggml.tokens": (tokens, "add_array"),
             "llama4.attention.layer_norm_rms_epsilon": (1e-5, "add_float32"),
             "tokenizer.ggml.token_type": ([1, 1, 1, 3], "add_array"),
             "tokenizer.ggml.merges": (["a b"], "add_array"),
             "tokenizer.ggml.model": ("gpt2", "add_string"),
             "tokenizer.ggml.pre": ("llama4", "add_string")}  # fmt: skip
    tensors = {"token_embd.weight": np.ones((4, 8), np.float32), "rope_freqs.weight": np.ones(2, np.float32)}
    path = write(tmp_path / "a.gguf", tensors, keys)
    whole, rng = path.read_bytes(), random.Random(5)
    for _ in range(400):
        data = bytearray(whole)
        for _ in range(rng.choice([1, 1, 3])):
            at = rng.randrange(4, len(whole) - 8)
            data[at : at + 4] = rng.choice([bytes([rng.randrange(256)]) + data[at + 1 : at + 4], b"\xff" * 4, bytes(4)])
        path.write_bytes(data)
        with pytest.raises(L4Error):  # at the latest for the tensors that are not there
            open_source(path)
