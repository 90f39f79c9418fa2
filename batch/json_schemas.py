"""Which JSON Schemas a grammar can keep. What it cannot keep is refused, so that no answer breaks its schema silently.

The rules come from what xgrammar does: it overlooks some keywords, and beside `enum`, `$ref` or `anyOf` it overlooks
all others.
"""

from __future__ import annotations

import re
from typing import Any

from batch.schema import LineError

MAX_DEPTH = 64

ANNOTATIONS = frozenset(
    (
        "$anchor", "$comment", "$id", "$schema", "contentEncoding", "contentMediaType", "default", "deprecated",
        "description", "discriminator", "example", "examples", "readOnly", "title", "writeOnly",
    )
)  # fmt: skip
_DEFINITIONS = ("$defs", "definitions")
_OF_TYPE: dict[str, frozenset[str]] = {
    "string": frozenset(("minLength", "maxLength", "pattern", "format")),
    "number": frozenset(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "format")),
    "integer": frozenset(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "format")),
    "array": frozenset(("items", "prefixItems", "minItems", "maxItems")),
    "object": frozenset(("properties", "required", "additionalProperties", "maxProperties")),
    "boolean": frozenset(),
    "null": frozenset(),
}
_OF_ANY_TYPE = frozenset[str]().union(*_OF_TYPE.values())
_PYTHON_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,), "number": (int, float), "integer": (int,), "array": (list,), "object": (dict,),
    "boolean": (bool,), "null": (type(None),),
}  # fmt: skip
_PATTERN_PART = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|.", re.DOTALL)
_ESCAPED_IN_JSON = re.compile(r'["\x00-\x1f]|\\[\\nrtfv0]|\\x[01]|\\u00[01]|\\[xu](?:00)?(?:22|5[cC])')
_NOT_REGULAR = re.compile(r"\\[bBpPkAzZG1-9]|\[.*\\[pP]")
_NO_SPACE = (
    r"[^\s\u0085\u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000\ufeff]"  # \S, which xgrammar takes for ASCII
)
_NEUTRAL = {"uniqueItems": False, "unevaluatedProperties": True, "unevaluatedItems": True, "minProperties": 0,
            "minContains": 0}  # fmt: skip


def enforceable(schema: Any) -> Any:
    """The schema as the grammar takes it, annotations left out. Raises LineError naming what it cannot keep."""
    return _Check(schema).visit(schema, "", 0)


class _Check:
    def __init__(self, root: Any) -> None:
        self.root = root

    def visit(self, schema: Any, path: str, depth: int) -> Any:
        """One schema at `path` ("" is the root), checked and rewritten."""
        if schema is True:
            return True
        if not isinstance(schema, dict):
            raise _cannot(path, "a schema must be an object" if schema is not False else "'false' allows nothing")
        if depth > MAX_DEPTH:
            raise _cannot(path, f"nested deeper than {MAX_DEPTH}")
        kept = {key: value for key, value in schema.items() if key not in ANNOTATIONS and not _is_neutral(key, value)}
        found: dict[str, Any] = {}
        for name in _DEFINITIONS:
            if name in kept:
                inner = _object(kept.pop(name), name, path)
                found[name] = {key: self.visit(v, f"{path}/{name}/{key}", depth + 1) for key, v in inner.items()}
        return found | self._constraints(kept, path, depth)

    def _constraints(self, kept: dict[str, Any], path: str, depth: int) -> dict[str, Any]:
        for key in ("$ref", "const", "enum", "anyOf", "oneOf", "allOf"):
            if key in kept:
                self._only(kept, {key, "type"} if key in ("const", "enum") else {key}, path, f"beside '{key}'")
                return self._alone(key, kept, path, depth)
        if "type" not in kept:
            self._only(kept, set(), path, "without a 'type'")
            return {}
        types = kept["type"] if isinstance(kept["type"], list) else [kept["type"]]
        if not types or any(not isinstance(name, str) or name not in _OF_TYPE for name in types):
            raise _cannot(path, f"'type' {str(kept['type'])[:60]!r}")
        self._only(kept, {"type"}.union(*(_OF_TYPE[name] for name in types)), path, f"with 'type' {kept['type']!r}")
        return self._typed(kept, path, depth)

    def _only(self, kept: dict[str, Any], allowed: set[str], path: str, where: str) -> None:
        for key in kept:
            if key not in allowed:
                known = key in _OF_ANY_TYPE or key in ("type", "enum", "const", "anyOf", "oneOf", "allOf", "$ref")
                raise _cannot(path, f"'{key[:60]}'" + (f" {where}" if known else ""))

    def _alone(self, key: str, kept: dict[str, Any], path: str, depth: int) -> dict[str, Any]:
        """Schemas that are one keyword."""
        value = kept[key]
        if key == "$ref":
            self.resolve(value, path)
            return {key: value}
        if key in ("const", "enum"):
            values = [value] if key == "const" else value
            if not isinstance(values, list) or not values:
                raise _cannot(path, "an 'enum' without values")
            given = kept.get("type", list(_OF_TYPE))
            types = given if isinstance(given, list) else [given]
            if not all(any(_is_a(v, name) for name in types) for v in values):
                raise _cannot(path, f"'{key}' with a value that is not of 'type' {str(given)[:60]}")
            return {key: value}
        if not isinstance(value, list) or not value:
            raise _cannot(path, f"'{key}' without a list of schemas")
        branches = [self.visit(item, f"{path}/{key}/{place}", depth + 1) for place, item in enumerate(value)]
        if key == "allOf":
            if len(branches) > 1:
                raise _cannot(path, "'allOf' of several schemas")
            return dict(branches[0]) if isinstance(branches[0], dict) else {}
        if key == "oneOf" and not self._are_disjoint(value, path):
            raise _cannot(path, "'oneOf' whose schemas may overlap: use 'anyOf'")
        return {"anyOf": branches}

    def _typed(self, kept: dict[str, Any], path: str, depth: int) -> dict[str, Any]:
        """Schemas with a type: what belongs to it, and the schemas inside."""
        if "format" in kept and kept.keys() & {"minLength", "maxLength", "pattern"}:
            del kept["format"]  # an annotation by the standard; the grammar would keep it in place of the others
        if "pattern" in kept and kept.keys() & {"minLength", "maxLength"}:
            raise _cannot(path, "'pattern' together with a length")
        if "pattern" in kept:
            check_pattern(kept["pattern"], path)
            parts = _PATTERN_PART.findall(kept["pattern"])
            kept["pattern"] = "".join(_NO_SPACE if part == "\\S" else part for part in parts)
        names = [*_object(kept.get("properties", {}), "properties", path)]
        required = kept.get("required") or []
        if not isinstance(required, list) or (missing := [name for name in required if name not in names]):
            raise _cannot(path, f"'required' with {str(missing[0])[:60]!r}, which 'properties' lacks")
        for key in ("items", "additionalProperties"):
            if key in kept and not isinstance(kept[key], bool):
                kept[key] = self.visit(kept[key], f"{path}/{key}", depth + 1)
        if "properties" in kept:
            inner = kept["properties"].items()
            kept["properties"] = {k: self.visit(v, f"{path}/properties/{k}", depth + 1) for k, v in inner}
        if "prefixItems" in kept:
            if not isinstance(kept["prefixItems"], list):
                raise _cannot(path, "'prefixItems' that is not a list")
            places = enumerate(kept["prefixItems"])
            kept["prefixItems"] = [self.visit(v, f"{path}/prefixItems/{i}", depth + 1) for i, v in places]
        if "multipleOf" in kept and not _is_a(kept["multipleOf"], "integer"):
            raise _cannot(path, "'multipleOf' a fraction")
        return kept

    def resolve(self, ref: Any, path: str) -> Any:
        """What a local $ref means."""
        if not isinstance(ref, str) or not (ref == "#" or ref.startswith("#/")):
            raise _cannot(path, f"'$ref' {str(ref)[:60]!r}: only references within the schema")
        found = self.root
        for part in ref.split("/")[1:]:
            part = part.replace("~1", "/").replace("~0", "~")
            if not isinstance(found, dict) or part not in found:
                raise _cannot(path, f"'$ref' {ref[:60]!r}, which is not there")
            found = found[part]
        return found

    def _are_disjoint(self, branches: list[Any], path: str) -> bool:
        plain = [self._follow(branch, path) for branch in branches]
        return all(_disjoint(a, b) for place, a in enumerate(plain) for b in plain[place + 1 :])

    def _follow(self, schema: Any, path: str) -> dict[str, Any]:
        for _ in range(MAX_DEPTH):
            if not isinstance(schema, dict):
                return {}
            if "$ref" not in schema:
                return schema
            schema = self.resolve(schema["$ref"], path)
        return {}


def check_pattern(pattern: Any, path: str = "", in_json: bool = True) -> None:
    """What xgrammar overlooks in a pattern, or writes as it is where JSON has to escape it. Raises LineError."""
    parts = _PATTERN_PART.findall(pattern) if isinstance(pattern, str) else []
    if not parts or "^" in parts[1:] or "$" in parts[:-1]:
        raise _cannot(path, "a 'pattern' that is empty or has ^ or $ in its middle")
    if any(_NOT_REGULAR.match(part) for part in parts) or re.search(r"\(\?[^:]", pattern):
        raise _cannot(path, "a 'pattern' with lookaround, word boundaries, back references or Unicode classes")
    if in_json and any(_ESCAPED_IN_JSON.search(part) for part in parts if not part.startswith("[^")):
        raise _cannot(path, "a 'pattern' with quotes, backslashes or control characters")


def _disjoint(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether no value can satisfy both: other types, other values, or objects told apart by a required property."""
    values_a, values_b = _values(a), _values(b)
    if values_a is not None and values_b is not None:
        return not any(_same(x, y) for x in values_a for y in values_b)
    types_a, types_b = _types(a), _types(b)
    if types_a and types_b and not types_a & types_b:
        return True
    if types_a == types_b == {"object"}:
        shared = set(a.get("required") or ()) & set(b.get("required") or ())
        inner_a, inner_b = _dict(a.get("properties")), _dict(b.get("properties"))
        for name in shared & inner_a.keys() & inner_b.keys():
            x, y = inner_a[name], inner_b[name]
            told = isinstance(x, dict) and isinstance(y, dict) and _values(x) is not None and _values(y) is not None
            if told and _disjoint(x, y):
                return True
    return False


def _values(schema: dict[str, Any]) -> list[Any] | None:
    if "const" in schema:
        return [schema["const"]]
    return schema["enum"] if isinstance(schema.get("enum"), list) else None


def _types(schema: dict[str, Any]) -> set[str]:
    found = schema.get("type")
    names = {found} if isinstance(found, str) else set(found) if isinstance(found, list) else set()
    return names | {"integer"} if "number" in names else names


def _same(x: Any, y: Any) -> bool:
    return bool(x == y) and isinstance(x, bool) == isinstance(y, bool)


def _is_a(value: Any, name: Any) -> bool:
    if isinstance(value, bool):
        return bool(name == "boolean")
    return isinstance(name, str) and isinstance(value, _PYTHON_TYPES.get(name, ()))


def _is_neutral(key: str, value: Any) -> bool:
    return key in _NEUTRAL and type(value) is type(_NEUTRAL[key]) and value == _NEUTRAL[key]


def _object(value: Any, name: str, path: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _cannot(path, f"'{name}' that is not an object")
    return value


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _cannot(path: str, what: str) -> LineError:
    at = path if len(path) <= 120 else "…" + path[-119:]
    return LineError("unsupported_schema", f"the schema{' at ' + at if at else ''} has what cannot be kept: {what}")
