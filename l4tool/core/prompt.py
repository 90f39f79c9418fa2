"""What a Llama 4 prompt is made of: special tokens, the pre-tokenizer's pattern, the turns of a conversation.

Facts of llama-models (`models/llama4/tokenizer.py`, `chat_format.py`), with which tests compare them.
"""

from __future__ import annotations

NUM_SPECIAL = 2048
BOS, END_OF_TEXT, EOM, EOT, PAD = "<|begin_of_text|>", "<|end_of_text|>", "<|eom|>", "<|eot|>", "<|finetune_right_pad|>"
STOP_TOKENS = (END_OF_TEXT, EOM, EOT)
IMAGE, IMAGE_START, IMAGE_END, PATCH = "<|image|>", "<|image_start|>", "<|image_end|>", "<|patch|>"
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
TURNS = (
    "{{- bos_token }}{%- for message in messages %}"
    "{{- '<|header_start|>' + ('ipython' if message.role == 'tool' else message.role) + '<|header_end|>\n\n' }}"
    "{%- if message.content is string %}{{- message.content }}{%- else %}{%- for part in message.content or [] %}"
    "{%- if part.type == 'image' %}{{- '<|image|>' }}{%- else %}{{- part.text }}{%- endif %}{%- endfor %}{%- endif %}"
    "{%- for call in message.tool_calls or [] %}{{- {'type': 'function', 'name': call.function.name, "
    "'parameters': call.function.arguments} | tojson }}{%- endfor %}"
    "{{- '<|eom|>' if message.role in ('tool', 'ipython') or message.tool_calls else '<|eot|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|header_start|>assistant<|header_end|>\n\n' }}{%- endif %}"
)
# The template of checkpoints that are made of Meta's files: its ChatFormat's `encode_dialog_prompt` with tool calls as
# JSON, token for token, but for two things: characters outside of ASCII in a call's arguments stand as they are, where
# Meta's code writes escapes; and a turn is tokenized as one text, where Meta's code does each of its parts for itself.
# Meta's code has no words for the functions that may be called; they are at the beginning of the system turn, in ours.
# All of it is what `batch/template_bounds.py` knows to be linear in its input.
CHAT_TEMPLATE = r"""{{- bos_token }}
{#- The system turn: the functions, then the system message. #}
{%- set system = none %}
{%- if messages and messages[0]['role'] in ('system', 'developer') %}
    {%- set system = messages[0]['content'] %}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- if tools or system is not none %}
    {{- '<|header_start|>system<|header_end|>\n\n' }}
    {%- if tools %}
        {{- 'You may call the functions below. To call one, answer with a JSON object and nothing else: ' }}
        {{- '{"type": "function", "name": NAME, "parameters": {PARAMETER: VALUE}}. ' }}
        {{- 'Write several calls one after another. If no function helps, answer in plain words.\n\n' }}
        {%- for tool in tools %}
            {{- tool | tojson(indent=4) }}
            {{- '\n\n' }}
        {%- endfor %}
    {%- endif %}
    {%- if system is string %}
        {{- system }}
    {%- elif system is not none %}
        {%- for part in system %}
            {%- if part['type'] == 'text' %}
                {{- part['text'] }}
            {%- else %}
                {{- raise_exception('a system message holds text only') }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|eot|>' }}
{%- endif %}
{#- All other turns. #}
{%- for message in messages %}
    {%- set role = 'ipython' if message['role'] == 'tool' else message['role'] %}
    {%- set role = 'system' if role == 'developer' else role %}
    {%- if role not in ('system', 'user', 'assistant', 'ipython') %}
        {{- raise_exception('roles are system, user, assistant and tool') }}
    {%- endif %}
    {{- '<|header_start|>' + role + '<|header_end|>\n\n' }}
    {%- if message['content'] is string %}
        {{- message['content'] }}
    {%- elif message['content'] is mapping %}
        {{- message['content'] | tojson }}
    {%- else %}
        {%- for part in message['content'] or [] %}
            {%- if part['type'] == 'text' %}
                {{- part['text'] }}
            {%- elif part['type'] in ('image', 'image_url') %}
                {{- '<|image|>' }}
            {%- else %}
                {{- raise_exception('a message holds text and images only') }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {%- for call in message['tool_calls'] or [] %}
        {%- set function = call['function'] or call %}
        {{- '{"type": "function", "name": ' }}
        {{- function['name'] | tojson }}
        {{- ', "parameters": ' }}
        {%- if function['arguments'] is string %}
            {{- function['arguments'] }}
        {%- elif function['arguments'] %}
            {{- function['arguments'] | tojson }}
        {%- else %}
            {{- '{}' }}
        {%- endif %}
        {{- '}' }}
    {%- endfor %}
    {{- '<|eom|>' if role == 'ipython' or message['tool_calls'] else '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|header_start|>assistant<|header_end|>\n\n' }}
{%- endif %}
"""


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


def special_ids(num_base: int) -> dict[str, int]:
    """Special token → id, behind a base vocabulary of `num_base` tokens (200,000 in the published models)."""
    return {token: num_base + place for place, token in enumerate(special_tokens())}


def is_reserved(token: str) -> bool:
    """Whether a special token has no use yet, so that its spelling means nothing."""
    return token.startswith("<|") and "reserved_special_token_" in token
