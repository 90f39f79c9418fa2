"""Meta's tokenizer.model: what is read, and what is refused with the line it stands on."""

import base64

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from converters.tiktoken_bpe import read_ranks, tokenizer_json, write_ranks
from converters.tokenizer_json import tokenizer_model
from l4tool.core.errors import CheckpointError
from tests.converters.meta_files import tokenizer_bytes

BYTES = [bytes([byte]) for byte in range(256)]


def lines(tokens):
    return [base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(tokens)]


def file_of(*rows):
    return b"".join(row + b"\n" for row in rows)


def test_it_reads_what_metas_loader_reads(tmp_path):
    from llama_models.tokenizer_utils import load_bpe_file

    path = tmp_path / "tokenizer.model"
    path.write_bytes(tokenizer_bytes(5000))
    theirs = load_bpe_file(path)
    assert {token: rank for rank, token in enumerate(read_ranks(path.read_bytes()))} == theirs
    assert write_ranks(read_ranks(path.read_bytes())) == path.read_bytes()


def test_line_ends_and_blank_lines_do_not_matter():
    data = write_ranks([*BYTES, b"ab"])
    assert read_ranks(data.replace(b"\n", b"\r\n")) == read_ranks(data.replace(b"\n", b"\n\n")) == [*BYTES, b"ab"]
    assert read_ranks(data[:-1]) == [*BYTES, b"ab"]


BROKEN = {
    "empty": (b"", "holds no tokens"),
    "only blank lines": (b"\n \r\n", "holds no tokens"),
    "binary": (bytes(range(256)) * 20, "line 1"),
    "binary with line ends": (b"\x93NUMPY\n\x00\x01 \x02\n", "line 1.*not a base64 token and its rank"),
    "a git lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "line 1"),
    "an html page": (b"<!doctype html>\n<html></html>\n", "line 1"),
    "bad base64": (file_of(*lines(BYTES[:7]), b"A?== 7"), "line 8.*not base64"),
    "base64 without its end": (file_of(b"AA 0"), "line 1.*not base64"),
    "base64 that nobody writes": (file_of(b"AB== 0"), "line 1.*not the base64"),
    "an empty token": (file_of(b"AA== 0", b"= 1"), "line 2"),
    "no rank": (file_of(b"AA== 0", b"AQ=="), "line 2"),
    "three fields": (file_of(b"AA== 0 0"), "line 1"),
    "a rank that is no number": (file_of(b"AA== zero"), "line 1.*must be 0"),
    "a rank too many": (file_of(b"AA== 0", b"AQ== 2"), "line 2.*must be 1, not '2'"),
    "a rank twice": (file_of(b"AA== 0", b"AQ== 0"), "line 2.*must be 1"),
    "a negative rank": (file_of(b"AA== -0"), "line 1"),
    "not from zero": (file_of(b"AA== 1"), "line 1.*must be 0"),
    "a token twice": (file_of(*lines(BYTES), b"AA== 256"), "line 257.*the token of line 1 again"),
    "a byte missing": (file_of(*lines(BYTES[:65] + BYTES[66:])), "1 of the 256.*0x41"),
    "cut off": (tokenizer_bytes(300)[:-1000], "line|single bytes"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_one_error_with_file_and_line(name):
    data, message = BROKEN[name]
    for read in (read_ranks, tokenizer_json):
        with pytest.raises(CheckpointError, match=message) as caught:
            read(data, "there/tokenizer.model")
        assert caught.value.message.startswith("there/tokenizer.model") and caught.value.hint
        assert caught.value.message.isprintable() and len(caught.value.message) < 300


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=200) | st.text("AQ=0123456789 \n+/", max_size=100).map(str.encode))
def test_any_bytes_are_tokens_or_a_checkpoint_error(data):
    for read in (read_ranks, tokenizer_model):
        with pytest.raises(CheckpointError):
            read(data)
