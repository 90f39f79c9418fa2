"""The figures of an evaluation, made of its output lines alone: in any order, in any number of runs, they are the same.

Sums are integers (multiples of 2^-60 nats), so that no order of adding shows in the last digit.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from batch.engine.token_scores import bin_middle
from l4tool.core.console import table

UNIT = 2.0**60
MAX_TASKS = 1000  # rows; what comes after is in "all" only
QUANTILE = 0.99


@dataclass
class Tally:
    """Sums over the lines of one task. Of the other model: `other_right`, `other_nll`."""

    lines: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    answers: int = 0
    right: int = 0
    other_right: int = 0
    tokens: int = 0
    nll: int = 0
    other_nll: int = 0
    kl: int = 0
    kl_max: float = 0.0
    kl_bins: Counter[int] = field(default_factory=Counter)
    same_top: int = 0

    def add(self, line: dict[str, Any]) -> None:
        """One output line."""
        self.lines += 1
        if "error" in line:
            self.errors[line["error"]["code"]] += 1
            return
        self.tokens += line["tokens"]
        self.nll += round(line["nll"] * UNIT)
        if "correct" in line:
            self.answers += 1
            self.right += line["correct"]
        if (other := line.get("against")) is not None:
            self.other_right += other.get("correct", False)
            self.other_nll += round(other["nll"] * UNIT)
            self.kl += round(line["kl"] * UNIT)
            self.kl_max = max(self.kl_max, line["kl_max"])
            self.kl_bins.update({int(number): count for number, count in line["kl_bins"].items()})
            self.same_top += line["same_top"]

    def mean(self, total: int) -> float | None:
        """A sum per token; None without tokens."""
        return total / UNIT / self.tokens if self.tokens else None

    @property
    def kl_p99(self) -> float | None:
        """At most 1 % of the tokens have a larger KL; at most 2.2 % off."""
        if not self.tokens:
            return None
        left = math.ceil(QUANTILE * self.tokens)
        for number, count in sorted(self.kl_bins.items()):
            left -= count
            if left <= 0:
                return min(bin_middle(number), self.kl_max)
        return self.kl_max

    def as_json(self, is_compared: bool) -> dict[str, Any]:
        """Figures by name; None where there is nothing to make them of."""
        found: dict[str, Any] = {
            "lines": self.lines,
            "errors": sum(self.errors.values()),
            "answers": self.answers,
            "correct": self.right,
            "exact_match": self.right / self.answers if self.answers else None,
            "tokens": self.tokens,
            "perplexity": _perplexity(self.mean(self.nll)),
        }
        if is_compared:
            found |= {
                "against": {
                    "correct": self.other_right,
                    "exact_match": self.other_right / self.answers if self.answers else None,
                    "perplexity": _perplexity(self.mean(self.other_nll)),
                },
                "kl_mean": self.mean(self.kl),
                "kl_p99": self.kl_p99,
                "kl_max": self.kl_max if self.tokens else None,
                "same_top": self.same_top / self.tokens if self.tokens else None,
            }
        return found


@dataclass
class Figures:
    """All tasks, and all lines. `is_compared`: there is another model."""

    is_compared: bool
    all: Tally = field(default_factory=Tally)
    tasks: dict[str, Tally] = field(default_factory=dict)

    def read(self, lines: Iterable[bytes]) -> None:
        """Add output lines."""
        for raw in lines:
            line = json.loads(raw)
            self.all.add(line)
            task = line.get("task")
            if task is not None and (task in self.tasks or len(self.tasks) < MAX_TASKS):
                self.tasks.setdefault(task, Tally()).add(line)

    def as_json(self) -> dict[str, Any]:
        return {
            "errors_by_code": dict(sorted(self.all.errors.items())),
            "all": self.all.as_json(self.is_compared),
            "tasks": {name: tally.as_json(self.is_compared) for name, tally in sorted(self.tasks.items())},
        }

    def as_table(self) -> str:
        """One row a task and one for all; with another model its figures beside the first one's."""
        columns = ["lines", "errors", "exact match", "tokens", "perplexity"]
        if self.is_compared:
            columns[3:3] = ["(against)"]
            columns += ["(against)", "KL mean", "KL p99", "KL max", "same top"]
        rows = [(name, *self._cells(tally)) for name, tally in sorted(self.tasks.items())]
        return table([*rows, ("all", *self._cells(self.all))], ["task", *columns])

    def _cells(self, tally: Tally) -> list[str]:
        found = tally.as_json(self.is_compared)
        cells = [f"{found['lines']:,}", f"{found['errors']:,}", _percent(found["exact_match"])]
        if not self.is_compared:
            return [*cells, f"{found['tokens']:,}", _number(found["perplexity"])]
        other = found["against"]
        cells += [_percent(other["exact_match"]), f"{found['tokens']:,}"]
        cells += [_number(found["perplexity"]), _number(other["perplexity"])]
        cells += [_number(found[name]) for name in ("kl_mean", "kl_p99", "kl_max")]
        return [*cells, _percent(found["same_top"])]


def _perplexity(nll: float | None) -> float | None:
    """exp of a mean; None also where that is more than a float holds."""
    return None if nll is None or nll > 700 else math.exp(nll)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}" if value < 1000 else f"{value:,.0f}"
