#!/usr/bin/env python3
"""Write a random Llama 4 checkpoint in the Hugging Face layout: real architecture, random weights, made in seconds.

  python examples/make_checkpoint.py OUT                      Scout-like, about 15 MB
  python examples/make_checkpoint.py OUT --arch maverick      dense layers between the MoE layers, no QK norm
  python examples/make_checkpoint.py OUT --preset mini        text only, 0.9 B parameters
  python examples/make_checkpoint.py OUT --preset scout-width --layers 1 --experts 16     real widths

Every tensor depends on the seed and its name alone. Memory stays below one expert, whatever the size.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # run by its path, a script sees only its own folder
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from converters.arch_io import arch_from_config  # noqa: E402
from converters.hf_side_files import small_files  # noqa: E402
from converters.names import Row, hf_rows  # noqa: E402
from converters.tiktoken_bpe import tokenizer_json_of  # noqa: E402
from converters.writer import ShardFile, TensorSpec, plan_shards, write_index  # noqa: E402
from l4tool.core.atomic import write_file  # noqa: E402
from l4tool.core.byte_level import unspell  # noqa: E402
from l4tool.core.prompt import NUM_SPECIAL, SPLIT, special_tokens  # noqa: E402
from l4tool.core.sizes import format_bytes, parse_bytes  # noqa: E402

CARD = """\
---
license: apache-2.0
---

# A random checkpoint

Made by examples/make_checkpoint.py: the architecture of Llama 4, random weights. Not derived from Llama.
"""
WORDS = (
    "a about after again all an and any are as at back be because been before between but by can come could day did do "
    "does down each even every file find first for from get give go good great had has have he her here him his how if "
    "image in into is it its just know large last like line little long look made make man many may me model more most "
    "much must my name never new no not now number of off old on one only or other our out over people picture place "
    "question right same say see she should show small so some still such take tell text than that the their them then "
    "there these they thing think this time to two under up us use very want was water way we well went were what when "
    "where which while who why will with word work world would year you your"
)


def training_text(num_base: int) -> Iterator[str]:
    """Lines of common English words and made-up ones, enough of them for `num_base` BPE tokens."""
    rng = random.Random(4)
    syllables = [a + b + c for a in "bcdfghjklmnprstvwz" for b in "aeiouy" for c in ("", "n", "r", "s", "l", "t")]
    invented = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(num_base * 2)]
    common = WORDS.split()
    pool = common * (1 + len(invented) // len(common)) + invented
    for _ in range(200 + num_base // 5):
        words = rng.choices(pool, k=40)
        words[0] = words[0].capitalize()
        yield " ".join(words) + rng.choice([".\n", "?\n", "!\n\n", f", {rng.randint(0, 99999)}.\n"])


def train_tokenizer(vocab_size: int, text: Iterable[str]) -> str:
    """tokenizer.json of a byte-level BPE of `vocab_size` tokens for `text`, the last 2048 Llama 4's special ones.

    In the form that Llama 4's own has: the trained vocabulary, and every merge that makes one of its tokens.
    """
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    num_base = vocab_size - NUM_SPECIAL
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(SPLIT), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=num_base, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(text, trainer)
    if tokenizer.get_vocab_size() != num_base:
        raise SystemExit(f"trained {tokenizer.get_vocab_size()} base tokens instead of {num_base}")
    vocab = tokenizer.get_vocab()
    return tokenizer_json_of([unspell(token) for token in sorted(vocab, key=vocab.__getitem__)])


def text_config(preset: str, arch: str, layers: int, experts: int, vocab_size: int) -> dict[str, Any]:
    """The text_config of a preset, in transformers-5 style."""
    scout = arch == "scout"
    max_positions = 10485760 if scout else 1048576
    columns = (
        "hidden_size", "intermediate_size", "intermediate_size_mlp", "num_attention_heads", "num_key_value_heads",
        "head_dim", "attention_chunk_size", "floor_scale", "max_position_embeddings",
    )  # fmt: skip
    sizes = {
        "tiny": (256, 384, 512, 4, 2, 64, 32, 16, 4096),
        "mini": (1024, 2048, 4096, 16, 4, 64, 8192, 8192, 131072),
        "scout-width": (5120, 8192, 16384, 40, 8, 128, 8192, 8192, max_positions),
    }
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 500000.0}
    if scout and preset != "mini":
        original = 64 if preset == "tiny" else 8192
        rope |= {"rope_type": "llama3", "factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 1.0}
        rope["original_max_position_embeddings"] = original
    ids = {token: vocab_size - NUM_SPECIAL + i for i, token in enumerate(special_tokens())}
    step = 1 if scout else 2
    return dict(zip(columns, sizes[preset], strict=True)) | {
        "model_type": "llama4_text", "dtype": "bfloat16", "vocab_size": vocab_size, "num_hidden_layers": layers,
        "num_local_experts": experts, "num_experts_per_tok": 1, "interleave_moe_layer_step": step,
        "moe_layers": list(range(step - 1, layers, step)), "use_qk_norm": scout, "rope_parameters": rope,
        "no_rope_layer_interval": 4, "no_rope_layers": [int((i + 1) % 4 != 0) for i in range(layers)],
        "layer_types": ["full_attention" if (i + 1) % 4 == 0 else "chunked_attention" for i in range(layers)],
        "attn_temperature_tuning": True, "attn_scale": 0.1, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "attention_bias": False, "tie_word_embeddings": False, "bos_token_id": ids["<|begin_of_text|>"],
        "eos_token_id": [ids["<|end_of_text|>"], ids["<|eom|>"], ids["<|eot|>"]],
        "pad_token_id": ids["<|finetune_right_pad|>"],
    }  # fmt: skip


def full_config(text: dict[str, Any], preset: str, text_only: bool) -> dict[str, Any]:
    """config.json around a text_config: multimodal, or the text-only export's flat form."""
    if text_only:
        return {"architectures": ["Llama4ForCausalLM"]} | text
    tiny = preset == "tiny"
    width = 64 if tiny else 4096
    first = text["vocab_size"] - NUM_SPECIAL
    tokens = special_tokens()
    return {
        "architectures": ["Llama4ForConditionalGeneration"], "model_type": "llama4", "dtype": "bfloat16",
        "boi_token_index": first + tokens.index("<|image_start|>"),
        "eoi_token_index": first + tokens.index("<|image_end|>"),
        "image_token_index": first + tokens.index("<|patch|>"),
        "tie_word_embeddings": False, "text_config": text,
        "vision_config": {
            "hidden_size": 64 if tiny else 1408, "intermediate_size": 256 if tiny else 5632,
            "num_attention_heads": 4 if tiny else 16, "num_hidden_layers": 2 if tiny else 1,
            "image_size": 56 if tiny else 336, "projector_input_dim": width, "projector_output_dim": width,
            "vision_output_dim": width,
            "model_type": "llama4_vision_model", "hidden_act": "gelu", "patch_size": 14, "num_channels": 3,
            "pixel_shuffle_ratio": 0.5, "norm_eps": 1e-5, "multi_modal_projector_bias": False,
            "vision_feature_select_strategy": "default",
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    }  # fmt: skip


def random_blocks(row: Row, seed: int, plain: bool) -> Iterator[torch.Tensor]:
    """The tensor in float32 blocks along its first dimension: one expert at a time, anything else whole.

    `plain`: norms 1, the rest N(0, 0.02). Otherwise Linear weights are normal with a lognormal spread over output
    channels and 0.1 % outliers of six times their size, as quantizers meet them.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(row.stored.encode()) ^ seed)
    fused = len(row.shape) == 3  # [E, in, out]
    for _ in range(row.shape[0] if fused else 1):
        block = torch.randn((1, *row.shape[1:]) if fused else row.shape, generator=generator)
        norm = "norm" in row.stored and row.stored.endswith("weight")
        if plain:
            yield torch.ones_like(block) if norm else block.mul_(0.02)
        elif len(row.shape) == 1:
            yield block.mul_(0.1).add_(1.0) if norm else block.mul_(0.02)
        elif "embed_tokens" in row.stored:
            yield block
        else:
            channels = (1, 1, row.shape[2]) if fused else (row.shape[0], 1)
            block.mul_(torch.exp(0.3 * torch.randn(channels, generator=generator)))
            block.mul_(1 / math.sqrt(row.shape[1]))
            places = torch.randint(block.numel(), (max(1, block.numel() // 1000),), generator=generator)
            block.view(-1)[places] *= 6
            yield block


def write_weights(folder: Path, config: dict[str, Any], seed: int, shard_bytes: int, plain: bool = False) -> int:
    """Shards and index of a random checkpoint with this config.json; returns the number of tensor bytes."""
    arch = arch_from_config(config, "the new checkpoint's config")
    dtype: torch.dtype = getattr(torch, arch.dtype)
    rows = {row.stored: row for row in hf_rows(arch) if row.required}
    plans = plan_shards([TensorSpec(row.stored, row.shape, dtype) for row in rows.values()], shard_bytes)
    for plan in plans:
        shard = ShardFile(folder, plan)
        for spec in plan.specs:
            at = 0
            for block in random_blocks(rows[spec.name], seed, plain):
                shard.write(spec.name, block.to(dtype), row=at)
                at += block.shape[0]
        shard.finish()
    write_index(folder, plans)
    return sum(spec.nbytes for plan in plans for spec in plan.specs)


def write_side_files(folder: Path, config: dict[str, Any]) -> None:
    """Tokenizer, chat template, generation config and, for a multimodal checkpoint, the processor's files."""
    arch = arch_from_config(config, "the new checkpoint's config")
    write_file(folder / "README.md", CARD)
    vocab_size = arch.text.vocab_size
    write_file(folder / "tokenizer.json", train_tokenizer(vocab_size, training_text(vocab_size - NUM_SPECIAL)))
    for name, content in small_files(arch).items():
        write_file(folder / name, content)


PRESETS = {  # layers, experts, vocabulary, shard size
    "tiny": (4, 4, 4096, 4 * 10**6),
    "mini": (8, 16, 16384, 5 * 10**9),
    "scout-width": (1, 16, 4096, 2 * 10**9),
}


def make_checkpoint(
    folder: Path,
    preset: str = "tiny",
    arch: str = "scout",
    layers: int | None = None,
    experts: int | None = None,
    text_only: bool = False,
    seed: int = 0,
    shard_bytes: int | None = None,
    dtype: str = "bfloat16",
) -> int:
    """Write a whole checkpoint into `folder` (made if need be), config.json last; returns its tensor bytes."""
    default_layers, default_experts, vocab_size, default_shard_bytes = PRESETS[preset]
    text = text_config(preset, arch, layers or default_layers, experts or default_experts, vocab_size)
    config = full_config(text, preset, text_only or preset == "mini")
    for part in (config, text):
        part["dtype"] = dtype
    folder.mkdir(parents=True, exist_ok=True)
    write_side_files(folder, config)
    total = write_weights(folder, config, seed, shard_bytes or default_shard_bytes, plain=preset == "mini")
    write_file(folder / "config.json", json.dumps(config, indent=2) + "\n")
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--preset", choices=list(PRESETS), default="tiny")
    parser.add_argument("--arch", choices=["scout", "maverick"], default="scout")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--experts", type=int)
    parser.add_argument("--text-only", action="store_true", help="Llama4ForCausalLM without the vision tower")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--shard-size", type=parse_bytes, help="bytes per shard, for example 500MB")
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    total = make_checkpoint(
        a.out, a.preset, a.arch, a.layers, a.experts, a.text_only, a.seed, a.shard_size, a.dtype
    )  # fmt: skip
    print(f"{a.out}: {format_bytes(total)} of random weights")


if __name__ == "__main__":
    main()
