"""The checkpoint maker: transformers loads what it writes, and the tokenizer is a Llama 4 one."""

import hashlib
import json
import math
import subprocess
import sys

import pytest
import torch

from converters.arch_io import arch_from_config
from converters.names import hf_rows
from examples import make_checkpoint as maker
from l4tool.core.prompt import SPLIT, special_tokens
from tests import checkpoints


def load(folder):
    from transformers import Llama4ForCausalLM, Llama4ForConditionalGeneration

    config = json.loads((folder / "config.json").read_text())
    kind = Llama4ForConditionalGeneration if config["model_type"] == "llama4" else Llama4ForCausalLM
    return kind.from_pretrained(folder, output_loading_info=True, dtype=torch.bfloat16)


@pytest.mark.parametrize("fixture", ["scout_tiny", "maverick_tiny", "scout_tiny_text"])
def test_transformers_loads_it_without_a_missing_key(request, fixture):
    folder = request.getfixturevalue(fixture)
    model, info = load(folder)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    stored = checkpoints.load(folder)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, stored[name]), name
    with torch.no_grad():
        logits = model(input_ids=torch.arange(40)[None]).logits
    assert logits.shape == (1, 40, 4096) and bool(torch.isfinite(logits).all())
    assert float(logits.float().std()) > 0.1


def test_it_is_deterministic_and_depends_on_the_seed(scout_tiny_text, tmp_path):
    again = checkpoints.make(tmp_path / "again", text_only=True)
    other = checkpoints.make(tmp_path / "other", text_only=True, seed=1)
    for path in scout_tiny_text.iterdir():
        digest = hashlib.sha256(path.read_bytes()).digest()
        assert hashlib.sha256((again / path.name).read_bytes()).digest() == digest, path.name
        differs = hashlib.sha256((other / path.name).read_bytes()).digest() != digest
        assert differs == (path.name.endswith(".safetensors")), path.name


def test_shard_size_changes_files_only(scout_tiny_text, tmp_path):
    one = checkpoints.make(tmp_path / "one", text_only=True, shard_bytes=10**9)
    assert len(checkpoints.shards(one)) == 1 and len(checkpoints.shards(scout_tiny_text)) > 3
    plain, whole = checkpoints.load(scout_tiny_text), checkpoints.load(one)
    assert plain.keys() == whole.keys()
    assert all(torch.equal(whole[name], tensor) for name, tensor in plain.items())


def test_weights_have_outliers_and_uneven_channels(scout_tiny):
    weight = checkpoints.load(scout_tiny)["language_model.model.layers.0.feed_forward.experts.down_proj"][0].float()
    spread = weight.std(0)  # stored [in, out]: one entry for each output channel
    assert float(spread.max() / spread.min()) > 2
    assert float(weight.abs().max() / weight.std()) > 10


def config_of(preset, arch="scout"):
    layers, experts, vocab_size, _ = maker.PRESETS[preset]
    text = maker.text_config(preset, arch, layers, experts, vocab_size)
    return maker.full_config(text, preset, text_only=preset == "mini")


def num_parameters(config):
    return sum(math.prod(row.shape) for row in hf_rows(arch_from_config(config, "config.json")))


def test_mini_is_the_benchmark_model():
    arch = arch_from_config(config_of("mini"), "config.json")
    text = arch.text
    assert arch.vision is None and text.rope_scaling is None and text.attention_chunk_size == 8192
    sizes = (text.hidden_size, text.num_layers, text.num_experts, text.intermediate_size, text.vocab_size)
    assert sizes == (1024, 8, 16, 2048, 16384)
    assert (text.num_heads, text.num_kv_heads, text.head_dim) == (16, 4, 64)
    assert round(num_parameters(config_of("mini")) / 1e6) == 910


def test_scout_width_has_the_real_widths():
    arch = arch_from_config(config_of("scout-width"), "config.json")
    text = arch.text
    widths = (text.hidden_size, text.intermediate_size, text.num_heads, text.num_kv_heads, text.head_dim)
    assert widths == (5120, 8192, 40, 8, 128)
    assert text.rope_scaling is not None and text.rope_scaling.factor == 16.0
    assert 2 * num_parameters(config_of("scout-width")) == pytest.approx(4.66e9, rel=0.01)


def test_special_tokens_are_metas():
    theirs = pytest.importorskip("llama_models.llama4.tokenizer").Tokenizer.get_instance().special_tokens
    assert {token: 200000 + i for i, token in enumerate(special_tokens())} == theirs


TEXTS = [
    "Hello, world! It's 12345 o'clock; WE'LL see.",
    "  two  spaces\n\n\tand tabs\r\nnew line   ",
    "Grüße an Łódź — 你好，世界 👩‍👩‍👧 étude ÀÉÎ",
    "def f(x):\n    return x**2  # comment\n",
    "CamelCaseWord iPhone 3.14 a/b//c\n/",
]


@pytest.mark.parametrize("text", TEXTS)
def test_the_pre_tokenizer_splits_as_metas(scout_tiny, text):
    regex = pytest.importorskip("regex")
    pattern = pytest.importorskip("llama_models.llama4.tokenizer").Tokenizer.O200K_PATTERN
    assert pattern == SPLIT
    from tokenizers import Regex, pre_tokenizers

    split = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    assert [piece for piece, _ in split.pre_tokenize_str(text)] == regex.findall(pattern, text)


def test_tokenizer_in_transformers(scout_tiny):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(scout_tiny)
    config = json.loads((scout_tiny / "config.json").read_text())
    assert len(tokenizer) == config["text_config"]["vocab_size"]
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id == config["text_config"]["bos_token_id"]
        assert tokenizer.decode(ids[1:]) == text
    assert tokenizer.convert_tokens_to_ids("<|patch|>") == config["image_token_index"]
    assert tokenizer.convert_tokens_to_ids("<|image_start|>") == config["boi_token_index"]
    assert len(tokenizer(" there would be a question about the picture")["input_ids"]) < 14
    stop = [tokenizer.convert_tokens_to_ids(t) for t in ("<|end_of_text|>", "<|eom|>", "<|eot|>")]
    assert config["text_config"]["eos_token_id"] == stop


def test_chat_template(scout_tiny):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(scout_tiny)
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]},
        {"role": "tool", "content": "42"},
    ]
    shown = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert shown == (
        "<|begin_of_text|><|header_start|>system<|header_end|>\n\nBe short.<|eot|>"
        "<|header_start|>user<|header_end|>\n\n<|image|>What is this?<|eot|>"
        "<|header_start|>ipython<|header_end|>\n\n42<|eom|>"
        "<|header_start|>assistant<|header_end|>\n\n"
    )


def test_processor_in_transformers(scout_tiny):
    pytest.importorskip("torchvision")
    from transformers import AutoProcessor

    image = torch.zeros(3, 56, 112, dtype=torch.uint8)
    out = AutoProcessor.from_pretrained(scout_tiny)(text="<|image|>hi", images=[image], return_tensors="pt")
    assert out["pixel_values"].shape == (3, 3, 56, 56)
    config = json.loads((scout_tiny / "config.json").read_text())
    assert int((out["input_ids"] == config["image_token_index"]).sum()) == 3 * 4


def test_the_script_itself(tmp_path):
    command = [
        sys.executable,
        maker.__file__,
        str(tmp_path / "m"),
        "--layers",
        "1",
        "--text-only",
        "--shard-size",
        "2MB",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "of random weights" in done.stdout and len(checkpoints.shards(tmp_path / "m")) > 1
