"""The tokenizer against Meta's (tiktoken) and transformers'."""

import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batch.tokenizer import Tokenizer, _any_of
from l4tool.core.errors import CheckpointError

TEXTS = [
    "",
    "Hello, world!",
    "  leading and trailing  ",
    "\n\n\nnewlines\r\n\r\nand\ttabs \t ",
    "Größe, naïve, Ελληνικά, Русский, 中文字符, 日本語, 한국어, עברית, ไทย",
    "👩‍👩‍👧‍👦 emoji 🏳️‍🌈 and combining e\u0301",
    "it's they'RE I'll 12345678 3.14159e-10 x=y+z; // code\nfor (int i=0;i<10;i++) {}",
    "<|begin_of_text|>user<|eot|><|image|><|patch|>",
    "a" * 5000,
    " " * 3000 + "x",
    "\x00\x01\x7f\ufeff\ufffd",
]


@pytest.mark.parametrize("text", TEXTS)
def test_ids_equal_metas(tokenizer, meta_tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids == meta_tokenizer.encode(text, bos=False, eos=False)
    assert tokenizer.decode(ids) == text
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=200) | st.text("<|eot|>\n 'sA1", max_size=40))
def test_any_text_equals_metas_and_never_gives_a_special_token(tokenizer, meta_tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids == meta_tokenizer.encode(text, bos=False, eos=False)
    assert not tokenizer.special_ids.intersection(ids)


def test_special_tokens_have_metas_ids(tokenizer, meta_tokenizer):
    assert tokenizer.control_tokens == meta_tokenizer.special_tokens
    assert tokenizer.vocab_size == meta_tokenizer.n_words
    assert tokenizer.bos_token == "<|begin_of_text|>"
    eot = tokenizer.control_id("<|eot|>")
    assert tokenizer.token_bytes(eot) == b"<|eot|>"
    assert tokenizer.decode([eot]) == "" and tokenizer.decode([eot], skip_special=False) == "<|eot|>"
    assert tokenizer.token_bytes(10**9) == b""


def test_added_tokens_that_are_not_special_stay_text_too(tokenizer_folder, tmp_path):
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as HFTokenizer

    model = HFTokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    model.add_tokens([AddedToken("<think>", normalized=False, special=False)])
    model.save(str(tmp_path / "tokenizer.json"))
    loaded = Tokenizer.load(tmp_path)
    index = loaded.control_id("<think>")
    assert index not in loaded.encode("so <think> hard")
    assert loaded.decode(loaded.encode("so <think> hard")) == "so <think> hard"
    assert loaded.split_control("a<think>b") == ["a", "<think>", "b"]


def test_missing_and_broken_files_are_clear_errors(tmp_path):
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        Tokenizer.load(tmp_path)


def test_unknown_control_token_is_named(tokenizer):
    with pytest.raises(CheckpointError, match=r"<.nonsense.>"):
        tokenizer.control_id("<|nonsense|>")


def test_the_longest_of_overlapping_words_wins():
    pattern = re.compile(f"({_any_of(['ab', 'abc', 'abd', 'x|', 'x|y'])})")
    assert pattern.split("abcabdabx|yx|z") == ["", "abc", "", "abd", "", "ab", "", "x|y", "", "x|", "z"]
    assert not re.search(_any_of([]), "anything")
