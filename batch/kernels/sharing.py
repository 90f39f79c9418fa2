"""Which sequences of a step begin with the same KV blocks, so that attention can read those once for all of them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Piece(NamedTuple):
    """Rows begin:end of q, queries of sequence seq, the last of which sees `context` keys."""

    seq: int
    begin: int
    end: int
    context: int


class Share(NamedTuple):
    """Pieces that attend together to their first `num_keys` keys, which are the same ones."""

    pieces: list[Piece]
    num_keys: int

    @property
    def cost(self) -> int:
        """Products of a query and a key, or a little more."""
        return sum((piece.end - piece.begin) * piece.context for piece in self.pieces)


def group_pieces(pieces: list[Piece], table: np.ndarray, size: int, block_size: int, tile: int) -> list[Share]:
    """Divide pieces of fewer than `size` queries into shares of at most `size`; table int32 [S, max_blocks].

    A neighbour in the order of block tables joins a share while that saves reading keys: n pieces with k keys in
    common save k · (n - 1). Keys are shared in whole tiles, so that every query meets the same tiles as alone.
    """
    rows = table[[piece.seq for piece in pieces]]  # [P, max_blocks]
    if len(pieces) < 2 or len(np.unique(rows[:, 0])) == len(pieces):
        return [Share([piece], 0) for piece in pieces]
    order = np.ascontiguousarray(rows).view(np.dtype((np.void, rows.itemsize * rows.shape[1])))[:, 0].argsort()
    differs = rows[order][1:] != rows[order][:-1]
    equal = np.where(differs.any(1), differs.argmax(1), rows.shape[1]) * block_size  # keys, of neighbours
    ordered = [pieces[i] for i in order]
    before = np.array([piece.context - (piece.end - piece.begin) + 1 for piece in ordered])  # what its first query sees
    common = np.minimum(equal, np.minimum(before[1:], before[:-1])) // tile * tile
    shares, members, num_keys = [], ordered[:1], ordered[0].context
    for piece, keys in zip(ordered[1:], common.tolist(), strict=True):
        fewer, count = min(num_keys, keys), len(members)
        if fewer and fewer * count >= num_keys * (count - 1):
            members.append(piece)
            num_keys = fewer
        else:
            shares += _cut_evenly(members, num_keys, size)
            members, num_keys = [piece], piece.context
    return shares + _cut_evenly(members, num_keys, size)


def _cut_evenly(members: list[Piece], num_keys: int, size: int) -> list[Share]:
    """Shares of at most `size` queries each, about equal ones."""
    if len(members) == 1:
        return [Share(members, 0)]
    total = sum(piece.end - piece.begin for piece in members)
    target = -(-total // -(-total // size))
    shares: list[list[Piece]] = [[]]
    rows = 0
    for piece in members:
        if rows and rows + piece.end - piece.begin > target:
            shares.append([])
            rows = 0
        shares[-1].append(piece)
        rows += piece.end - piece.begin
    return [Share(part, num_keys if len(part) > 1 else 0) for part in shares]
