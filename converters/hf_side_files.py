"""Everything beside the weights and config.json that a Hugging Face folder made from Meta's files needs.

The contents are those of the published Instruct models (Llama-4-Scout-17B-16E-Instruct and the Maverick one). Nothing
in Meta's files says whether a checkpoint is the pre-trained or the Instruct model, so both get the same files: with a
pre-trained one the chat template and the sampling values are there and mean nothing.
"""

from __future__ import annotations

import json
from typing import Any

from converters.chat_template import CHAT_TEMPLATE
from converters.llama4_tokens import BOS, EOT, IMAGE, IMAGE_END, IMAGE_START, NUM_SPECIAL, PAD, PATCH, STOP_TOKENS
from converters.llama4_tokens import special_ids as ids_behind
from converters.tiktoken_file import read_tokens
from converters.tokenizer_json import tokenizer_json_of
from l4tool.core.arch import Arch, VisionArch
from l4tool.core.errors import CheckpointError

MAX_TILES = 16  # of one picture, the global one not counted (Meta's `max_num_chunks`)
NAMED_TOKENS = {"bos_token": BOS, "eos_token": EOT, "pad_token": PAD}


def hf_side_files(arch: Arch, tokenizer_model: bytes, where: str = "tokenizer.model") -> dict[str, bytes]:
    """File name → contents, from the architecture and the bytes of Meta's tokenizer.model.

    tokenizer.json, tokenizer_config.json, special_tokens_map.json, chat_template.jinja, generation_config.json and, for
    a checkpoint with a vision tower, preprocessor_config.json and processor_config.json. Raises CheckpointError for a
    broken tokenizer.model, and where it does not fit `arch`; `where` names it in errors.
    """
    tokens = read_tokens(tokenizer_model, where)
    check_fits(arch, len(tokens), where)
    return {"tokenizer.json": tokenizer_json_of(tokens), **config_files(arch, len(tokens))}


def config_files(arch: Arch, num_base: int) -> dict[str, bytes]:
    """`hf_side_files` without tokenizer.json; `num_base`: tokens before the special ones."""
    ids = ids_behind(num_base)
    objects: dict[str, dict[str, Any]] = {
        "tokenizer_config.json": NAMED_TOKENS | {
            "tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": ["input_ids", "attention_mask"],
            "model_max_length": arch.text.max_position_embeddings, "clean_up_tokenization_spaces": False,
        },
        "special_tokens_map.json": NAMED_TOKENS,
        "generation_config.json": {
            "bos_token_id": ids[BOS], "eos_token_id": [ids[token] for token in STOP_TOKENS], "pad_token_id": ids[PAD],
            "do_sample": True, "temperature": 0.6, "top_p": 0.9,
        },
    }  # fmt: skip
    if arch.vision is not None:
        objects |= _processor(arch.vision)
    files = {name: (json.dumps(value, indent=2) + "\n").encode() for name, value in objects.items()}
    return files | {"chat_template.jinja": CHAT_TEMPLATE.encode()}


def _processor(vision: VisionArch) -> dict[str, dict[str, Any]]:
    """What transformers' Llama4Processor and Llama4ImageProcessor are made from (the latter needs torchvision)."""
    return {
        "preprocessor_config.json": {
            "image_processor_type": "Llama4ImageProcessorFast", "processor_class": "Llama4Processor",
            "size": {"height": vision.image_size, "width": vision.image_size}, "max_patches": MAX_TILES,
            "do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True, "resample": 2,
            "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "rescale_factor": 1 / 255, "resize_to_max_canvas": False,
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
    text, ids = arch.text, ids_behind(num_base)
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
