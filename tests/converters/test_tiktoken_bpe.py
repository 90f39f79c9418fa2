"""tokenizer.model ↔ tokenizer.json: the same tokens as tiktoken, for any text."""

import base64
import json
import random
import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from converters.arch_io import arch_from_config
from converters.hf_side_files import hf_side_files
from converters.tiktoken_bpe import merges_of, read_ranks, tokenizer_json, tokenizer_model, write_ranks
from l4tool.core.errors import CheckpointError
from l4tool.core.prompt import special_tokens
from tests.converters import published

LOOK_ALIKES = ["<|eot|>", "<|begin_of_text|>", "<|image|>", "<|", "|>", "<|eot|", "<|eot|>>", "< |eot|>", "<|EOT|>"]
PIECES = [
    "the ", "The", " WE'LL", "'S", "'re", "’ll", "aaaa", "   ", "\n\n", "\r\n", "\r", "\t", "12345", "7", "٣٤٥",
    "é", "a\u0301", "👩\u200d👩\u200d👧", "👍🏽", "🇪🇺", "def f(x):\n    return x**2\n", "//", "https://a.b/c?d=e#f",
    "\0", "\x07", "\u200d", "\ufeff", "\u2028", "ß", "İ", "ﬁ", "中文", "日本語の文", "한국어", "ไทย", "हिन्दी",
    "עברית", "العربية", "x" * 300, "=" * 90, " " * 40, *LOOK_ALIKES,
]  # fmt: skip


@pytest.fixture(scope="session")
def metas():
    """Meta's tokenizer, and its file's contents."""
    tokenizer = pytest.importorskip("llama_models.llama4.tokenizer")
    model = (Path(tokenizer.__file__).parent / "tokenizer.model").read_bytes()
    return tokenizer.Tokenizer.get_instance(), model


@pytest.fixture(scope="session")
def converted(metas):
    """Our tokenizer.json of it, in the tokenizers library; special tokens in text are text."""
    tokenizer = Tokenizer.from_str(tokenizer_json(metas[1]))
    tokenizer.encode_special_tokens = True
    return tokenizer


def assert_same(text, metas, converted):
    expected = metas[0].encode(text, bos=False, eos=False, allowed_special=set(), disallowed_special=())
    found = converted.encode(text, add_special_tokens=False).ids
    assert found == expected, repr(text)
    assert converted.decode(found, skip_special_tokens=False) == metas[0].decode(expected)


def corpus(size, seed):
    """Text of every script: words of each Unicode block, mixed with what tokenizers trip over."""
    rng, done = random.Random(seed), 0
    blocks = [range(start, start + 128) for start in range(0, 0x30000, 128)] + [range(0xE0000, 0xE0080)]
    letters = [[chr(c) for c in block if unicodedata.category(chr(c)) not in ("Cs", "Cn")] for block in blocks]
    letters = [block for block in letters if block]
    while done < size:
        block = rng.choice(letters)
        words = ["".join(rng.choices(block, k=rng.randint(1, 12))) for _ in range(rng.randint(1, 8))]
        text = rng.choice([" ", "", "\n", ", "]).join([*words, *rng.choices(PIECES, k=rng.randint(0, 6))])
        done += len(text.encode())
        yield text


def test_there_and_back_is_the_same_file(metas):
    """Meta's own file, byte for byte, and its special tokens under their ids."""
    made = tokenizer_json(metas[1])
    assert tokenizer_model(made) == metas[1]
    added = {token["content"]: token["id"] for token in json.loads(made)["added_tokens"]}
    assert added == metas[0].special_tokens


def test_mixed_text(metas, converted):
    for text in corpus(200_000, seed=1):
        assert_same(text, metas, converted)


@pytest.mark.slow
def test_much_mixed_text(metas, converted):
    for text in corpus(20_000_000, seed=2):
        assert_same(text, metas, converted)


@given(st.text(max_size=200))
@settings(max_examples=200, deadline=None)
def test_any_text(metas, converted, text):
    assert_same(text, metas, converted)


@given(st.lists(st.sampled_from(PIECES), max_size=30))
@settings(max_examples=100, deadline=None)
def test_awkward_text(metas, converted, pieces):
    assert_same("".join(pieces), metas, converted)


def test_special_tokens_where_they_are_meant(metas):
    tokenizer = Tokenizer.from_str(tokenizer_json(metas[1]))
    text = "<|header_start|>user<|header_end|>\n\nhi<|eot|>"
    expected = metas[0].encode(text, bos=True, eos=False, allowed_special="all")
    assert tokenizer.encode(text).ids == expected


def test_transformers_and_batch_load_the_written_files(metas, tmp_path):
    """The whole set of files for Scout: the same ids in transformers' tokenizer, in our own, and in tiktoken."""
    from transformers import AutoTokenizer

    from batch.tokenizer import Tokenizer as Ours

    arch = arch_from_config(published.scout(), "config.json")
    for name, data in hf_side_files(arch, metas[1], "tokenizer.model").items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "config.json").write_text(json.dumps(published.new_style(published.scout())))
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), Ours.load(tmp_path)
    assert len(theirs) == 202048 and theirs.bos_token_id == 200000 and theirs.eos_token_id == 200008
    for text in corpus(20_000, seed=3):
        if any(token in text for token in special_tokens()):
            continue  # as text it takes care of its own: tests/batch/front
        expected = metas[0].encode(text, bos=False, eos=False, allowed_special=set(), disallowed_special=())
        assert theirs.encode(text, add_special_tokens=False) == expected == ours.encode(text)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    prompt = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt.startswith("<|begin_of_text|><|header_start|>system<|header_end|>\n\nBe brief.<|eot|>")


def test_a_processor_configuration(scout_tiny):
    """What lies beside a multimodal checkpoint has the classes that this transformers knows."""
    import transformers

    processor = json.loads((scout_tiny / "processor_config.json").read_text())
    assert hasattr(transformers, processor["processor_class"])


@pytest.mark.parametrize(
    ("lines", "said"),
    [(b"", "byte 0 is no token"), (b"\xff\xfe\n", "line 1 is not a token in base64"), (b"!!!! 0\n", "line 1"),
     (b"QQ== 1\n", "line 1 must give a token the rank 0"), (b"QQ==\n", "line 1 is not"),
     (b"QQ== 0\nQQ== 1\n", "a token occurs twice"), (b"QQ== 0 7\n", "line 1 must")],
)  # fmt: skip
def test_other_files_are_refused(lines, said):
    with pytest.raises(CheckpointError, match=said):
        read_ranks(lines, "tokenizer.model")


def small():
    tokens = [bytes([byte]) for byte in range(256)] + [b"ab", b"abc", b"bc"]
    return write_ranks(tokens)


def test_what_tiktoken_would_do_otherwise_is_refused():
    """Merges that are missing, ids with gaps, other special tokens, another kind of model."""
    good = json.loads(tokenizer_json(small()))
    assert tokenizer_model(json.dumps(good)) == small()

    def without_a_merge(t):
        t["model"]["merges"].pop()

    def with_a_gap(t):
        t["model"]["vocab"]["abc"] = 5000

    def other_special(t):
        t["added_tokens"][3]["content"] = "<|other|>"

    def other_kind(t):
        t["model"]["type"] = "WordPiece"

    def no_model(t):
        del t["model"]

    changes = [(without_a_merge, "merges"), (with_a_gap, "gaps"), (other_special, "special tokens"),
               (other_kind, "byte-level BPE"), (no_model, "byte-level BPE")]  # fmt: skip
    for change, said in changes:
        spoiled = json.loads(json.dumps(good))
        change(spoiled)
        with pytest.raises(CheckpointError, match=said) as error:
            tokenizer_model(json.dumps(spoiled))
        assert "tokenizer.model" in error.value.hint


def test_merges_are_every_split():
    assert merges_of([b"a", b"b", b"c", b"ab", b"bc", b"abc"]) == [
        (b"a", b"b"), (b"b", b"c"), (b"a", b"bc"), (b"ab", b"c")
    ]  # fmt: skip
    assert base64.b64encode(b"ab") in small() and sys.byteorder
