"""The table of request fields in docs/batch-format.md is what the line models say."""

import json
from pathlib import Path

import pytest

from batch.line_models import BODIES, IGNORED_FIELDS, UNSUPPORTED_FIELDS
from batch.schema import LineError, parse_line

DOCS = Path(__file__).resolve().parents[3] / "docs/batch-format.md"
FORMS = {"chat": "chat", "completion": "completion", "short": "short line"}


def table():
    """Every field that is known, and what becomes of it in each form."""
    fields = {form: {f.alias or name for name, f in model.model_fields.items()} for form, model in BODIES.items()}
    names = sorted(set().union(*fields.values(), IGNORED_FIELDS, UNSUPPORTED_FIELDS) - {"refusal", "annotations"})
    rows = [f"| field | {' | '.join(FORMS.values())} |", "|---|---|---|---|"]
    rows += [f"| `{name}` | {' | '.join(state(name, fields[form]) for form in FORMS)} |" for name in names]
    return "\n".join(rows)


def state(name, supported):
    if name in supported:
        return "yes"
    if name in IGNORED_FIELDS:
        return "ignored"
    if name not in UNSUPPORTED_FIELDS:
        return "unknown"
    neutral = " or ".join(f"`{json.dumps(value)}`" for value in UNSUPPORTED_FIELDS[name])
    return f"refused unless {neutral}" if neutral else "refused"


def documented():
    text = DOCS.read_text(encoding="utf-8")
    return text[text.index("| field | chat |") :].split("\n\n", 1)[0]


def test_the_documented_table_is_true():
    assert documented() == table(), "docs/batch-format.md is stale; the right table:\n" + table()


@pytest.mark.parametrize("row", [row.split(" | ") for row in table().splitlines()[2:]], ids=lambda row: row[0])
def test_lines_meet_what_the_table_says(row):
    """A value that no field takes: known fields complain about it, unknown and refused ones by their own code."""
    name, wrong = row[0].strip("| `"), {"no": ["field", "takes", "this"]}
    for form, said in zip(FORMS, row[1:], strict=True):
        said = said.strip(" |")
        body = {"prompt": "x"} if form != "chat" else {"messages": [{"role": "user", "content": "x"}]}
        body[name] = wrong
        urls = {"chat": "/v1/chat/completions", "completion": "/v1/completions"}
        line = body if form == "short" else {"custom_id": "c", "method": "POST", "url": urls[form], "body": body}
        try:
            parse_line(line)
            code = "none"
        except LineError as error:
            code = error.code
        expected = {
            "yes": {"invalid_request", "unknown_field", "none"},
            "ignored": {"none"},
            "unknown": {"unknown_field"},
        }
        assert code in expected.get(said, {"unsupported_field"}), (name, form, said, code)


@pytest.mark.parametrize("code", ["unsupported_endpoint", "unsupported_schema", "invalid_grammar", "grammar_error"])
def test_error_codes_are_documented(code):
    assert f"`{code}`" in DOCS.read_text(encoding="utf-8").split("## Error codes")[1]
