"""What Llama 4's tokenizer has beside its vocabulary: the pre-tokenizer's pattern and the special tokens.

Source: Meta's `llama_models/llama4/tokenizer.py`; a tokenizer.model file holds none of it.
"""

from __future__ import annotations

NUM_SPECIAL = 2048
BOS, END_OF_TEXT, EOM, EOT, PAD = "<|begin_of_text|>", "<|end_of_text|>", "<|eom|>", "<|eot|>", "<|finetune_right_pad|>"
STOP_TOKENS = (END_OF_TEXT, EOM, EOT)
IMAGE, IMAGE_START, IMAGE_END, PATCH = "<|image|>", "<|image_start|>", "<|image_end|>", "<|patch|>"

# Words with an optional contraction, numbers by threes, punctuation, line ends, spaces.
_WORD_END = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
SPLIT = "|".join(
    [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+" + _WORD_END,
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*" + _WORD_END,
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)


def special_tokens() -> list[str]:
    """Llama 4's 2048 special tokens in the order of their ids, which follow the base vocabulary."""

    def reserved(group: str, start: int, stop: int) -> list[str]:
        return [f"<|{group}_reserved_special_token_{i}|>" for i in range(start, stop)]

    names = ["begin_of_text", "end_of_text", "fim_prefix", "fim_middle", "fim_suffix"]
    names += ["header_start", "header_end", "eom", "eot", "step"]
    tokens = [f"<|{name}|>" for name in names] + reserved("text_post_train", 0, 6)
    tokens += ["<|python_start|>", "<|python_end|>", PAD, *reserved("text_post_train", 8, 69)]
    tokens += [IMAGE_START, IMAGE_END, *reserved("vision", 0, 2)]
    tokens += ["<|tile_x_separator|>", "<|tile_y_separator|>", *reserved("vision", 2, 6)]
    tokens += [IMAGE, *reserved("vision", 6, 7), PATCH, *reserved("vision", 7, 1048)]
    tokens += [*reserved("reasoning", 0, 8), "<|reasoning_thinking_start|>", "<|reasoning_thinking_end|>"]
    return tokens + [f"<|reserved_special_token_{i}|>" for i in range(NUM_SPECIAL - len(tokens))]


def special_ids(num_base: int) -> dict[str, int]:
    """Special token → id, behind a base vocabulary of `num_base` tokens (200,000 in the published models)."""
    return {token: num_base + place for place, token in enumerate(special_tokens())}


def is_reserved(token: str) -> bool:
    """Whether a special token has no use yet, so that its spelling means nothing."""
    return token.startswith("<|") and "reserved_special_token_" in token
