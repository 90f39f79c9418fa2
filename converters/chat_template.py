"""Llama 4's prompt format as a jinja chat template, for checkpoints that come from Meta's files.

Every turn is `<|header_start|>ROLE<|header_end|>`, two line ends, the text, `<|eot|>`. Tool results have the role
`ipython`; they and assistant turns that call tools end in `<|eom|>`. That much is Meta's `ChatFormat`
(`llama_models/llama4/chat_format.py`, `encode_dialog_prompt` with tool calls as JSON), token for token, but for two
things: characters outside of ASCII in a call's arguments stand as they are, where Meta's code writes \\u escapes; and a
turn is tokenized as one text, where Meta's code does each of its parts and calls for itself.
Meta's code has no words for the functions that may be called; they stand at the beginning of the system turn, in ours.

The template does nothing but what `batch/template_bounds.py` knows to be linear in its input.
"""

from __future__ import annotations

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
