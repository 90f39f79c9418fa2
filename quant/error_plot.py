"""The picture of `verify --against --plot`: how large the errors are, and in which layers."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from l4tool.core.atomic import write_file
from l4tool.core.errors import UsageError
from quant.comparison import TensorError

MIN_BINS, MAX_BINS = 16, 60
MAX_ERROR = 1.0  # beyond it a tensor is broken and would squeeze all others into one bin
COLOURS = {"experts": "#0072B2", "shared": "#E69F00", "attention": "#009E73", "other": "#CC79A7"}  # Okabe and Ito
MARKERS = {"experts": "o", "shared": "s", "attention": "^", "other": "D"}
NAMES = {"experts": "routed experts", "shared": "shared experts and dense MLPs", "attention": "attention"}
_LAYER = re.compile(r"\.layers\.(\d+)\.")


def require_matplotlib() -> None:
    """Raises UsageError where matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UsageError(
            "--plot needs matplotlib, which is not installed", hint="pip install 'l4tool[plot]'"
        ) from error


def draw(errors: Sequence[TensorError], path: Path, title: str) -> None:
    """Write a PNG: a histogram of the tensors' relative errors by class, and below it the errors of each layer.

    Raises UsageError without matplotlib, WriteError where the file cannot be written.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    shown = [one for one in errors if one.relative_error <= MAX_ERROR]
    figure = Figure(figsize=(9, 7), dpi=150, layout="constrained")
    top, bottom = figure.subplots(2, 1, height_ratios=[3, 2])
    series = _series(shown)
    _histogram(top, series, shown)
    _layers(bottom, series)
    if series:
        figure.legend(loc="outside lower center", frameon=False, fontsize=9)
    left_out = len(errors) - len(shown)
    note = f"; {left_out} with an error above {MAX_ERROR:g} not shown" if left_out else ""
    figure.suptitle(f"Quantization error: {title}", fontsize=12)
    top.set_title(f"{len(errors):,} quantized tensors{note}", fontsize=10, color="#555555")
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    write_file(path, picture.getvalue())


def _series(errors: Sequence[TensorError]) -> dict[tuple[str, str], list[TensorError]]:
    """(class, kind) → its tensors, in the order of the legend."""
    series: dict[tuple[str, str], list[TensorError]] = {}
    for one in errors:
        series.setdefault((one.group, one.kind), []).append(one)
    return dict(sorted(series.items(), key=lambda item: list(COLOURS).index(item[0][0])))


def _histogram(axes: Any, series: dict[tuple[str, str], list[TensorError]], shown: Sequence[TensorError]) -> None:
    axes.set_xlabel("relative error of a tensor, ‖w − ŵ‖ / ‖w‖ (Frobenius), %")
    axes.set_ylabel("number of tensors")
    axes.yaxis.get_major_locator().set_params(integer=True)
    _tidy(axes)
    if not shown:
        return
    values = [100 * one.relative_error for one in shown]
    low, high = min(values), max(values)
    margin = max((high - low) * 0.03, high * 0.005, 1e-6)
    num_bins = min(max(2 * math.isqrt(len(values)), MIN_BINS), MAX_BINS)
    edges = [low - margin + (high - low + 2 * margin) * i / num_bins for i in range(num_bins + 1)]
    axes.hist(
        [[100 * one.relative_error for one in members] for members in series.values()],
        bins=edges, stacked=True, color=[COLOURS[group] for group, _ in series],
        label=[_label(*key, members) for key, members in series.items()], edgecolor="white", linewidth=0.4,
    )  # fmt: skip


def _label(group: str, kind: str, members: Sequence[TensorError]) -> str:
    total = math.sqrt(math.fsum(m.error for m in members) / max(math.fsum(m.square for m in members), 1e-300))
    return f"{NAMES.get(group, group)}, {kind.upper()}: {len(members):,} tensors, {100 * total:.2f} % overall"


def _layers(axes: Any, series: dict[tuple[str, str], list[TensorError]]) -> None:
    """The range of each class in each layer as a line, and its mean as a point."""
    width = 0.24
    for place, ((group, _), members) in enumerate(series.items()):
        layers: dict[int, list[float]] = {}
        for one in members:
            if (match := _LAYER.search(one.name)) is not None:
                layers.setdefault(int(match.group(1)), []).append(100 * one.relative_error)
        xs = [layer + width * (place - (len(series) - 1) / 2) for layer in layers]
        means = [math.fsum(values) / len(values) for values in layers.values()]
        below = [mean - min(values) for mean, values in zip(means, layers.values(), strict=True)]
        above = [max(values) - mean for mean, values in zip(means, layers.values(), strict=True)]
        axes.errorbar(
            xs, means, yerr=[[max(b, 0) for b in below], [max(a, 0) for a in above]], fmt=MARKERS[group],
            markersize=4, color=COLOURS[group], elinewidth=1.2, capsize=2,
        )  # fmt: skip
    axes.set_xlabel("layer (point: mean of its tensors; bar: smallest to largest)")
    axes.set_ylabel("relative error, %")
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, -0.6), max(high, 0.6))
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    _tidy(axes)


def _tidy(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
