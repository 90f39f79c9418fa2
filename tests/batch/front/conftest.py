"""Real tokenizers for the tests of the front: Meta's ranks, whole or cut off, as tokenizer.json and as tiktoken."""

import base64
import json
from pathlib import Path

import pytest

from tests.meta_chat import import_chat_format

O200K = (
    r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"""
    r"""|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"""
    r"""|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
)
NUM_RANKS = 20_000


def bpe_ranks(num_ranks):
    import llama_models

    ranks = {}
    for line in (Path(llama_models.__file__).parent / "llama4/tokenizer.model").read_bytes().splitlines():
        token, rank = line.split()
        if int(rank) < num_ranks:
            ranks[base64.b64decode(token)] = int(rank)
    return ranks


def write_hf_tokenizer(folder, ranks, special):
    """tokenizer.json and tokenizer_config.json as published checkpoints have them."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    char = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}

    def spell(token):
        return "".join(char[byte] for byte in token)

    merges = []
    for token in sorted(ranks, key=ranks.get):
        pairs = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in ranks and token[i:] in ranks]
        merges += [(spell(a), spell(b)) for a, b in sorted(pairs, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))]
    tokenizer = Tokenizer(models.BPE({spell(t): r for t, r in ranks.items()}, merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(O200K), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    bos = "<|begin_of_text|>"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos}:0 $A:0 {bos}:1 $B:1", special_tokens=[(bos, special[bos])]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": "<|eot|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.fixture(scope="session")
def meta_tokenizer(tmp_path_factory):
    """Meta's tokenizer (tiktoken) over the first NUM_RANKS ranks."""
    from llama_models.llama4.tokenizer import Tokenizer

    path = tmp_path_factory.mktemp("meta") / "tokenizer.model"
    ranks = bpe_ranks(NUM_RANKS)
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()))
    return Tokenizer(path)


@pytest.fixture(scope="session")
def tokenizer_folder(meta_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf")
    write_hf_tokenizer(folder, bpe_ranks(NUM_RANKS), meta_tokenizer.special_tokens)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder):
    from batch.tokenizer import Tokenizer

    return Tokenizer.load(tokenizer_folder)


@pytest.fixture(scope="session")
def hf_tokenizer(tokenizer_folder):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)


@pytest.fixture(scope="session")
def llama4_template():
    """The published template, as transformers ships it."""
    from transformers.models.llama4.processing_llama4 import chat_template

    return chat_template


@pytest.fixture(scope="session")
def meta_chat_format():
    """llama_models' chat_format module, over Pillow instead of torchvision."""
    return import_chat_format()
