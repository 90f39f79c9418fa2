"""Where the source's bytes come from: a folder that holds them all, or shards that arrive one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from converters.reader import Reader
from converters.writing import journal
from l4tool.core.placeholder import require_contents


class Supply(Protocol):
    """Weight files for one run, asked for by the paths that the reader knows them by."""

    folder: Path  # where they lie, or come to lie

    def describe(self, reader: Reader) -> dict[str, Any]:
        """What identifies the source, for the fingerprint of the job."""
        ...

    def room_bytes(self, files: Sequence[Path]) -> int:
        """Most bytes that these files, needed in this order, will take in `folder` beyond what is there."""
        ...

    def begin(self, files: Sequence[Path]) -> None:
        """These files are needed, in this order."""
        ...

    def ready(self, file: Path) -> bool:
        """True when `ensure` would return at once."""
        ...

    def ensure(self, file: Path) -> None:
        """Wait until the file's bytes are there, checked. Raises what kept them away."""
        ...

    def used_up(self, file: Path) -> None:
        """Every tensor of the file is durable in the output. Called from another thread than `ensure`."""
        ...


class Folder:
    """A folder with all files: nothing to wait for, nothing to clear away."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def describe(self, reader: Reader) -> dict[str, Any]:
        for file in reader.weight_files():
            require_contents(file)
        return journal.describe_folder(reader)

    def room_bytes(self, files: Sequence[Path]) -> int:
        return 0

    def begin(self, files: Sequence[Path]) -> None:
        pass

    def ready(self, file: Path) -> bool:
        return True

    def ensure(self, file: Path) -> None:
        pass

    def used_up(self, file: Path) -> None:
        pass
