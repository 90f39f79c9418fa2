"""What goes beside the weights of a quantized checkpoint: side files, licence, NOTICE and a model card.

Everything here follows from source, recipe and plan alone, so that a resumed run writes the same bytes.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from converters import papers
from converters.origin import CARD, read_origin
from converters.papers import LICENCE, NOTICE
from converters.reader import Reader
from converters.writing import journal
from converters.writing.plan import Plan
from l4tool.core.atomic import write_file
from l4tool.core.console import note
from quant.card_text import CardFacts, model_card, suggested_name
from quant.schemes import Recipe

_CARDS = re.compile(r"README(?=(\.source)*\.md$)")


class SideFiles:
    """The side files of one output.

    `licence_file` (--license) is written as LICENSE, in place of the source's. `source` ("org/name@commit") says where
    the weights come from when the reader's folder does not. Raises InputMissing for a licence file that cannot be
    read, UsageError for one that is not the licence of these weights.
    """

    def __init__(self, reader: Reader, licence_file: Path | None = None, source: str = "") -> None:
        self.reader, self.source = reader, source
        self.origin = read_origin(reader.path, reader.config, source)
        self.licence = papers.read_licence(licence_file, self.origin.is_llama) if licence_file is not None else None
        self.copies = {_CARDS.sub("README.source", path.name): path for path in reader.side_files()}

    @property
    def names(self) -> list[str]:
        """Every file that `write` creates."""
        made = [CARD, *([NOTICE] if self.origin.is_llama else []), *([LICENCE] if self.licence is not None else [])]
        return sorted({*self.copies, *made})

    def tell(self, out: Path, recipe: Recipe) -> None:
        """Say beforehand what the licence asks for and this output would lack: the licence's text, a Llama name."""
        where, name = self.source or str(self.reader.path), suggested_name(self.origin, recipe)
        papers.tell(self.origin, self.names, out, name, where, is_folder=not self.source)

    def write(self, out: Path, recipe: Recipe, plan: Plan, report: dict[str, Any]) -> None:
        """Write all of them, and enter the licence into `report`. Raises WriteError."""
        for name, path in self.copies.items():
            write_file(out / name, path.read_bytes())
        if self.licence is not None:  # over the source's own
            write_file(out / LICENCE, self.licence)
        if self.origin.is_llama:
            old = self.copies.get(NOTICE)
            write_file(out / NOTICE, papers.notice(old.read_bytes() if old else b""))
        facts = CardFacts(self.origin, self.reader.arch, recipe, plan, report, tuple(self.names))
        write_file(out / CARD, model_card(facts))
        report["license"] = papers.facts(self.origin, self.names)

    def complete(self, out: Path, recipe: Recipe, plan: Plan, report: dict[str, Any]) -> dict[str, Any]:
        """Mend a finished output that lacks licence files which are there by now; returns the report.

        Otherwise nothing is written: the card may have been edited since. Raises WriteError.
        """
        is_new = self.licence is not None and not _holds(out / LICENCE, self.licence)
        lacked = set(report.get("license", {}).get("missing", []))
        if is_new or lacked - set(papers.missing(self.origin, self.names)):
            note("licence files and model card are written again")
            self.write(out, recipe, plan, report)
            write_file(out / journal.REPORT, json.dumps(report, indent=2) + "\n")
        return report


def _holds(path: Path, data: bytes) -> bool:
    return path.is_file() and path.read_bytes() == data
