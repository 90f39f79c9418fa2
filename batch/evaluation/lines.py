"""Lines of `eval`: a request of `batch` with the answers that are right, or text. In: ScoredRequests; out: lines."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from batch.jsonl import RawLine
from batch.line_models import ReferenceFields, TextLine
from batch.prepare import Gate, LineInfo, LinePreparer, Prepared
from batch.requests import Choice, PreparedRequest, ScoredRequest, ScoredResult
from batch.schema import LineError, is_openai, validate
from l4tool.core.prompt import END_OF_TEXT, EOT

_REFERENCE = ("answer", "task")
_REQUESTS = ("answer", "prompt", "messages", "images")


@dataclass
class _Taken:
    """What `eval` knows of a line beside its request. Without `accepted` the line is text."""

    task: str | None = None
    accepted: tuple[str, ...] = ()

    def request(self, value: Any) -> Any:
        """The request in a parsed line, without what belongs to `eval`. Raises LineError."""
        if not isinstance(value, dict):
            return value  # which is no request either
        if isinstance(value.get("task"), str):
            self.task = value["task"][:100]  # so that error lines have it, too
        if value.get("text") is not None and not is_openai(value):
            if both := [name for name in _REQUESTS if value.get(name) is not None]:
                raise LineError("invalid_request", f"'text' is scored as it is; it does not go with '{both[0]}'")
            line = validate(TextLine, {key: item for key, item in value.items() if item is not None}, "")
            return {"prompt": line.text, "raw": True, "id": line.id}
        if value.get("answer") is None:
            raise LineError(
                "no_answer", "give 'answer', a string or a list of accepted strings, or a line with only 'text'"
            )
        given = {key: value[key] for key in _REFERENCE if value.get(key) is not None}
        answer = validate(ReferenceFields, given, "").answer
        self.accepted = (answer,) if isinstance(answer, str) else tuple(answer)
        return {key: item for key, item in value.items() if key not in _REFERENCE}


class ScoredPreparer:
    """Makes ScoredRequests; requests are prepared by `requests`, as for `batch`."""

    def __init__(self, requests: LinePreparer) -> None:
        self._requests = requests
        self._tokenizer = requests.chat.tokenizer
        # A turn ends with one token, a completion with the other.
        self._ends = {"chat": self._tokenizer.control_id(EOT), "completion": self._tokenizer.control_id(END_OF_TEXT)}
        self._context = requests.arch.text.max_position_embeddings

    def prepare(self, raw: RawLine, gate: Gate | None = None) -> Prepared:
        """RawLine → Prepared with a ScoredRequest; never raises for what a line contains."""
        taken = _Taken()
        prepared = self._requests.prepare(raw, gate, taken.request)
        info = replace(prepared.info, task=taken.task)
        if prepared.request is None:
            return replace(prepared, info=info)
        try:
            return Prepared(info, self._scored(info, prepared.request, taken))
        except LineError as error:
            return Prepared(info, error=error)

    def waits_for_the_web(self, raw: RawLine) -> bool:
        return self._requests.waits_for_the_web(raw)

    def close(self) -> None:
        self._requests.close()

    def _scored(self, info: LineInfo, request: PreparedRequest, taken: _Taken) -> ScoredRequest:
        prompt = request.prompt
        if taken.accepted:
            reference = [*self._tokenizer.encode(taken.accepted[0]), self._ends[info.endpoint]]
        else:
            prompt, reference = prompt[:1], prompt[1:]  # behind begin_of_text, where there is such a token
        if not reference:
            raise LineError("invalid_request", "the text has no token to score")
        if len(prompt) + len(reference) > self._context:
            message = (
                f"prompt and answer have {len(prompt):,} + {len(reference):,} tokens; the context {self._context:,}"
            )
            raise LineError("prompt_too_long", message)
        greedy = replace(request.sampling, temperature=0.0, logprobs=None)
        return ScoredRequest(
            request.key, prompt, greedy, request.images, request.stop, grammar=request.grammar,
            reference=tuple(reference), accepted=taken.accepted,
        )  # fmt: skip


class ScoreWriter:
    """Builds output lines. `figures.py` reads them."""

    def success(self, info: LineInfo, result: ScoredResult) -> dict[str, Any]:
        """The line of a result without an error: sums over its tokens, in nats."""
        request, scores = result.request, result.scores
        assert request is not None
        line = _head(info)
        if result.choices:
            line |= _answer(request, result.choices[0])
        line |= {"tokens": scores.tokens, "nll": _short(scores.nll[0])}
        if len(scores.nll) > 1:
            line |= {
                "kl": _short(scores.kl), "kl_max": _short(scores.kl_max), "same_top": scores.same_top,
                "kl_bins": {str(number): count for number, count in sorted(scores.kl_bins.items())},
            }  # fmt: skip
            other = {} if result.other is None else _answer(request, result.other)
            line["against"] = {**other, "nll": _short(scores.nll[1])}
        return line

    def error(self, info: LineInfo, code: str, message: str) -> dict[str, Any]:
        """The line of a line that could not be scored."""
        text = message.encode("utf-8", "replace").decode("utf-8")
        return {**_head(info), "error": {"code": code, "message": text}}


def _head(info: LineInfo) -> dict[str, Any]:
    line: dict[str, Any] = {"id": info.id, "line": info.number}
    return line if info.task is None else {**line, "task": info.task}


def _answer(request: ScoredRequest, choice: Choice) -> dict[str, Any]:
    return {"answer": choice.text, "correct": request.is_right(choice.text), "finish_reason": choice.finish_reason}


def _short(value: float) -> float:
    return float(f"{value:.9g}")
