"""Folding of tensor names: nothing lost, nothing invented."""

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from converters.folding import fold, ranges


@pytest.mark.parametrize(
    ("numbers", "shown"),
    [([3], "3"), ([0, 1, 2], "{0-2}"), ([1, 3, 5, 7], "{1,3,…,7}"), ([0, 2], "{0,2}"), ([0, 1, 2, 7], "{0-2,7}")],
)
def test_ranges(numbers, shown):
    assert ranges(numbers) == shown


def test_layers_and_experts_fold_into_one_line():
    names = [f"m.layers.{i}.experts.{e}.up.weight" for i in range(48) for e in range(16)]
    (one,) = fold(names)
    assert one.pattern == "m.layers.{0-47}.experts.{0-15}.up.weight" and list(one.names) == names


def test_a_hole_splits_off_only_its_layer():
    names = [f"m.layers.{i}.experts.{e}.up.weight" for i in range(4) for e in range(4)]
    names.remove("m.layers.2.experts.1.up.weight")
    assert {one.pattern for one in fold(names)} == {
        "m.layers.{0-1,3}.experts.{0-3}.up.weight", "m.layers.2.experts.{0,2-3}.up.weight",
    }  # fmt: skip


def test_keys_keep_apart():
    names = ["a.0.w", "a.1.w", "a.2.w"]
    assert [one.pattern for one in fold(names, {"a.0.w": 1, "a.1.w": 2, "a.2.w": 1})] == ["a.{0,2}.w", "a.1.w"]


def expand(pattern):
    """Every name that a pattern without '…' stands for."""
    options = []
    for piece in re.split(r"(\{[^}]*\})", pattern):
        numbers = [piece]
        if piece.startswith("{"):
            spans = [[int(end) for end in run.split("-")] for run in piece[1:-1].split(",")]
            numbers = [str(n) for span in spans for n in range(span[0], span[-1] + 1)]
        options.append(numbers)
    return {"".join(parts) for parts in itertools.product(*options)}


@given(st.sets(st.tuples(st.integers(0, 3), st.sampled_from([0, 1, 2, 5, 9])), min_size=1))
def test_patterns_mean_exactly_their_names(pairs):
    names = [f"x.{a}.y.{b}.z" for a, b in sorted(pairs)]
    folds = fold(names)
    assert sorted(name for one in folds for name in one.names) == sorted(names)
    for one in folds:
        if "…" not in one.pattern:
            assert expand(one.pattern) == set(one.names)
