"""tokenizer.model ↔ tokenizer.json, against tiktoken, transformers' converter and l4tool's own tokenizer."""

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batch.tokenizer import Tokenizer as OwnTokenizer
from converters.tiktoken_bpe import merges_of, read_ranks, tokenizer_json, tokenizer_json_of, write_ranks
from converters.tokenizer_json import base_tokens, tokenizer_model
from l4tool.core.errors import CheckpointError
from l4tool.core.prompt import SPLIT, special_ids, special_tokens
from tests.converters.meta_files import tokenizer_bytes, write_folder
from tests.converters.tokenizer_texts import SPECIAL, every_stretch, texts

BYTES = [bytes([byte]) for byte in range(256)]


@pytest.fixture(scope="module")
def meta():
    """Meta's tokenizer: tiktoken with the whole vocabulary."""
    from llama_models.llama4.tokenizer import Tokenizer

    return Tokenizer.get_instance()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("published"))


@pytest.fixture(scope="module")
def plain(folder):
    """l4tool's tokenizer: special tokens in the text stay text."""
    return OwnTokenizer.load(folder)


@pytest.fixture(scope="module")
def hf(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def check(batch, meta, plain, hf):
    """Ids and text of all three, special tokens as text and as tokens."""
    as_text = [plain.encode(text) for text in batch]
    assert as_text == [meta.encode(text, bos=False, eos=False) for text in batch]
    assert hf(batch, add_special_tokens=False, split_special_tokens=True)["input_ids"] == as_text
    as_tokens = hf(batch, add_special_tokens=False)["input_ids"]
    assert as_tokens == [meta.encode(text, bos=False, eos=False, allowed_special="all") for text in batch]
    assert hf(batch)["input_ids"] == [meta.encode(t, bos=True, eos=False, allowed_special="all") for t in batch]
    for text, ids, special in zip(batch, as_text, as_tokens, strict=True):
        assert plain.decode(ids) == meta.decode(ids) == text
        assert b"".join(map(plain.token_bytes, ids)) == text.encode()
        assert plain.decode(special, skip_special=False) == meta.decode(special) == hf.decode(special) == text


def test_mixed_text_equals_tiktoken(meta, plain, hf):
    batch = [*texts(150_000, seed=4), *every_stretch(1, seed=5)]
    assert sum(len(text.encode()) for text in batch) > 200_000
    check(batch, meta, plain, hf)
    assert any(token in text for token in SPECIAL for text in batch)


@pytest.mark.slow
def test_megabytes_of_mixed_text_equal_tiktoken(meta, plain, hf):
    for seed in range(8):
        check([*texts(500_000, seed), *every_stretch(8, seed)], meta, plain, hf)


@pytest.mark.slow
def test_every_character_equals_tiktoken(meta, plain):
    """Both engines' tables of letters, numbers and spaces agree on every code point, alone and between letters."""
    for start in range(0, 0x110000, 0x1000):
        chars = [chr(point) for point in range(start, start + 0x1000) if not 0xD800 <= point < 0xE000]
        for form in ("{}", "a{}A {}1{}!", " {} {}\n{}"):
            batch = [form.replace("{}", char) for char in chars]
            assert [plain.encode(text) for text in batch] == meta.model.encode_ordinary_batch(batch, num_threads=1)


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=200) | st.text("<|eot|>\r\n 'sSA1\t", max_size=60))
def test_any_text_equals_tiktoken(meta, plain, hf, text):
    check([text], meta, plain, hf)


def test_every_token_is_found_and_written_back(meta, plain):
    """Each of the 200,000 tokens that is text by itself gives tiktoken's ids for its text."""
    tokens = read_ranks(tokenizer_bytes())
    sample = random.Random(0).sample(range(len(tokens)), 20_000)
    batch = []
    for index in sample:
        assert plain.token_bytes(index) == tokens[index]
        try:
            batch.append(tokens[index].decode())
        except UnicodeDecodeError:
            continue
    assert [plain.encode(text) for text in batch] == meta.model.encode_ordinary_batch(batch, num_threads=1)


def test_bytes_that_are_no_text_are_decoded_alike(meta, plain, hf):
    rng = random.Random(1)
    for _ in range(200):
        ids = [rng.randrange(200_000) for _ in range(rng.randrange(1, 12))]
        assert plain.decode(ids) == hf.decode(ids) == meta.decode(ids)


def test_the_way_back_is_byte_identical_and_takes_seconds(folder):
    started_s = time.process_time()
    assert tokenizer_model((folder / "tokenizer.json").read_bytes()) == tokenizer_bytes()
    assert time.process_time() - started_s < 15


def test_special_tokens_are_metas(meta, plain):
    assert special_ids(200_000) == meta.special_tokens == plain.control_tokens
    assert len(special_tokens()) == 2048 and plain.vocab_size == meta.n_words == 202_048
    assert meta.O200K_PATTERN == SPLIT


def test_it_is_what_transformers_own_converter_makes(tmp_path):
    from transformers.convert_slow_tokenizer import TikTokenConverter

    path = tmp_path / "tokenizer.model"
    path.write_bytes(tokenizer_bytes(20_000))
    theirs = TikTokenConverter(str(path), pattern=SPLIT, extra_special_tokens=special_tokens()).converted()
    ours, theirs = json.loads(tokenizer_json(path.read_bytes())), json.loads(theirs.to_str())
    assert ours.pop("post_processor") != theirs.pop("post_processor")  # theirs has no <|begin_of_text|>
    assert ours == theirs and list(ours["model"]["vocab"]) == list(theirs["model"]["vocab"])


def tiktoken_of(tokens):
    import tiktoken

    ranks = {token: rank for rank, token in enumerate(tokens)}
    return tiktoken.Encoding("small", pat_str=SPLIT, mergeable_ranks=ranks, special_tokens={})


def own(contents):
    from tokenizers import Tokenizer

    return OwnTokenizer(Tokenizer.from_str(contents), {})


@settings(max_examples=30, deadline=None)
@given(
    tokens=st.lists(st.text("aab", min_size=2, max_size=6), unique=True, max_size=30),
    samples=st.lists(st.text("aab", max_size=60), min_size=20, max_size=20),
)
def test_vocabularies_that_no_training_gives(tokens, samples):
    """Tokens in any order, also such as are made of later ones or of none: tiktoken's ids all the same."""
    base = BYTES + [token.encode() for token in tokens]
    theirs, ours = tiktoken_of(base), own(tokenizer_json_of(base))
    for text in [*samples, *tokens]:
        assert ours.encode(text) == theirs.encode_ordinary(text)
    assert base_tokens(tokenizer_json_of(base)) == base


@pytest.mark.parametrize("num_base", [256, 257, 2048, 5000])
def test_vocabularies_of_other_sizes(num_base):
    data = tokenizer_bytes(num_base)
    contents = tokenizer_json(data)
    ours, theirs = own(contents), tiktoken_of(read_ranks(data))
    assert ours.vocab_size == num_base + 2048
    assert ours.control_id("<|begin_of_text|>") == num_base
    for text in texts(20_000, seed=num_base):
        assert ours.encode(text) == theirs.encode_ordinary(text)
    assert tokenizer_model(contents) == data


# The way back: what tiktoken can express, and what it cannot.


@pytest.fixture
def contents():
    return json.loads(tokenizer_json(tokenizer_bytes(1000)))


def test_older_spellings_of_the_same_tokenizer(contents):
    data = tokenizer_bytes(1000)
    contents["model"]["merges"] = [" ".join(pair) for pair in contents["model"]["merges"]]
    contents["model"]["vocab"] |= special_ids(1000)  # special tokens listed in the vocabulary too
    contents["model"]["continuing_subword_prefix"] = ""
    del contents["post_processor"], contents["truncation"]
    assert tokenizer_model(json.dumps(contents)) == data


def test_only_the_merges_that_matter(contents):
    """A trainer lists one split of each token, the one that happens; with it alone the ids are the same."""
    tokens = read_ranks(tokenizer_bytes(1000))
    seen, merges = set(), []
    for left, right in _last_merges(tokens):
        merges.append([left, right])
        seen.add((left, right))
    assert len(merges) < len(merges_of(tokens))
    contents["model"]["merges"] = merges
    assert tokenizer_model(json.dumps(contents)) == tokenizer_bytes(1000)
    ours, theirs = own(json.dumps(contents)), tiktoken_of(tokens)
    for text in texts(20_000, seed=1):
        assert ours.encode(text) == theirs.encode_ordinary(text)


def _last_merges(tokens):
    """The last merge that tokenizers itself makes for each token: its pieces when the token's own merges are gone."""
    from tokenizers import models

    from l4tool.core.byte_level import spell

    vocab = {spell(token): rank for rank, token in enumerate(tokens)}
    merges = [(spell(tokens[left]), spell(tokens[right])) for left, right in merges_of(tokens)]
    for token in tokens[256:]:
        own_rank = vocab[spell(token)]
        others = [pair for pair in merges if vocab["".join(pair)] < own_rank]
        if len(token) == 2:
            yield list(spell(token))
            continue
        pieces = [piece.value for piece in models.BPE(vocab, others).tokenize(spell(token))]
        assert len(pieces) == 2
        yield pieces


def put(contents, path, value):
    *parents, last = path
    for key in parents:
        contents = contents[key]
    contents[last] = value


def cut(contents, path):
    *parents, last = path
    for key in parents:
        contents = contents[key]
    del contents[last]


REFUSED = {
    "another model": (("model", "type"), "Unigram", "not BPE"),
    "no model": (("model",), None, "no model"),
    "dropout": (("model", "dropout"), 0.1, "dropout"),
    "a prefix": (("model", "continuing_subword_prefix"), "##", "continuing_subword_prefix"),
    "byte fallback": (("model", "byte_fallback"), True, "byte_fallback"),
    "a normalizer": (("normalizer",), {"type": "NFC"}, "normalizer"),
    "no pre-tokenizer": (("pre_tokenizer",), None, "pre-tokenizer"),
    "another pattern": (("pre_tokenizer", "pretokenizers", 0, "pattern"), {"Regex": r"\p{N}{1,3}"}, "pre-tokenizer"),
    "a space in front": (("pre_tokenizer", "pretokenizers", 1, "add_prefix_space"), True, "pre-tokenizer"),
    "another decoder": (("decoder",), {"type": "Metaspace"}, "decoder"),
    "no vocabulary": (("model", "vocab"), None, "model.vocab"),
    "ids that are no numbers": (("model", "vocab", "er"), "258", "model.vocab"),
    "a gap": (("model", "vocab", "er"), 999_999, "no gaps"),
    "an id twice": (("model", "vocab", "er"), 300, "same id"),
    "not spelled in bytes": (("model", "vocab", "中"), 1000, "not spelled in bytes"),
    "an empty token": (("model", "vocab", ""), 1000, "empty"),
    "a token behind the special ones": (("model", "vocab", "zzzzzz"), 1000 + 2048, "no gaps"),
    "no merges": (("model", "merges"), None, "not a list"),
    "a merge of three": (("model", "merges", 5), ["a", "b", "c"], r"merges\[5\]"),
    "a merge of nothing": (("model", "merges", 5), 7, r"merges\[5\]"),
    "a merge of unknown tokens": (("model", "merges", 5), ["zzzz", "zzzz"], r"merges\[5\]"),
    "no special tokens": (("added_tokens",), [], "<.begin_of_text.> .id 1000. is missing"),
    "no list of special tokens": (("added_tokens",), None, "added_tokens"),
    "another name": (("added_tokens", 8, "content"), "<|im_end|>", "id 1008 is '<.im_end.>'"),
    "a name for a reserved one": (("added_tokens", 10, "content"), "<|mine|>", "'<.mine.>'"),
    "one that eats spaces": (("added_tokens", 8, "rstrip"), True, "white space"),
    "another id": (("added_tokens", 8, "id"), 5, "has the id 5"),
    "one too many": (("added_tokens", 2047, "id"), 1000 + 2048, "has the id 3048"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_tiktoken_cannot_express_is_refused(contents, name):
    path, value, message = REFUSED[name]
    put(contents, path, value)
    with pytest.raises(CheckpointError, match=message) as caught:
        tokenizer_model(json.dumps(contents), "there/tokenizer.json")
    assert caught.value.message.startswith("there/tokenizer.json") and caught.value.hint


def test_merges_against_the_order_of_the_ids_are_refused(contents):
    merges = contents["model"]["merges"]
    merges.append(merges.pop(3))
    with pytest.raises(CheckpointError, match="not by rank"):
        tokenizer_model(json.dumps(contents))


def test_a_merge_that_is_missing_is_refused(contents):
    del contents["model"]["merges"][-1]
    with pytest.raises(CheckpointError, match="lacks the pair"):
        tokenizer_model(json.dumps(contents))


def test_a_token_that_only_ignore_merges_finds():
    """b"xyz" has no merges: tiktoken finds it as a whole piece, a tokenizer.json only with ignore_merges."""
    tokens = [*BYTES, b"xyz"]
    contents = json.loads(tokenizer_json_of(tokens))
    assert own(json.dumps(contents)).encode("xyz") == tiktoken_of(tokens).encode_ordinary("xyz") == [256]
    assert tokenizer_model(json.dumps(contents)) == write_ranks(tokens)
    contents["model"]["ignore_merges"] = False
    assert own(json.dumps(contents)).encode("xyz") != [256]
    with pytest.raises(CheckpointError, match="ignore_merges"):
        tokenizer_model(json.dumps(contents))


def test_reserved_tokens_may_be_missing_or_named_otherwise(contents):
    contents["added_tokens"] = contents["added_tokens"][:1144]
    contents["added_tokens"][10]["content"] = "<|reserved_special_token_x|>"
    assert tokenizer_model(json.dumps(contents)) == tokenizer_bytes(1000)


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[]", b"\xff\xfe", b"null", b'{"model": {"a": 1, "a": 2}}', b"[" * 100_000]
)
def test_broken_json_is_one_error(raw):
    with pytest.raises(CheckpointError, match=r"^there/tokenizer.json") as caught:
        tokenizer_model(raw, "there/tokenizer.json")
    assert caught.value.hint


def test_nothing_heavy_is_imported():
    code = """if True:
        import sys, converters.hf_side_files
        bad = {"tiktoken", "transformers", "llama_models", "torch"} & {*sys.modules}
        assert not bad, bad"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
