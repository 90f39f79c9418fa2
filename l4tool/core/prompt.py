"""What a Llama 4 prompt is made of: special tokens, the pre-tokenizer's pattern, the turns of a conversation.

Facts of llama-models (`models/llama4/tokenizer.py`, `chat_format.py`), with which tests compare them.
"""

from __future__ import annotations

NUM_SPECIAL = 2048
# Llama 4's pre-tokenizer: words with an optional contraction, numbers by threes, punctuation, line ends, spaces.
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
# Turns as Meta's ChatFormat writes them, for checkpoints that come without a template: it has no place for tools.
_MESSAGES = (
    "{%- for message in messages %}"
    "{{- '<|header_start|>' + ('ipython' if message.role == 'tool' else message.role) + '<|header_end|>\n\n' }}"
    "{%- if message.content is string %}{{- message.content }}{%- else %}{%- for part in message.content or [] %}"
    "{%- if part.type == 'image' %}{{- '<|image|>' }}{%- else %}{{- part.text }}{%- endif %}{%- endfor %}{%- endif %}"
    "{%- for call in message.tool_calls or [] %}{{- {'type': 'function', 'name': call.function.name, "
    "'parameters': call.function.arguments} | tojson }}{%- endfor %}"
    "{{- '<|eom|>' if message.role in ('tool', 'ipython') or message.tool_calls else '<|eot|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|header_start|>assistant<|header_end|>\n\n' }}{%- endif %}"
)
TURNS = "{{- bos_token }}" + _MESSAGES
# The template of checkpoints that are made of Meta's files. Tools are told in a system turn, in the form in which the
# model is to call them.
CHAT_TEMPLATE = (
    "{{- bos_token }}"
    "{%- if tools %}{{- '<|header_start|>system<|header_end|>\n\nYou can call these functions. To call one, answer "
    "with nothing but a JSON object for each call: "
    '{"name": function name, "parameters": {argument name: value}}.\n\' }}'
    "{%- for tool in tools %}{{- '\n' }}{{- tool | tojson }}{%- endfor %}{{- '<|eot|>' }}{%- endif %}" + _MESSAGES
)


def special_tokens() -> list[str]:
    """Llama 4's 2048 special tokens in the order of their ids, which follow the base vocabulary."""

    def reserved(group: str, start: int, stop: int) -> list[str]:
        return [f"<|{group}_reserved_special_token_{i}|>" for i in range(start, stop)]

    names = ["begin_of_text", "end_of_text", "fim_prefix", "fim_middle", "fim_suffix"]
    names += ["header_start", "header_end", "eom", "eot", "step"]
    tokens = [f"<|{name}|>" for name in names] + reserved("text_post_train", 0, 6)
    tokens += ["<|python_start|>", "<|python_end|>", "<|finetune_right_pad|>", *reserved("text_post_train", 8, 69)]
    tokens += ["<|image_start|>", "<|image_end|>", *reserved("vision", 0, 2)]
    tokens += ["<|tile_x_separator|>", "<|tile_y_separator|>", *reserved("vision", 2, 6)]
    tokens += ["<|image|>", *reserved("vision", 6, 7), "<|patch|>", *reserved("vision", 7, 1048)]
    tokens += [*reserved("reasoning", 0, 8), "<|reasoning_thinking_start|>", "<|reasoning_thinking_end|>"]
    return tokens + [f"<|reserved_special_token_{i}|>" for i in range(NUM_SPECIAL - len(tokens))]
