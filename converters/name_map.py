"""What `convert --dry-run` shows: which tensor of the output is made of which of the source."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from converters.folding import fold
from converters.names import Part
from converters.safetensors_io import DTYPE_NAMES

if TYPE_CHECKING:
    from converters.conversion import Conversion


@dataclass(frozen=True)
class Line:
    """One tensor of the output, or all that differ in their numbers alone. `sources`: what the source calls them, with
    the rows or columns that are taken and a T where they are turned."""

    name: str
    shape: tuple[int, ...]
    stored_as: str
    sources: tuple[str, ...]


def name_map(job: Conversion, each: bool) -> list[Line]:
    """One line for each kind of tensor, or with `each` for every one, in the output's order."""
    named: Callable[[str], str] = getattr(job.reader, "stored_name", lambda name: name)
    lines: dict[str, Line] = {}
    pieces = [piece for file in job.output.files for piece in file.pieces]
    items = [item for inside in job.plan.items for item in inside]
    for key, piece, item in zip(job.rows, pieces, items, strict=True):
        specs = piece.encoder.parts(item.info, piece.row.stored)
        kind = DTYPE_NAMES[specs[0].dtype] if piece.encoder.kind == "plain" else piece.encoder.kind
        sources = dict.fromkeys(named(part.name) + _cut(part) for part in piece.row.parts)
        lines[key] = Line(key, piece.row.shape, kind, tuple(sources))
    if each:
        return list(lines.values())
    return [_together(found.pattern, [lines[name] for name in found.names]) for found in fold(lines, _alike(lines))]


def _alike(lines: dict[str, Line]) -> dict[str, object]:
    return {name: (line.shape, line.stored_as) for name, line in lines.items()}


def _together(pattern: str, lines: list[Line]) -> Line:
    sources = dict.fromkeys(source for line in lines for source in line.sources)
    return Line(pattern, lines[0].shape, lines[0].stored_as, tuple(found.pattern for found in fold(sources)))


def _cut(part: Part) -> str:
    """`[rows, cols] T` as far as it is not all of the tensor and not as it lies."""
    ranges = ["" if span is None else f"{span[0]}:{span[1]}" for span in (part.rows, part.cols)]
    cut = "" if not any(ranges) else f"[{ranges[0] or ':'}]" if not ranges[1] else f"[{ranges[0] or ':'}, {ranges[1]}]"
    return cut + (" T" if part.transposed else "")


def render_line(line: Line) -> str:
    """For a person: `=` where the name stays."""
    shape = "×".join(map(str, line.shape)) or "scalar"
    sources = " + ".join(line.sources)
    return f"{line.name}  {shape} {line.stored_as}  {'=' if sources == line.name else f'← {sources}'}"
