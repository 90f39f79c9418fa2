"""The fields of a request line, as pydantic models: strict, and unknown fields are errors. `schema.py` uses them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

MAX_MESSAGES = 10_000
MAX_TOOLS = 128
MAX_BIASES = 1024
MAX_CHOICES = 1000
MAX_STOP = 16
MAX_TOP_LOGPROBS = 20
MAX_N = 128

ENDPOINTS = {"/v1/chat/completions": "chat", "/v1/completions": "completion"}

# Accepted and without effect here: bookkeeping of OpenAI's service, nothing that changes the text.
IGNORED_FIELDS = frozenset(
    {
        "metadata",
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
    "annotations": ([],),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "modalities": (["text"],),
    "prediction": (),
    "reasoning_effort": (),
    "refusal": (),
    "stream": (False,),
    "stream_options": (),
    "suffix": ("",),
    "verbosity": (),
    "web_search_options": (),
}
UNSUPPORTED_IN_MESSAGES = ("annotations", "audio", "function_call", "refusal")
# What to write instead of an unsupported field; otherwise: leave it out.
INSTEAD = {
    "function_call": "not supported: use tool_choice, and tool_calls in messages",
    "functions": "not supported: use tools",
    "guided_choice": 'not supported: use "structured_outputs": {"choice": …}',
    "guided_grammar": 'not supported: use "structured_outputs": {"grammar": …}',
    "guided_json": 'not supported: use response_format, or "structured_outputs": {"json": …}',
    "guided_regex": 'not supported: use "structured_outputs": {"regex": …}',
    "stream": "results are lines of a file; leave it out",
    "stream_options": "results are lines of a file; leave it out",
}


# Lists fail fast: an error for each of a million wrong items would take gigabytes.
class StrictModel(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class JsonSchema(StrictModel):
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(StrictModel):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(StrictModel):
    """vLLM's field: exactly one of these."""

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    regex: Annotated[str, Field(min_length=1)] | None = None
    choice: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=MAX_CHOICES)] | None = (
        None
    )
    grammar: Annotated[str, Field(min_length=1)] | None = None
    json_object: Literal[True] | None = None


_Penalty = Annotated[float, Field(ge=-2, le=2)]
_Bias = Annotated[float, Field(ge=-100, le=100)]
_TokenKey = Annotated[str, Field(pattern=r"^[0-9]{1,10}$")]


class SamplingFields(StrictModel):
    """The fields of a line that steer sampling; None means: not given, the command's options decide."""

    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | Annotated[list[str], Field(fail_fast=True)] | None = None
    stop_token_ids: Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(max_length=64)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_N)] = 1
    ignore_eos: bool = False
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    logit_bias: Annotated[dict[_TokenKey, _Bias], Field(max_length=MAX_BIASES)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] = 0
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None


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
    Annotated[str, Tag("#str")] | Annotated[list[_Part], Field(fail_fast=True), Tag("#list")],
    Discriminator(_is_text),
]


class CalledFunction(StrictModel):
    name: Annotated[str, Field(min_length=1)]
    arguments: str


class CalledTool(StrictModel):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(StrictModel):
    """`content` may be missing only beside `tool_calls`."""

    role: Literal["system", "developer", "user", "assistant", "tool", "ipython"]
    content: _Content | None = None
    name: str | None = None
    tool_calls: Annotated[list[CalledTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_call_id: str | None = None


class Function(StrictModel):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(StrictModel):
    type: Literal["function"]
    function: Function


class ToolFields(StrictModel):
    """The fields of a chat that are about tools; a template is given `tools` as they stand in the line."""

    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool = True


class ChatBody(SamplingFields, ToolFields):
    model: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None


_TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(fail_fast=True)]
_Prompt = Annotated[
    Annotated[str, Tag("#str")] | Annotated[_TokenIds, Tag("#list")],
    Discriminator(_is_text),
]


class CompletionBody(SamplingFields):
    model: str | None = None
    prompt: _Prompt
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    parse_special: bool = False


_Accepted = Annotated[
    Annotated[str, Tag("#str")] | Annotated[list[str], Field(min_length=1, max_length=MAX_CHOICES), Tag("#list")],
    Discriminator(_is_text),
]
_Task = Annotated[str, Field(min_length=1, max_length=100)]


class ShortLine(SamplingFields, ToolFields):
    """`answer` and `task` are for `eval`; `batch` lets them pass, so that one file serves both."""

    id: str | int | None = None
    model: str | None = None
    prompt: _Prompt | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)] | None = None
    images: Annotated[list[Annotated[str, Field(min_length=1)]], Field(fail_fast=True)] | None = None
    raw: bool = False
    parse_special: bool = False
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    answer: _Accepted | None = None
    task: _Task | None = None


class Envelope(StrictModel):
    """`answer` and `task` as in the short form."""

    custom_id: str
    method: Literal["POST"]
    url: str
    body: dict[str, Any]
    answer: _Accepted | None = None
    task: _Task | None = None


class ReferenceFields(StrictModel):
    """What `eval` takes beside a request: the answers that are right, the first of them the reference."""

    answer: _Accepted
    task: _Task | None = None


class TextLine(StrictModel):
    """A line of `eval` without a request: text whose tokens are scored."""

    text: Annotated[str, Field(min_length=1)]
    id: str | int | None = None
    task: _Task | None = None


BODIES: dict[str, type[StrictModel]] = {"chat": ChatBody, "completion": CompletionBody, "short": ShortLine}
