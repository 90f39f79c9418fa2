"""What lies beside the weights in a Hugging Face folder, for checkpoints that hold it in another form or not at all.

Written as Meta published them with the instruction-tuned models. Meta's own files do not say whether a checkpoint is
instruction-tuned: a pre-trained one gets the same files, chat template and sampling defaults included.
"""

from __future__ import annotations

import json
from typing import Any

from converters.tiktoken_bpe import read_ranks, tokenizer_json_of
from l4tool.core.arch import Arch, VisionArch
from l4tool.core.errors import CheckpointError
from l4tool.core.prompt import (
    BOS,
    CHAT_TEMPLATE,
    EOT,
    IMAGE,
    IMAGE_END,
    IMAGE_START,
    NUM_SPECIAL,
    PAD,
    PATCH,
    STOP_TOKENS,
    special_ids,
)  # fmt: skip

NAMES = {"bos_token": BOS, "eos_token": EOT, "pad_token": PAD}
MAX_TILES = 16  # of one picture, the global one not counted (Meta's `max_num_chunks`)


def hf_side_files(arch: Arch, tokenizer_model: bytes, where: str = "tokenizer.model") -> dict[str, bytes]:
    """Name → contents: tokenizer, chat template, generation config and, for a multimodal one, the processor's files.

    `tokenizer_model` is tokenizer.model's contents, `where` its name in errors. Raises CheckpointError for one that is
    none, or that does not fit `arch` (`check_fits`).
    """
    tokens = read_ranks(tokenizer_model, where)
    check_fits(arch, len(tokens), where)
    return {"tokenizer.json": tokenizer_json_of(tokens).encode(), **small_files(arch)}


def small_files(arch: Arch) -> dict[str, bytes]:
    """All of them but the tokenizer."""
    t = arch.text
    files: dict[str, Any] = {
        "tokenizer_config.json": NAMES | {
            "tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": ["input_ids", "attention_mask"],
            "model_max_length": t.max_position_embeddings, "clean_up_tokenization_spaces": False,
        },
        "special_tokens_map.json": NAMES,
        "generation_config.json": {
            "bos_token_id": t.bos_token_id, "eos_token_id": list(t.eos_token_ids), "pad_token_id": t.pad_token_id,
            "do_sample": True, "temperature": 0.6, "top_p": 0.9,
        },
    }  # fmt: skip
    if arch.vision is not None:
        files |= _processor_files(arch.vision)
    made = {name: (json.dumps(content, indent=2) + "\n").encode() for name, content in files.items()}
    return made | {"chat_template.jinja": CHAT_TEMPLATE.encode()}


def _processor_files(vision: VisionArch) -> dict[str, Any]:
    side = {"height": vision.image_size, "width": vision.image_size}
    return {
        "preprocessor_config.json": {
            "image_processor_type": "Llama4ImageProcessorFast", "processor_class": "Llama4Processor", "size": side,
            "do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True, "resample": 2,
            "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "max_patches": MAX_TILES, "rescale_factor": 1 / 255,
            "resize_to_max_canvas": False,
        },
        "processor_config.json": {
            "processor_class": "Llama4Processor", "patch_size": vision.patch_size, "image_token": IMAGE,
            "pixel_shuffle_ratio": vision.pixel_shuffle_ratio, "fake_image_token": IMAGE,
        },
    }  # fmt: skip


def check_fits(arch: Arch, num_base: int, where: str) -> None:
    """A tokenizer of `num_base` + 2048 tokens against the config: room for all of them, and the same special ids.

    Raises CheckpointError; `where` names the tokenizer's file.
    """
    text, ids = arch.text, special_ids(num_base)
    if num_base + NUM_SPECIAL > text.vocab_size:
        raise CheckpointError(
            f"{where} has {num_base:,} tokens and {NUM_SPECIAL:,} special ones, the model's vocab_size is "
            f"{text.vocab_size:,}",
            hint="give the tokenizer.model that was downloaded with these weights",
        )
    expected = [("bos_token_id", text.bos_token_id, BOS), ("pad_token_id", text.pad_token_id, PAD)]
    if arch.vision is not None:
        expected += [
            ("boi_token_index", arch.boi_token_id, IMAGE_START),
            ("eoi_token_index", arch.eoi_token_id, IMAGE_END),
            ("image_token_index", arch.image_token_id, PATCH),
        ]
    wrong = [(name, value, f"{token} is {ids[token]}") for name, value, token in expected
             if value is not None and value != ids[token]]  # fmt: skip
    stops = [ids[token] for token in STOP_TOKENS]
    wrong += [("eos_token_id", value, f"the stop tokens are {stops}")
              for value in text.eos_token_ids if value not in stops]  # fmt: skip
    if wrong:
        name, value, token = wrong[0]
        raise CheckpointError(
            f"the config's {name} is {value}; in {where} {token}",
            hint="give the tokenizer.model that was downloaded with these weights",
        )
