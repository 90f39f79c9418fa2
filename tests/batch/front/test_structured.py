"""Forms of answers: what is compiled, what is refused, and that whatever a grammar lets through is valid."""

import json
import random
import re

import jsonschema
import numpy as np
import pytest

from batch.grammars import Grammars
from batch.schema import LineError, parse_line
from batch.structured import Form, wanted_form
from batch.tokenizer import Tokenizer

VOCAB = 4096  # more than the tokenizer has, as a padded embedding


@pytest.fixture(scope="module")
def tiny(scout_tiny):
    return Tokenizer.load(scout_tiny)


@pytest.fixture(scope="module")
def grammars(tiny):
    found = Grammars(tiny, VOCAB)
    yield found
    found.close()


@pytest.fixture(scope="module")
def stop_ids(tiny):
    return frozenset({tiny.control_id("<|eot|>"), tiny.control_id("<|eom|>")})


def walk(grammar, tokenizer, stop_ids, seed, max_tokens=600):
    """A random answer, every allowed token equally likely; None when it does not end within max_tokens."""
    draw, mask, ids = random.Random(seed), grammar.start(), []
    row = np.zeros(VOCAB // 32, np.int32)
    for _ in range(max_tokens):
        mask.fill(row)
        allowed = np.unpackbits(row.view(np.uint8), bitorder="little").nonzero()[0]
        assert len(allowed), "nothing is allowed"
        specials = tokenizer.special_ids & set(allowed.tolist())
        assert specials <= stop_ids
        token = int(draw.choice(sorted(specials) if specials and draw.random() < 0.5 else allowed.tolist()))
        assert not mask.is_done and mask.accept(token)
        if token in stop_ids:
            assert mask.is_done
            return tokenizer.decode(ids)
        ids.append(token)
    return None


def form_of(**fields):
    return wanted_form(parse_line({"prompt": "x", **fields}))


def schema_form(schema, **extra):
    return form_of(response_format={"type": "json_schema", "json_schema": {"name": "s", "schema": schema, **extra}})


def obj(**properties):
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


SHORT = {"type": "string", "maxLength": 5}
SCHEMAS = {
    "flat": obj(name=SHORT, age={"type": "integer", "minimum": 0, "maximum": 150}, ok={"type": "boolean"}),
    "unicode": obj(**{"größe 中": {"enum": ["é", "日本", "a\u2028b", '"\\']}, "😀": {"const": "ß"}}),
    "enum": {"enum": ["red", 1, None, True, 2.5, {"a": [1]}, "rot é"]},
    "typed enum": {"type": "string", "enum": ["a", "b"]},
    "const": {"const": "only this"},
    "array": {"type": "array", "items": {"type": "integer", "minimum": -3, "exclusiveMaximum": 4}, "maxItems": 4},
    "nested arrays": {
        "type": "array",
        "minItems": 1,
        "maxItems": 2,
        "items": {
            "type": "array",
            "minItems": 1,
            "maxItems": 2,
            "items": {"type": "array", "items": SHORT, "maxItems": 2},
        },
    },
    "tuple": {"type": "array", "prefixItems": [{"type": "null"}, {"enum": ["a"]}], "items": False, "minItems": 2},
    "optional": {
        "type": "object",
        "properties": {"a": SHORT, "b": {"type": "null"}, "c": {"enum": [1, 2]}},
        "required": ["b"],
    },
    "number": obj(x={"type": "number", "minimum": 2.5, "maximum": 3.5}, y={"type": "number", "exclusiveMinimum": 0}),
    "multiple": {"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 100},
    "lengths": obj(
        a={"type": "string", "minLength": 2, "maxLength": 3}, b={"type": ["string", "null"], "maxLength": 2}
    ),
    "pattern": obj(
        code={"type": "string", "pattern": "^[A-Z]{2}-[0-9]{1,3}$"},
        any={"type": "string", "pattern": "x.{0,3}"},
        no={"type": "string", "pattern": r'[^"\\a]{2}\s?'},
    ),
    "formats": obj(
        d={"type": "string", "format": "date"},
        i={"type": "string", "format": "ipv4"},
        u={"type": "string", "format": "uuid"},
    ),
    "format with a length": {"type": "string", "format": "uri", "minLength": 1, "maxLength": 4},
    "any of": {"anyOf": [{"type": "integer", "minimum": 7, "maximum": 9}, SHORT, {"type": "null"}]},
    "one of types": {"oneOf": [{"type": "boolean"}, {"type": "array", "items": {"type": "null"}, "maxItems": 2}]},
    "one of objects": {
        "oneOf": [{"$ref": "#/$defs/cat"}, {"$ref": "#/$defs/dog"}],
        "$defs": {
            "cat": obj(kind={"const": "cat"}, lives={"enum": [7, 9]}),
            "dog": obj(kind={"enum": ["dog", "hound"]}),
        },
        "discriminator": {"propertyName": "kind"},
    },
    "all of one": {"allOf": [{"$ref": "#/definitions/a"}], "definitions": {"a": obj(v=SHORT)}, "title": "T"},
    "recursive": {
        "$ref": "#/$defs/node",
        "$defs": {
            "node": {
                "type": "object",
                "required": ["v"],
                "additionalProperties": False,
                "properties": {"v": {"enum": [1, 2]}, "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
            }
        },
    },
    "map": {"type": "object", "additionalProperties": {"type": "boolean"}, "maxProperties": 2},
    "property and others": {
        "type": "object",
        "properties": {"a": {"enum": ["x"]}},
        "additionalProperties": {"type": "null"},
        "maxProperties": 2,
    },
    "empty": {"type": "object", "properties": {}, "additionalProperties": False},
    "annotations": {
        "type": "integer",
        "title": "t",
        "description": "d",
        "default": 3,
        "examples": [5],
        "maximum": 9,
        "minimum": 1,
    },
    "defaults that say nothing": {"type": "array", "items": {"type": "null"}, "uniqueItems": False, "maxItems": 2},
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_answer_validates(name, grammars, tiny, stop_ids):
    schema = SCHEMAS[name]
    jsonschema.Draft202012Validator.check_schema(schema)
    grammar = grammars.grammar(schema_form(schema), stop_ids)
    answers = [walk(grammar, tiny, stop_ids, seed) for seed in range(30)]
    ended = [answer for answer in answers if answer is not None]
    assert len(ended) >= 5, "hardly any answer ends"
    for answer in ended:
        jsonschema.Draft202012Validator(schema).validate(json.loads(answer))


PATTERNS = [
    r"^\S{1,3}$", r"\W{2}", r"[^\d]{2}", r"[\w.-]+@x", "^a|b$", r"\.", "[.]", r"\d{3}", "(ab)?c*", r"\/\-", r"[\]a]",
    r"\u00e9", ".{1,4}", r"[^a\s]{2}", r"\s?x", "é+", "[а-я]{2}", "(a|(b|c){2}){1,3}", "x{0}", '[^"]{2}', r"\D\W",
    "[a^]", r"\$[0-9]", "[$]",
]  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_string_matches_its_pattern(pattern, grammars, tiny, stop_ids):
    schema = {"type": "string", "pattern": pattern}
    grammar = grammars.grammar(schema_form(schema), stop_ids)
    ended = [answer for seed in range(25) if (answer := walk(grammar, tiny, stop_ids, seed, 60)) is not None]
    assert ended
    for answer in ended:
        value = json.loads(answer)
        assert re.search(pattern, value, re.ASCII), value  # classes are ECMAScript's
        assert not re.search(r"\s", value) or pattern != r"^\S{1,3}$"


def test_loose_objects(grammars, tiny, stop_ids):
    for form in (
        form_of(response_format={"type": "json_object"}),
        form_of(structured_outputs={"json_object": True}),
        schema_form({"type": "object", "properties": {"a": {"enum": [1]}}}, strict=False),
    ):
        grammar = grammars.grammar(form, stop_ids)
        answers = [walk(grammar, tiny, stop_ids, seed, 200) for seed in range(40)]
        values = [json.loads(answer) for answer in answers if answer is not None]
        assert len(values) >= 5 and all(isinstance(value, dict) for value in values)


def test_choice_regex_and_grammar(grammars, tiny, stop_ids):
    choices = ["yes", "no\n", 'é "quoted" \\', "yes, but"]
    said = {
        walk(grammars.grammar(form_of(structured_outputs={"choice": choices}), stop_ids), tiny, stop_ids, seed)
        for seed in range(60)
    }
    assert said == set(choices)
    regex = grammars.grammar(form_of(structured_outputs={"regex": r"[a-c]{2}-\d{1,2}(é|\.)"}), stop_ids)
    for seed in range(20):
        text = walk(regex, tiny, stop_ids, seed)
        assert text[2] == "-" and set(text[:2]) <= set("abc") and text[3:-1].isdigit() and text[-1] in "é."
    ebnf = 'root ::= "(" root ")" | "x"'
    nested = grammars.grammar(form_of(structured_outputs={"grammar": ebnf}), stop_ids)
    text = next(t for t in (walk(nested, tiny, stop_ids, seed) for seed in range(20)) if t is not None)
    assert text.count("(") == text.count(")") and text.strip("()") == "x"
    as_text = form_of(structured_outputs={"json": json.dumps(SCHEMAS["enum"])})
    assert as_text.source == form_of(structured_outputs={"json": SCHEMAS["enum"]}).source


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({"type": "object", "required": ["a"]}, "'required' with 'a'"),
        ({"type": "string", "not": {"const": "a"}}, "'not'"),
        ({"type": "array", "items": {"type": "integer"}, "uniqueItems": True}, "'uniqueItems'"),
        ({"type": "array", "contains": {"const": 5}}, "'contains'"),
        ({"type": "string", "pattern": "^a+$", "maxLength": 2}, "'pattern' together with a length"),
        ({"type": "string", "pattern": "a$b"}, "in its middle"),
        ({"type": "string", "pattern": 'say "a"'}, "with quotes"),
        ({"type": "string", "pattern": "(?=a)b"}, "with lookaround"),
        ({"type": "string", "pattern": r"a\b"}, "with lookaround"),
        ({"type": "string", "pattern": r"(a)\1"}, "with lookaround"),
        ({"type": "object", "properties": [1]}, "'properties' that is not an object"),
        ({"$defs": 5, "type": "null"}, "'$defs' that is not an object"),
        ({"type": "array", "prefixItems": {}}, "'prefixItems' that is not a list"),
        ({"type": "string", "pattern": r"a\\b"}, "with quotes"),
        ({"type": "string", "pattern": r"a\tb"}, "with quotes"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "may overlap"),
        ({"allOf": [{"type": "integer"}, {"minimum": 3}]}, "without a 'type'"),
        ({"allOf": [obj(a=SHORT), obj(b=SHORT)]}, "'allOf' of several"),
        ({"type": "object", "properties": {"a": {}}, "anyOf": [{"required": ["a"]}]}, "beside 'anyOf'"),
        ({"type": "integer", "enum": [1, "x"]}, "not of 'type'"),
        ({"const": 5, "minimum": 9}, "'minimum' beside 'const'"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"type": "integer"}}, "minimum": 5}, "beside '$ref'"),
        ({"$ref": "http://x/y"}, "only references within"),
        ({"$ref": "#/nope"}, "which is not there"),
        ({"if": {"type": "integer"}, "then": {"minimum": 5}}, "'if'"),
        ({"type": "object", "minProperties": 2}, "'minProperties'"),
        ({"type": "object", "dependentRequired": {"a": ["b"]}}, "'dependentRequired'"),
        ({"minimum": 5}, "without a 'type'"),
        ({"type": "str"}, "'type' 'str'"),
        ({"type": "string", "minimum": 5}, "'minimum' with 'type'"),
        (obj(a=obj(b={"type": "number", "multipleOf": 0.1})), "/properties/a/properties/b"),
        ({"anyOf": []}, "'anyOf' without"),
        ({"enum": []}, "'enum' without"),
        ({"type": "object", "wibble": 1}, "'wibble'"),
    ],
)
def test_what_cannot_be_kept_is_refused(schema, text):
    with pytest.raises(LineError) as caught:
        schema_form(schema)
    assert caught.value.code == "unsupported_schema" and text in caught.value.message


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"structured_outputs": {"regex": "(a"}}, "structured_outputs.regex: it cannot be compiled: Regex parsing"),
        ({"structured_outputs": {"regex": "a{3,1}"}}, "Lower bound is larger"),
        ({"structured_outputs": {"grammar": "root ::= nope"}}, "structured_outputs.grammar: it cannot be compiled"),
    ],
)
def test_what_cannot_be_compiled_is_an_error_of_its_line(fields, text, grammars, stop_ids):
    for _ in range(2):  # also when it comes again
        with pytest.raises(LineError) as caught:
            grammars.grammar(form_of(**fields), stop_ids)
        assert caught.value.code == "invalid_grammar" and text in caught.value.message, caught.value.message


def test_a_hostile_form_costs_its_own_line(grammars, tiny, stop_ids, monkeypatch):
    """What takes too long, too much memory or the compiler's life; afterwards others compile as before."""
    monkeypatch.setattr("batch.grammars.COMPILE_TIMEOUT_S", 3.0)
    deep = "(" * 20_000 + "a" + ")" * 20_000
    wide = "((" + "|".join(f"a{i}.{{0,200}}b" for i in range(2000)) + "){1,500}){1,500}"
    for source in (deep, wide, "(" + "a?" * 20_000 + "){1,1000}"):
        try:
            grammar = grammars.grammar(Form("regex", source, "x"), stop_ids)
        except LineError as error:
            assert error.code == "invalid_grammar"
        else:
            walk(grammar, tiny, stop_ids, 1, 3)
    assert walk(grammars.grammar(Form("regex", "[ab]c", "x"), stop_ids), tiny, stop_ids, 0) in ("ac", "bc")


def test_each_form_is_compiled_once(grammars, stop_ids, monkeypatch):
    asked = []
    compile_form = grammars._compiler.compile
    monkeypatch.setattr(grammars._compiler, "compile", lambda form: asked.append(form) or compile_form(form))
    first = [grammars.grammar(schema_form(obj(once=SHORT)), stop_ids) for _ in range(3)]
    assert len(asked) == 1 and len({id(grammar._compiled) for grammar in first}) == 1


def test_old_forms_are_forgotten(tiny, stop_ids, monkeypatch):
    monkeypatch.setattr("batch.grammars.CACHE_FORMS", 2)
    grammars = Grammars(tiny, VOCAB)
    kept = grammars.grammar(Form("regex", "a0", "x"), stop_ids)
    for place in range(1, 5):
        grammars.grammar(Form("regex", f"a{place}", "x"), stop_ids)
    assert [form.source for form in grammars._known] == ["a3", "a4"]
    assert walk(kept, tiny, stop_ids, 0) == "a0"  # a request that holds it is not concerned
    grammars.close()


def test_a_grammar_travels_to_another_process(grammars, tiny, stop_ids):
    import pickle

    data = pickle.dumps(grammars.grammar(Form("regex", "[xy]z", "x"), stop_ids))
    assert len(data) < 1000
    assert walk(pickle.loads(data), tiny, stop_ids, 0) in ("xz", "yz")


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"min_tokens": 3, "response_format": {"type": "json_object"}}, "min_tokens does not go"),
        ({"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}, "does not go with"),
        ({"structured_outputs": {"json": "{"}}, "not valid JSON"),
        ({"structured_outputs": {"regex": "a?" * 40000}}, "longer than 65,536"),
    ],
)
def test_combinations_that_make_no_sense(fields, text):
    with pytest.raises(LineError, match=text):
        form_of(**fields)


def test_without_the_package_or_an_end(tiny, stop_ids, monkeypatch):
    form = form_of(response_format={"type": "json_object"})
    with pytest.raises(LineError, match="drop ignore_eos"):
        Grammars(tiny, VOCAB).grammar(form, frozenset())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(LineError, match=r"response_format needs the package xgrammar: pip install 'l4tool\[json\]'"):
        Grammars(tiny, VOCAB).grammar(form, stop_ids)


def test_text_is_no_form():
    assert form_of(response_format={"type": "text"}) is None and form_of() is None
