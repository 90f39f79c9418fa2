"""Typed reading of JSON files: a value of the right type and range, or one CheckpointError that names it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from l4tool.core.errors import CheckpointError, InputMissing

MAX_JSON_BYTES = 256 * 2**20
MAX_INT = 2**40
_MISSING: Any = object()


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON file whose top level is an object. Raises InputMissing or CheckpointError naming the file."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path} is larger than any JSON file of a checkpoint")
        value = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputMissing(
            f"{path} does not exist", hint="check that the download of this checkpoint is complete"
        ) from error
    except OSError as error:
        raise InputMissing(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}", hint="download this file again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value


def parse_json(text: str) -> Any:
    """JSON text → value; a name that occurs twice in one object is a ValueError, as later values would win silently."""
    return json.loads(text, object_pairs_hook=_unique)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {twice!r} occurs twice")
    return found


class Fields:
    """One JSON object of a config; every getter checks type and range. `where` names file and object in errors."""

    def __init__(self, values: object, where: str) -> None:
        if not isinstance(values, dict):
            raise CheckpointError(f"{where} must be an object, not {_show(values)}")
        self.values: dict[str, Any] = values
        self.where = where

    def bad(self, name: str, wanted: str, hint: str | None = None) -> CheckpointError:
        """The error for field `name`; for the caller to raise."""
        value = self.values.get(name, _MISSING)
        found = "it is missing" if value is _MISSING else f"not {_show(value)}"
        return CheckpointError(f"{self.where}: {name} must be {wanted}, {found}", hint=hint)

    def get(self, name: str, default: Any = None) -> Any:
        """The raw value; JSON null counts as absent."""
        value = self.values.get(name)
        return default if value is None else value

    def integer(self, name: str, default: int | None = _MISSING, low: int = 1, high: int = MAX_INT) -> Any:
        """An integer in [low, high]; a float without a fraction counts. Absent or null → default, or an error."""
        value = self.get(name)
        if value is None and default is not _MISSING:
            return default
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.bad(name, f"an integer from {low} to {high}")
        return value

    def number(self, name: str, default: float | None = _MISSING, above: float = 0.0, high: float = 1e12) -> Any:
        """A finite number in (above, high]."""
        value = self.get(name)
        if value is None and default is not _MISSING:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.bad(name, "a number")
        if not above < value <= high:  # also refuses NaN
            raise self.bad(name, f"a number above {above:g} and at most {high:g}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """A boolean; old configs write some of them as integers (`attn_temperature_tuning: 4`)."""
        value = self.get(name, default)
        if not isinstance(value, int):
            raise self.bad(name, "true or false")
        return bool(value)

    def string(self, name: str, default: str | None = None) -> str | None:
        value = self.get(name, default)
        if value is not None and not isinstance(value, str):
            raise self.bad(name, "a string")
        return value

    def integers(self, name: str, low: int = 0, high: int = MAX_INT) -> list[int] | None:
        """A list of integers, or None when absent."""
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, list):
            raise self.bad(name, "a list of integers")
        return [self._item(name, item, low, high) for item in value]

    def ids(self, name: str, high: int) -> list[int]:
        """One token id or a list of them; absent → []."""
        value = self.get(name, [])
        return [self._item(name, item, 0, high) for item in (value if isinstance(value, list) else [value])]

    def _item(self, name: str, item: object, low: int, high: int) -> int:
        if isinstance(item, bool):
            item = int(item)
        if not isinstance(item, int) or not low <= item <= high:
            raise self.bad(name, f"integers from {low} to {high}")
        return item

    def only(self, name: str, allowed: Sequence[object], default: object, why: str) -> None:
        """Refuse any value but those this tool computes with."""
        value = self.get(name, default)
        if not any(value == choice and type(value) is type(choice) for choice in allowed):
            wanted = " or ".join(_show(choice) for choice in allowed)
            raise CheckpointError(f"{self.where}: {name} is {_show(value)}; {why} (only {wanted} is supported)")

    def child(self, name: str) -> Fields | None:
        """A nested object, or None when absent."""
        value = self.get(name)
        return None if value is None else Fields(value, f"{self.where}: {name}")


def _show(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"
