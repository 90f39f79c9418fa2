"""The fields of a request line, as pydantic models: strict, and unknown fields are errors. `schema.py` uses them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

MAX_MESSAGES = 10_000
MAX_STOP = 16
MAX_TOP_LOGPROBS = 20
MAX_N = 128

ENDPOINTS = {"/v1/chat/completions": "chat", "/v1/completions": "completion"}

# Accepted and without effect here: bookkeeping of OpenAI's service, nothing that changes the text.
IGNORED_FIELDS = frozenset(
    {
        "metadata",
        "parallel_tool_calls",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)
# Known fields that are not supported: their neutral values pass, anything else is an error. null always passes.
UNSUPPORTED_FIELDS: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": (),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "stream": (False,),
    "stream_options": (),
    "suffix": ("",),
    "tool_calls": ([],),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}
UNSUPPORTED_IN_MESSAGES = ("audio", "function_call", "tool_calls")


class StrictModel(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class SamplingFields(StrictModel):
    """The fields of a line that steer sampling; None means: not given, the command's options decide."""

    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(max_length=64)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_N)] = 1
    ignore_eos: bool = False


class TextPart(StrictModel):
    type: Literal["text", "input_text"]
    text: str


class ImageUrl(StrictModel):
    url: Annotated[str, Field(min_length=1)]
    detail: Literal["auto", "low", "high"] | None = None


class ImageUrlPart(StrictModel):
    type: Literal["image_url"]
    image_url: ImageUrl


class ImagePart(StrictModel):
    type: Literal["image"]
    image: Annotated[str, Field(min_length=1)]


_PART_TAGS = {"text": "#text", "input_text": "#text", "image_url": "#url", "image": "#image"}


def _part_tag(value: Any) -> str | None:
    kind = value.get("type") if isinstance(value, dict) else None
    return _PART_TAGS.get(kind) if isinstance(kind, str) else None


def _is_text(value: Any) -> str:
    return "#str" if isinstance(value, str) else "#list"


# Tags begin with "#" so that error paths can leave them out.
_Part = Annotated[
    Annotated[TextPart, Tag("#text")]
    | Annotated[ImageUrlPart, Tag("#url")]
    | Annotated[ImagePart, Tag("#image")],
    Discriminator(_part_tag),
]  # fmt: skip
_Content = Annotated[
    Annotated[str, Tag("#str")] | Annotated[list[_Part], Tag("#list")],
    Discriminator(_is_text),
]


class Message(StrictModel):
    role: Literal["system", "developer", "user", "assistant", "tool", "ipython"]
    content: _Content
    name: str | None = None
    tool_call_id: str | None = None


class ChatBody(SamplingFields):
    model: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None


_TokenIds = list[Annotated[int, Field(ge=0)]]
_Prompt = Annotated[
    Annotated[str, Tag("#str")] | Annotated[_TokenIds, Tag("#list")],
    Discriminator(_is_text),
]


class CompletionBody(SamplingFields):
    model: str | None = None
    prompt: _Prompt
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    parse_special: bool = False


class ShortLine(SamplingFields):
    id: str | int | None = None
    model: str | None = None
    prompt: _Prompt | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    images: list[Annotated[str, Field(min_length=1)]] | None = None
    raw: bool = False
    parse_special: bool = False
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None


class Envelope(StrictModel):
    custom_id: str
    method: Literal["POST"]
    url: Literal["/v1/chat/completions", "/v1/completions"]
    body: dict[str, Any]


BODIES: dict[str, type[StrictModel]] = {"chat": ChatBody, "completion": CompletionBody, "short": ShortLine}
