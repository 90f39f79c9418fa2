"""Side files of a source by what they are, wherever its layout keeps them."""

from __future__ import annotations

from typing import Any

from converters.fields import parse_json
from converters.reader import Reader
from converters.tokenizer_json import tokenizer_model as to_model
from l4tool.core.errors import CheckpointError


def side_file(reader: Reader, name: str) -> bytes | None:
    """The contents of a side file, copied or made; None where there is none."""
    for path in reader.side_files():
        if path.name == name:
            return path.read_bytes()
    return reader.made_files().get(name)


def side_object(reader: Reader, name: str) -> dict[str, Any]:
    """A side file that holds a JSON object; empty where there is none. Raises CheckpointError."""
    where = reader.path / name
    try:
        found = parse_json((side_file(reader, name) or b"{}").decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not valid JSON: {error}", hint="download this file again") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{where} holds a JSON {type(found).__name__}, not an object")
    return found


def tokenizer_model(reader: Reader) -> bytes:
    """Meta's tokenizer.model: the source's own, or out of its tokenizer.json. Raises CheckpointError without either."""
    own = reader.path / "tokenizer.model"
    if own.is_file():
        return own.read_bytes()
    made = side_file(reader, "tokenizer.json")
    if made is None:
        raise CheckpointError(
            f"{reader.path} has neither tokenizer.model nor tokenizer.json", hint="copy one of them there"
        )
    return to_model(made, str(reader.path / "tokenizer.json"))
