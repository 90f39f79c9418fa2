"""What lies beside the weights in a Hugging Face folder, for checkpoints that hold it in another form or not at all.

Written as Meta published them with the instruction-tuned models. Meta's own files do not say whether a checkpoint is
instruction-tuned: a pre-trained one gets the same files, chat template and sampling defaults included.
"""

from __future__ import annotations

import json
from typing import Any

from converters.tiktoken_bpe import tokenizer_json
from l4tool.core.arch import Arch, VisionArch
from l4tool.core.errors import CheckpointError
from l4tool.core.prompt import CHAT_TEMPLATE, NUM_SPECIAL

NAMES = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot|>", "pad_token": "<|finetune_right_pad|>"}


def hf_side_files(arch: Arch, tokenizer_model: bytes, where: str) -> dict[str, bytes]:
    """Name → contents: tokenizer, chat template, generation config and, for a multimodal one, the processor's files.

    `tokenizer_model` is tokenizer.model's contents, `where` its name in errors. Raises CheckpointError for one that is
    none, or that has not `arch`'s vocabulary.
    """
    tokenizer = tokenizer_json(tokenizer_model, where)
    size = tokenizer_model.count(b"\n") + (not tokenizer_model.endswith(b"\n")) + NUM_SPECIAL
    if size > arch.text.vocab_size:
        raise CheckpointError(
            f"{where} has {size} tokens with the special ones, the checkpoint {arch.text.vocab_size}",
            hint="the tokenizer is another model's",
        )
    return {"tokenizer.json": tokenizer.encode(), **small_files(arch)}


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
            "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "max_patches": 16, "rescale_factor": 1 / 255,
            "resize_to_max_canvas": False,
        },
        "processor_config.json": {
            "processor_class": "Llama4Processor", "patch_size": vision.patch_size, "image_token": "<|image|>",
            "pixel_shuffle_ratio": vision.pixel_shuffle_ratio, "fake_image_token": "<|image|>",
        },
    }  # fmt: skip
