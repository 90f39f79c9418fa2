"""A checkpoint's chat template: jinja2's sandbox, and where it runs.

A template whose work is linear in its input (`template_bounds`), as the published ones are, renders here. Any other
renders in a child process that may be stopped (`template_process`): no list of forbidden operations is ever complete.
"""

from __future__ import annotations

import json
import time
from datetime import datetime
from typing import Any, Protocol

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

RENDER_TIMEOUT_S = 5.0
TIMEOUT_CHARS_PER_S = 4_000_000  # long requests get more time


class TemplateFailure(Exception):
    """The template does not work, or would take too much time or memory; the message says why."""


class TemplateRefusal(Exception):
    """raise_exception() in a template: the template's own words about a conversation it does not take."""


class Renderer(Protocol):
    """Something that renders one template. Thread-safe."""

    def render(self, variables: dict[str, Any], limit_chars: int, timeout_s: float) -> str:
        """The template's text. `variables` are plain JSON values. Raises TemplateFailure, TemplateRefusal."""

    def close(self) -> None:
        """Free what it holds."""


def make_renderer(source: str, now: datetime) -> Renderer:
    """The renderer for a template; `now` is its one date for the whole run. Raises TemplateFailure (its syntax)."""
    from batch.template_bounds import is_bounded
    from batch.template_process import ChildRenderer

    environment = make_environment(now)
    try:
        environment.parse(source)  # no more than that: compiling computes constants
    except (jinja2.TemplateError, RecursionError, ValueError) as error:
        raise TemplateFailure(str(error) or type(error).__name__) from None
    if is_bounded(environment, source):
        return LocalRenderer(source, now)
    return ChildRenderer(source, now)


def make_environment(now: datetime) -> ImmutableSandboxedEnvironment:
    """The sandbox, with `now` as the date that templates ask for."""
    environment = _Environment()
    environment.globals["strftime_now"] = now.strftime
    return environment


class LocalRenderer:
    """Renders in this process. Loops and strings that grow are not stopped here."""

    def __init__(self, source: str, now: datetime) -> None:
        try:
            self._template = make_environment(now).from_string(source)
        except (jinja2.TemplateError, RecursionError, ValueError, MemoryError) as error:
            raise TemplateFailure(str(error) or type(error).__name__) from None

    def render(self, variables: dict[str, Any], limit_chars: int, timeout_s: float) -> str:
        """See Renderer."""
        deadline_s = time.monotonic() + timeout_s
        pieces, size = [], 0
        try:
            for piece in self._template.generate(**variables):
                pieces.append(piece)
                size += len(piece)
                if size > limit_chars or time.monotonic() > deadline_s:
                    raise jinja2.TemplateError("it writes too much or takes too long")
        except _Refused as error:
            raise TemplateRefusal(str(error)) from None
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError,
                RecursionError, MemoryError) as error:  # fmt: skip
            raise TemplateFailure(str(error)[:500] or type(error).__name__) from None
        return "".join(pieces)

    def close(self) -> None:
        """Nothing to free."""


class _GenerationTag(Extension):
    """transformers' {% generation %} … {% endgeneration %}, which marks text for training: here just its body."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox as transformers sets it up, without what makes long strings out of small numbers."""

    intercepted_binops = frozenset(["*", "**", "%"])

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationTag])
        self.filters["tojson"] = _tojson
        self.globals["raise_exception"] = _raise_exception
        del self.globals["lipsum"]
        for name in ("center", "format", "wordwrap"):
            del self.filters[name]

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
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
    """What raise_exception() raises."""


def _raise_exception(message: str) -> None:
    raise _Refused(message)
