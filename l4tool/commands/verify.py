"""`l4tool verify`: options, one call, and what is printed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from quant.verification import Outcome

_PATH = click.Path(path_type=Path)
CONFIGS = {"meta": "params.json", "gguf": "the metadata"}  # what says which tensors there must be


@click.command("verify", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("folder", metavar="DIR")
@click.option(
    "--against",
    metavar="SRC",
    help="The checkpoint that DIR was made from: shows every tensor's error, or that none has one.",
)
@click.option(
    "--worst", type=click.IntRange(0), default=10, show_default=True, help="Tensors to show, largest error first."
)
@click.option("--plot", type=_PATH, metavar="FILE.png", help="Draw the errors (needs --against and matplotlib).")
@click.option("--jobs", type=click.IntRange(1), help="Files read at once.  [default: one per core]")
@click.option("--json", "as_json", is_flag=True, help="Everything as JSON.")
def command(folder: str, against: str | None, worst: int, plot: Path | None, jobs: int | None, as_json: bool) -> int:
    """Check that a checkpoint is complete and right.

    Files against the manifest of `l4tool fetch`, the report of `l4tool quantize` or `convert`, the Hugging Face cache
    or Meta's checklist; names, shapes and dtypes against config.json (params.json, GGUF's metadata); every float for
    NaN and Inf, every scale for zero.

    \b
    Exit code, the first that applies: 76 bytes that changed, 66 something missing,
    65 wrong names, shapes or values, 0 sound. All findings are printed.
    """
    from l4tool.core.console import note
    from l4tool.core.errors import UsageError

    if plot is not None and against is None:
        raise UsageError("--plot draws the errors against a source", hint="add --against SRC")
    from l4tool.hub.local import require_local

    paths = [require_local(text) for text in (folder, against) if text is not None]
    if plot is not None:
        from quant.error_plot import require_matplotlib

        require_matplotlib()
    from quant import verification

    outcome = verification.verify(paths[0], paths[1] if against is not None else None, jobs)
    if plot is not None and (outcome.compared is None or not outcome.compared.errors):
        note("no quantized tensor was compared, so there is no picture")
    elif plot is not None and outcome.compared is not None:
        from quant.error_plot import draw

        draw(outcome.compared.errors, plot, f"{paths[0].resolve().name} against {paths[1].resolve().name}")
    click.echo(json.dumps(_finite(verification.as_json(outcome)), indent=2) if as_json else render(outcome, worst))
    return outcome.exit_code


def render(outcome: Outcome, worst: int) -> str:
    """The verdict in one line, what was checked, the errors, and every finding."""
    from l4tool.core.console import table

    parts = [f"{_verdict(outcome)}\n\n{_checked(outcome)}"]
    if outcome.compared is not None and outcome.compared.errors:
        from quant.comparison import totals

        errors = outcome.compared.errors
        rows: list[tuple[str, ...]] = [
            (str(t["class"]), str(t["kind"]), str(t["tensors"]), *(f"{t[key]:.4f}" for key in _TOTALS))
            for t in totals(errors)
        ]
        parts.append(table(rows, header=("class", "kind", "tensors", "error", "mean", "worst", "max |Δ|")))
        if worst:
            rows = [
                (e.name, e.kind, f"{e.relative_error:.4f}", _db(e.sqnr_db), f"{e.max_abs_error:.3g}")
                for e in errors[:worst]
            ]
            parts.append(table(rows, header=("largest relative errors", "kind", "error", "SQNR", "max |Δ|")))
    lines = []
    for finding in outcome.findings:
        lines.append(f"{'error' if finding.is_error else 'warning'}: {finding.message}")
    parts.append("\n".join(lines))
    hints = list(dict.fromkeys(f.hint for f in outcome.findings if f.is_error and f.hint))
    parts.append("\n".join(f"hint: {hint}" for hint in hints))
    return "\n\n".join(part for part in parts if part)


_TOTALS = ("relative_error", "mean_relative_error", "worst_relative_error", "max_abs_error")


def _db(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} dB"


def _verdict(outcome: Outcome) -> str:
    from l4tool.core.sizes import format_bytes

    errors = sum(finding.is_error for finding in outcome.findings)
    files = "1 file" if outcome.weight_files == 1 else f"{outcome.weight_files} files"
    size = f"{format_bytes(outcome.weight_bytes)} in {files}"
    if errors:
        return f"not sound: {outcome.path}, {size}: {errors} {'error' if errors == 1 else 'errors'}"
    return f"sound: {outcome.path}, {size}"


def _checked(outcome: Outcome) -> str:
    """One line for each stage: what it covered."""
    from converters.survey import LAYOUTS, UNKNOWN
    from l4tool.core.sizes import format_bytes, format_duration

    hashes = [f"{match} of {files} files as {source} says" for source, (match, files) in outcome.hashed.items()]
    readable = outcome.layout != UNKNOWN
    why = f"l4tool has no name table of {LAYOUTS[outcome.layout]}" if readable else "config.json cannot be used"
    said_by = CONFIGS.get(outcome.layout, "config.json")
    rows = [
        ("hashes", ", ".join(hashes) or "nothing to check them against (no manifest, report or cache)"),
        ("names, shapes", f"{outcome.tensors:,} tensors against {said_by}" if outcome.names_checked
                          else f"not checked: {why}"),
        ("values", f"{outcome.finite_tensors:,} of {outcome.float_tensors:,} float tensors finite"),
    ]  # fmt: skip
    if outcome.compared is not None:
        copies = f"{outcome.compared.copies:,} copied bit for bit"
        rows.append(("against", f"{len(outcome.compared.errors):,} quantized tensors, {copies}"))
    rate = outcome.read_bytes / max(outcome.seconds, 1e-9)
    speed = "" if outcome.compared is not None else f", {format_bytes(rate)}/s"
    rows.append(("read", f"{format_bytes(outcome.read_bytes)} in {format_duration(outcome.seconds)}{speed}"))
    return "\n".join(f"{name:<13}  {text}" for name, text in rows)


def _finite(value: Any) -> Any:
    """NaN and Inf are no JSON: null stands for them."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
