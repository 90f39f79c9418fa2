"""Messages → token ids: the checkpoint's own chat template in jinja2's sandbox, special tokens only from the template.

How user text stays text. A breaker (a character that the request does not contain) is put after the first character
of everything in user text that could begin a special token. The template renders, the result is split at the special
tokens that are still whole (those can only be the template's own), the breaker is taken out, and each piece between
two special tokens is encoded as plain text. For text without such spellings this is by construction what
`tokenizer(template.render(messages))` gives.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from batch.requests import ImageTiles
from batch.schema import ImageRef, LineError, Turn
from batch.tokenizer import Tokenizer, read_json_object
from l4tool.core.errors import CheckpointError

RENDER_TIMEOUT_S = 5.0
MAX_GROWTH_CHARS = 1 << 20  # what a template may add to the text of the request
IMAGE_TOKEN = "<|image|>"

# Llama 4's turn format, for checkpoints that come without a template.
DEFAULT_TEMPLATE = (
    "{{- bos_token }}{%- for message in messages %}"
    "{{- '<|header_start|>' + ('ipython' if message.role == 'tool' else message.role) + '<|header_end|>\n\n' }}"
    "{%- if message.content is string %}{{- message.content }}{%- else %}{%- for part in message.content %}"
    "{%- if part.type == 'image' %}{{- '<|image|>' }}{%- else %}{{- part.text }}{%- endif %}{%- endfor %}{%- endif %}"
    "{{- '<|eom|>' if message.role in ('tool', 'ipython') else '<|eot|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|header_start|>assistant<|header_end|>\n\n' }}{%- endif %}"
)

# Noncharacters first, then private use: the first one that the request does not contain is the breaker.
_BREAKERS = [chr(code) for code in (*range(0xFDD0, 0xFDF0), *range(0xF0000, 0xF1000))]


class _GenerationTag(Extension):
    """transformers' {% generation %} … {% endgeneration %}, which marks text for training: here just its body."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox with a deadline and a ceiling on strings that a template multiplies or pads."""

    intercepted_binops = frozenset(["*", "**", "%"])

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationTag])
        self.filters["tojson"] = _tojson
        self.globals["raise_exception"] = _raise_exception
        for name in ("center", "format", "wordwrap"):  # these make long strings out of small numbers
            del self.filters[name]

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        deadline_s = context.get("l4tool_deadline_s")
        if deadline_s is not None and time.monotonic() > deadline_s:
            raise jinja2.TemplateError("it takes too long")
        if getattr(function, "__name__", "") in ("ljust", "rjust", "center", "zfill", "expandtabs", "format"):
            raise jinja2.TemplateError(f"str.{function.__name__} is not allowed in a chat template")
        return super().call(context, function, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if not _harmless(operator, left, right):
            raise jinja2.TemplateError(f"'{operator}' on these values is not allowed in a chat template")
        return super().call_binop(context, operator, left, right)


def _harmless(operator: str, left: Any, right: Any) -> bool:
    """Whether `*`, `**` or `%` stays small: numbers within bounds, or a short string repeated a few times."""
    if isinstance(left, int | float) and isinstance(right, int | float):
        return operator != "**" or (abs(left) <= 2**32 and abs(right) <= 64)
    if operator != "*":
        return False
    count, text = (left, right) if isinstance(left, int) else (right, left)
    return isinstance(count, int) and isinstance(text, str) and count * len(text) <= 10_000


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None,
            sort_keys: bool = False) -> str:  # fmt: skip
    """The filter as transformers defines it (no HTML escapes)."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Refused(jinja2.TemplateError):
    """raise_exception() in a template: the template's own words about a conversation it does not take."""


def _raise_exception(message: str) -> None:
    raise _Refused(message)


def find_template(folder: Path) -> str | None:
    """The checkpoint's chat template: chat_template.jinja, chat_template.json, tokenizer_config.json; else None."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        found = read_json_object(folder / name).get("chat_template")
        if isinstance(found, list):
            named = {item.get("name"): item.get("template") for item in found if isinstance(item, dict)}
            found = named.get("default")
        if found is not None:
            if not isinstance(found, str):
                raise CheckpointError(f"{folder / name}: chat_template is not a string")
            return found
    return None


class ChatFormat:
    """Encodes conversations for one checkpoint. Thread-safe.

    `tokens_per_tile` and the tile tokens are looked up only for a checkpoint with a vision tower (`vision=True`).
    """

    def __init__(self, tokenizer: Tokenizer, template: str | None, tokens_per_tile: int | None = None) -> None:
        self.tokenizer = tokenizer
        self.tokens_per_tile = tokens_per_tile
        now = datetime.now()
        environment = _Environment()
        environment.globals["strftime_now"] = now.strftime  # one date for the whole run
        try:
            self._template = environment.from_string(DEFAULT_TEMPLATE if template is None else template)
        except (jinja2.TemplateError, RecursionError) as error:
            raise CheckpointError(f"the chat template is not valid: {error}") from error
        self._risky = _risky_pattern(tokenizer)
        if tokens_per_tile is not None:
            names = ("image_start", "image_end", "tile_x_separator", "tile_y_separator", "image", "patch")
            self._image_ids = {name: tokenizer.control_id(f"<|{name}|>") for name in names}
        try:
            self.encode([Turn("user", ("Hello",))], [])
        except LineError as error:
            raise CheckpointError(f"the chat template cannot render a plain user message: {error.message}") from error

    def encode(self, turns: Sequence[Turn], images: Sequence[ImageTiles]) -> list[int]:
        """Conversation → prompt ids up to the assistant's turn; `images` in the order of the parts. LineError."""
        breaker = _unused_breaker(turns)
        rendered = self.render(turns, breaker)
        ids: list[int] = []
        left = iter(images)
        used = 0
        for place, piece in enumerate(self.tokenizer.split_control(rendered)):
            if not piece:
                continue
            if place % 2 == 0:
                ids += self.tokenizer.encode(piece.replace(breaker, ""))
            elif piece == IMAGE_TOKEN and used < len(images):
                ids += self.image_ids(next(left).grid)
                used += 1
            elif piece == IMAGE_TOKEN:
                raise LineError("template_error", "the chat template shows more images than the line has")
            else:
                ids.append(self.tokenizer.control_tokens[piece])
        if used != len(images):
            raise LineError("template_error", f"the chat template shows {used} of the line's {len(images)} images")
        return ids

    def encode_raw(self, text: str, parse_special: bool) -> list[int]:
        """A completion's prompt: begin_of_text, then the text; special tokens in it only with `parse_special`."""
        bos = self.tokenizer.bos_token
        if not parse_special:
            ids = self.tokenizer.encode(text)
        else:
            ids = []
            for place, piece in enumerate(self.tokenizer.split_control(text)):
                if piece:
                    ids += [self.tokenizer.control_tokens[piece]] if place % 2 else self.tokenizer.encode(piece)
        start = self.tokenizer.control_tokens.get(bos) if bos else None
        return ids if start is None or ids[:1] == [start] else [start, *ids]

    def render(self, turns: Sequence[Turn], breaker: str) -> str:
        """The template's text, with `breaker` inside every special token that user text spells. Raises LineError."""
        messages = [self._message(turn, breaker) for turn in turns]
        text_chars = sum(len(part) for turn in turns for part in turn.parts if isinstance(part, str))
        deadline_s = time.monotonic() + RENDER_TIMEOUT_S
        limit_chars = 4 * text_chars + MAX_GROWTH_CHARS
        pieces, size = [], 0
        try:
            for piece in self._template.generate(
                messages=messages,
                tools=None,  # templates test for None, as transformers passes it
                documents=None,
                add_generation_prompt=True,
                l4tool_deadline_s=deadline_s,
                **self.tokenizer.named_tokens,
            ):
                pieces.append(piece)
                size += len(piece)
                if size > limit_chars or time.monotonic() > deadline_s:
                    raise jinja2.TemplateError("it writes too much or takes too long")
        except _Refused as error:
            raise LineError("template_error", f"the chat template refuses the conversation: {error}") from None
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError,
                RecursionError, MemoryError) as error:  # fmt: skip
            raise LineError("template_error", f"the chat template fails: {error or type(error).__name__}") from None
        return "".join(pieces)

    def _message(self, turn: Turn, breaker: str) -> dict[str, Any]:
        def guarded(text: str) -> str:
            return self._risky.sub(lambda match: match.group() + breaker, text)

        content: str | list[dict[str, str]]
        if any(isinstance(part, ImageRef) for part in turn.parts):
            content = [
                {"type": "image"} if isinstance(part, ImageRef) else {"type": "text", "text": guarded(part)}
                for part in turn.parts
            ]
        else:
            content = "".join(guarded(part) for part in turn.parts if isinstance(part, str))
        message: dict[str, Any] = {"role": turn.role, "content": content}
        if turn.name is not None:
            message["name"] = guarded(turn.name)
        return message

    def image_ids(self, grid: tuple[int, int]) -> list[int]:
        """One picture's tokens, as Meta's ChatFormat and transformers' Llama4Processor write them."""
        ids, (rows, columns) = self._image_ids, grid
        patches = [ids["patch"]] * (self.tokens_per_tile or 0)
        tokens = [ids["image_start"]]
        if rows * columns > 1:
            for _ in range(rows):
                for column in range(columns):
                    tokens += patches
                    if column < columns - 1:
                        tokens.append(ids["tile_x_separator"])
                tokens.append(ids["tile_y_separator"])
        return [*tokens, ids["image"], *patches, ids["image_end"]]


def _risky_pattern(tokenizer: Tokenizer) -> re.Pattern[str]:
    """First characters of special tokens, where the second follows or the string may go on in the next one."""
    seconds: dict[str, set[str]] = {}
    for token in tokenizer.control_tokens:
        if len(token) > 1:
            seconds.setdefault(token[0], set()).add(token[1])
    if not seconds:
        return re.compile("(?!)")
    choices = (
        f"{re.escape(first)}(?=[{re.escape(''.join(sorted(following)))}]|\\s*\\Z)"
        for first, following in sorted(seconds.items())
    )
    return re.compile("|".join(choices))


def _unused_breaker(turns: Sequence[Turn]) -> str:
    for breaker in _BREAKERS:
        if not any(breaker in text for turn in turns for text in (*turn.parts, turn.name) if isinstance(text, str)):
            return breaker
    raise LineError("invalid_request", "the text uses every noncharacter of Unicode")
