"""Many tensor names in few lines: `….layers.{0-47}.self_attn.q_proj.weight`."""

from __future__ import annotations

import itertools
import re
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class Fold:
    """Names that differ in their numbers alone. `pattern` shows the numbers as ranges."""

    pattern: str
    names: tuple[str, ...]


def fold(names: Iterable[str], key: dict[str, Hashable] | None = None) -> list[Fold]:
    """Group names that are equal but for numbers between dots, in order of appearance.

    `key`: names with different keys (shape and dtype, say) stay apart. A group whose numbers are not every combination
    of its ranges is split until they are.
    """
    groups: dict[Hashable, list[str]] = {}
    for name in names:
        groups.setdefault((_NUMBER.sub("{}", name), key[name] if key else None), []).append(name)
    return [one for group in groups.values() for one in _complete(group, 0)]


def _complete(names: list[str], place: int) -> list[Fold]:
    """One Fold when the names are a full grid of their numbers; else the numbers at `place` that have the same company
    stay together, and the next place is tried."""
    rows = [tuple(map(int, _NUMBER.findall(name))) for name in names]
    columns = [sorted(set(column)) for column in zip(*rows, strict=True)]
    size = 1
    for column in columns:
        size *= len(column)
    if size == len(set(rows)) or place >= len(columns):
        shown = iter(columns)
        return [Fold(_NUMBER.sub(lambda match: ranges(next(shown)), names[0]), tuple(names))]
    rest_of: dict[int, set[tuple[int, ...]]] = {}
    for row in rows:
        rest_of.setdefault(row[place], set()).add(row[:place] + row[place + 1 :])
    alike: dict[Hashable, list[str]] = {}
    for name, row in zip(names, rows, strict=True):
        alike.setdefault(frozenset(rest_of[row[place]]), []).append(name)
    return [one for group in alike.values() for one in _complete(group, place + 1)]


def ranges(numbers: Sequence[int]) -> str:
    """[3] → '3', [0, 1, 2] → '{0-2}', [1, 3, 5, 7] → '{1,3,…,7}', [0, 1, 5] → '{0,1,5}', runs joined by commas."""
    if len(numbers) == 1:
        return str(numbers[0])
    step = numbers[1] - numbers[0]
    if len(numbers) > 3 and step > 1 and all(b - a == step for a, b in itertools.pairwise(numbers)):
        return f"{{{numbers[0]},{numbers[1]},…,{numbers[-1]}}}"
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return "{" + ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs) + "}"
