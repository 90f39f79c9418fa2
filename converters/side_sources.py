"""Side files of a source by what they are, wherever its layout keeps them."""

from __future__ import annotations

from converters.reader import Reader
from converters.tokenizer_json import tokenizer_model as to_model
from l4tool.core.errors import CheckpointError


def side_file(reader: Reader, name: str) -> bytes | None:
    """The contents of a side file, copied or made; None where there is none."""
    for path in reader.side_files():
        if path.name == name:
            return path.read_bytes()
    return reader.made_files().get(name)


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
