"""Between stored and canonical tensors: pieces are placed, cut out and turned, as the table's parts say."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from converters.names import Part, Row, as_matrix


def part_view(stored: torch.Tensor, part: Part) -> torch.Tensor:
    """Stored tensor → the piece `part` of it, canonical orientation, sharing its memory.

    A whole tensor has its canonical shape, a piece is [rows, cols] (of a vector: [rows]).
    """
    height, width = part.stored_size
    if as_matrix(tuple(stored.shape)) == (height, width) and not part.transposed:
        return stored.view(part.shape) if part.is_whole else stored
    matrix = stored.view(as_matrix(tuple(stored.shape)))
    piece = matrix[part.row : part.row + height, part.col : part.col + width]
    piece = piece.T if part.transposed else piece
    if len(part.shape) < 2:
        return piece[:, 0]
    return piece.view(part.shape) if part.is_whole and len(part.shape) > 2 else piece


def join(pieces: Iterable[tuple[Part, torch.Tensor]], rows: slice, dtype: torch.dtype) -> torch.Tensor:
    """Canonical rows out of the pieces of one canonical tensor (each `part_view` of its stored tensor): a new tensor.

    Raises ValueError where the pieces leave a gap or overlap.
    """
    out: torch.Tensor | None = None
    covered = 0
    for part, piece in pieces:
        height, width = as_matrix(part.shape)
        start, stop, _ = rows.indices(height)
        if out is None:
            out = torch.empty((stop - start, width), dtype=dtype)
        top, bottom = part.rows or (0, height)
        left, right = part.cols or (0, width)
        first, last = max(start, top), min(stop, bottom)
        if first < last:
            source = piece.reshape(bottom - top, right - left) if piece.dim() != 2 else piece
            copy_into(out[first - start : last - start, left:right], source[first - top : last - top])
            covered += (last - first) * (right - left)
    if out is None or covered != out.numel():
        raise ValueError("the pieces of a tensor do not cover it")
    return out.view(-1, *part.shape[1:])


def assemble(
    row: Row, read: Callable[[str, slice | None], torch.Tensor], rows: slice | None, dtype: torch.dtype
) -> torch.Tensor:
    """Rows (of the first dimension) of the stored tensor `row` out of canonical tensors, which `read(name, rows)` gives.

    A single untransposed part that fills the row is what `read` gives, uncopied; anything else is a new tensor. Raises
    ValueError where the parts leave a gap.
    """
    height, width = as_matrix(row.shape)
    per_index = height // row.shape[0] if row.shape and row.shape[0] else 1  # matrix rows in one of the first dimension
    start, stop, _ = (rows or slice(None)).indices(row.shape[0] if row.shape else 1)
    top, bottom = start * per_index, stop * per_index
    only = row.parts[0]
    if len(row.parts) == 1 and not only.transposed and only.stored_size == (height, width) and per_index == 1:
        return _canonical_piece(only, read, start, stop, (0, width)).view(-1, *row.shape[1:])
    out = torch.empty((bottom - top, width), dtype=dtype)
    covered = 0
    for part in row.parts:
        high, wide = part.stored_size
        first, last = max(top, part.row), min(bottom, part.row + high)
        if first >= last:
            continue
        target = out[first - top : last - top, part.col : part.col + wide]
        inside = (first - part.row, last - part.row)
        if part.transposed:
            copy_into(target, _canonical_piece(part, read, 0, wide, inside).T)
        else:
            copy_into(target, _canonical_piece(part, read, *inside, (0, wide)))
        covered += target.numel()
    if covered != out.numel():
        raise ValueError(f"{row.stored}: its parts do not fill it")
    return out.view(-1, *row.shape[1:])


def _canonical_piece(
    part: Part, read: Callable[[str, slice | None], torch.Tensor], start: int, stop: int, cols: tuple[int, int]
) -> torch.Tensor:
    """Rows [start, stop) and columns of a piece, out of the canonical tensor: [rows, cols]."""
    top, left = (part.rows or (0, 0))[0], (part.cols or (0, 0))[0]
    height, width = as_matrix(part.shape)
    whole_first = len(part.shape) > 2  # rows of `read` are of the first dimension
    if whole_first or (top + start, top + stop) == (0, height):
        tensor = read(part.name, None).reshape(height, width)[top + start : top + stop]
    else:
        tensor = read(part.name, slice(top + start, top + stop)).reshape(stop - start, width)
    return tensor[:, left + cols[0] : left + cols[1]]


def copy_into(target: torch.Tensor, source: torch.Tensor) -> None:
    """target ← source, [rows, cols] both, any strides."""
    target.copy_(source)


def stored_names(rows: Sequence[Row]) -> dict[str, list[tuple[Row, Part]]]:
    """Canonical name → where its pieces lie."""
    where: dict[str, list[tuple[Row, Part]]] = {}
    for row in rows:
        for part in row.parts:
            where.setdefault(part.name, []).append((row, part))
    return where
