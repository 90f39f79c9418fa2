"""What goes beside the weights of a quantized checkpoint: side files, licence, NOTICE and a model card.

Everything here follows from source, recipe and plan alone, so that a resumed run writes the same bytes.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from converters.origin import CARD, read_origin
from converters.reader import Reader
from converters.writing import journal
from converters.writing.plan import Plan
from l4tool.core import licence
from l4tool.core.atomic import write_file
from l4tool.core.console import note
from l4tool.core.errors import InputMissing, UsageError
from quant.card_text import CardFacts, model_card, suggested_name
from quant.schemes import Recipe

LICENCE, NOTICE, POLICY = "LICENSE", "NOTICE", "USE_POLICY"
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
        self.licence = _read_licence(licence_file, self.origin.is_llama) if licence_file is not None else None
        self.copies = {_CARDS.sub("README.source", path.name): path for path in reader.side_files()}

    @property
    def names(self) -> list[str]:
        """Every file that `write` creates."""
        made = [CARD, *([NOTICE] if self.origin.is_llama else []), *([LICENCE] if self.licence is not None else [])]
        return sorted({*self.copies, *made})

    def tell(self, out: Path, recipe: Recipe) -> None:
        """Say beforehand what the licence asks for and this output would lack: the licence's text, a Llama name."""
        if LICENCE in self._missing():
            where = self.source or str(self.reader.path)
            first = f", or first `l4tool fetch {self.origin.repo or 'REPO'} --include 'LICENSE*' -o {where}`"
            note(
                f"{where} has no LICENSE, which every copy must carry: add --license FILE{'' if self.source else first}"
            )
        if self.origin.is_llama and not out.name.startswith(licence.NAME_PREFIX):
            name = suggested_name(self.origin, recipe)
            note(f'published, its name must begin with "{licence.NAME_PREFIX}": not {out.name} but {name}, say')

    def write(self, out: Path, recipe: Recipe, plan: Plan, report: dict[str, Any]) -> None:
        """Write all of them, and enter the licence into `report`. Raises WriteError."""
        for name, path in self.copies.items():
            write_file(out / name, path.read_bytes())
        if self.licence is not None:  # over the source's own
            write_file(out / LICENCE, self.licence)
        if self.origin.is_llama:
            write_file(out / NOTICE, self._notice())
        facts = CardFacts(self.origin, self.reader.arch, recipe, plan, report, tuple(self.names))
        write_file(out / CARD, model_card(facts))
        report["license"] = {
            "name": self.origin.licence_name,
            "base_model": self.origin.repo or self.origin.name,
            "commit": self.origin.commit,
            "notice": licence.NOTICE if self.origin.is_llama else None,
            "missing": self._missing(),
        }

    def complete(self, out: Path, recipe: Recipe, plan: Plan, report: dict[str, Any]) -> dict[str, Any]:
        """Mend a finished output that lacks licence files which are there by now; returns the report.

        Otherwise nothing is written: the card may have been edited since. Raises WriteError.
        """
        is_new = self.licence is not None and not _holds(out / LICENCE, self.licence)
        lacked = set(report.get("license", {}).get("missing", []))
        if is_new or lacked - set(self._missing()):
            note("licence files and model card are written again")
            self.write(out, recipe, plan, report)
            write_file(out / journal.REPORT, json.dumps(report, indent=2) + "\n")
        return report

    def _missing(self) -> list[str]:
        """What a Llama derivative must or should carry and this one does not."""
        kinds = (LICENCE, POLICY) if self.origin.is_llama else ()
        return [kind for kind in kinds if not any(name.startswith(kind) for name in self.names)]

    def _notice(self) -> bytes:
        """The source's NOTICE with the licence's line in it."""
        path = self.copies.get(NOTICE)
        old = path.read_bytes() if path else b""
        if licence.NOTICE in " ".join(old.decode(errors="replace").split()):
            return old
        return old.rstrip() + (b"\n\n" if old.strip() else b"") + f"{licence.NOTICE}\n".encode()


def _holds(path: Path, data: bytes) -> bool:
    return path.is_file() and path.read_bytes() == data


def _read_licence(path: Path, is_llama: bool) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputMissing(f"cannot read {path}: {error.strerror}", hint="--license takes a file") from None
    if is_llama and not licence.is_licence_text(data.decode(errors="replace")):
        raise UsageError(
            f"{path} is not the {licence.NAME}, which these weights are under", hint=f"get it at {licence.LICENCE_URL}"
        )
    return data
