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
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from batch.requests import ImageTiles
from batch.schema import ImageRef, LineError, Turn
from batch.template import RENDER_TIMEOUT_S, TIMEOUT_CHARS_PER_S, TemplateFailure, TemplateRefusal, make_renderer
from batch.tokenizer import Tokenizer, read_json_object
from batch.tools import call_arguments
from l4tool.core.errors import CheckpointError
from l4tool.core.prompt import TURNS

MAX_GROWTH_CHARS = 1 << 20  # what a template may add to the text of the request
IMAGE_TOKEN = "<|image|>"

# Noncharacters first, then private use: the first one that the request does not contain is the breaker.
_BREAKERS = [chr(code) for code in (*range(0xFDD0, 0xFDF0), *range(0xF0000, 0xF1000))]


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
        source = TURNS if template is None else template
        self._knows = {word for word in ("tools", "tool_calls") if re.search(rf"\b{word}\b", source)}
        try:
            self._renderer = make_renderer(source, datetime.now())
        except TemplateFailure as error:
            raise CheckpointError(f"the chat template is not valid: {error}") from None
        self._risky = _risky_pattern(tokenizer)
        if tokens_per_tile is not None:
            names = ("image_start", "image_end", "tile_x_separator", "tile_y_separator", "image", "patch")
            self._image_ids = {name: tokenizer.control_id(f"<|{name}|>") for name in names}
        try:
            self.encode([Turn("user", ("Hello",))], [])
        except LineError as error:
            raise CheckpointError(f"the chat template cannot render a plain user message: {error.message}") from error

    def encode(
        self, turns: Sequence[Turn], images: Sequence[ImageTiles], tools: Sequence[dict[str, Any]] = ()
    ) -> list[int]:
        """Conversation → prompt ids up to the assistant's turn; `images` in the order of the parts. LineError."""
        breaker = _unused_breaker(turns, tools)
        rendered = self.render(turns, breaker, tools)
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

    def render(self, turns: Sequence[Turn], breaker: str, tools: Sequence[dict[str, Any]] = ()) -> str:
        """The template's text, with `breaker` inside every special token that user text spells. Raises LineError."""
        asked = {"tools"} if tools else set()
        asked |= {"tool_calls"} if any(turn.tool_calls for turn in turns) else set()
        if asked - self._knows:  # it would leave them out without a word
            raise LineError(
                "template_error", f"the checkpoint's chat template has no place for {min(asked - self._knows)}"
            )
        messages = [self._message(turn, breaker) for turn in turns]
        text_chars = sum(len(text) for text in _texts(turns, tools))
        variables = {
            "messages": messages,
            # templates test for None, as transformers passes it
            "tools": self._guarded(list(tools), breaker) if tools else None,
            "documents": None,
            "add_generation_prompt": True,
            **self.tokenizer.named_tokens,
        }
        limit_chars = 4 * text_chars + MAX_GROWTH_CHARS
        timeout_s = RENDER_TIMEOUT_S + text_chars / TIMEOUT_CHARS_PER_S
        try:
            return self._renderer.render(variables, limit_chars, timeout_s)
        except TemplateRefusal as error:
            raise LineError("template_error", f"the chat template refuses the conversation: {error}") from None
        except TemplateFailure as error:
            raise LineError("template_error", f"the chat template fails: {error}") from None

    def _message(self, turn: Turn, breaker: str) -> dict[str, Any]:
        def guarded(text: str) -> str:
            return str(self._guarded(text, breaker))

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
        if turn.tool_calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call_arguments(call)}}
                for call in turn.tool_calls
            ]
            message["tool_calls"] = self._guarded(message["tool_calls"], breaker)
        if turn.tool_call_id is not None:
            message["tool_call_id"] = guarded(turn.tool_call_id)
        return message

    def _guarded(self, value: Any, breaker: str) -> Any:
        """A JSON value with the breaker in every string that could begin a special token."""
        if isinstance(value, str):
            return self._risky.sub(lambda match: match.group() + breaker, value)
        if isinstance(value, list):
            return [self._guarded(item, breaker) for item in value]
        if isinstance(value, dict):
            return {self._guarded(key, breaker): self._guarded(item, breaker) for key, item in value.items()}
        return value

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


def _texts(turns: Sequence[Turn], tools: Sequence[dict[str, Any]]) -> list[str]:
    """All of a line's own text that the template is given."""
    texts = [text for turn in turns for text in (*turn.parts, turn.name, turn.tool_call_id) if isinstance(text, str)]
    texts += [text for turn in turns for call in turn.tool_calls for text in (call.id, call.name, call.arguments)]
    return [*texts, json.dumps(list(tools), ensure_ascii=False)] if tools else texts


def _unused_breaker(turns: Sequence[Turn], tools: Sequence[dict[str, Any]]) -> str:
    texts = _texts(turns, tools)
    for breaker in _BREAKERS:
        if not any(breaker in text for text in texts):
            return breaker
    raise LineError("invalid_request", "the text uses every noncharacter of Unicode")
