"""l4tool-report.json, and the table at the end of a run."""

from __future__ import annotations

import math
import platform
from importlib import metadata
from typing import Any

from converters.reader import Reader
from converters.writing.plan import Budget, Plan
from converters.writing.run import Finished
from l4tool.core.console import table
from l4tool.core.sizes import format_bytes, format_duration
from quant import memory
from quant.schemes import Recipe

WORST = 5


def build(reader: Reader, recipe: Recipe, plan: Plan, finished: Finished, command: str) -> dict[str, Any]:
    """The report. Everything but `run` depends on source and recipe alone.

    `relative_error` is the Frobenius norm of the difference over that of the weight, after dequantization to
    bfloat16; `sqnr_db` = -20 log10 of it.
    """
    log = finished.log
    kinds = {item.info.name: item.encoder.kind for items in plan.items for item in items}
    entries = {name: entry for shard in plan.shards for name, entry in log.tensors[shard.file_name].items()}
    sums = {name: entry["sums"] for name, entry in entries.items() if entry["sums"] is not None}
    tensors = {name: {"kind": kinds[name], **_errors(*sums[name])} for name in kinds if name in sums}
    errors = [_relative(*pair) for pair in sums.values()]
    total_error, total_square = math.fsum(p[0] for p in sums.values()), math.fsum(p[1] for p in sums.values())
    fit = memory.fit(reader.arch.text, plan.output_bytes)
    return {
        "tool": "l4tool quantize",
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in ("torch", "numba")}},
        "job": finished.job,
        "totals": {
            "source_bytes": plan.source_bytes,
            "output_bytes": plan.output_bytes,
            "quantized_tensors": len(tensors),
            "mean_relative_error": math.fsum(errors) / len(errors) if errors else 0.0,
            "worst_relative_error": max(errors, default=0.0),
            **{f"overall_{key}": value for key, value in _errors(total_error, total_square).items()},
        },
        "h100_80gb": {
            "fits": fit.fits,
            "usable_bytes": memory.H100_USABLE_BYTES,
            "reserved_bytes": fit.reserved_bytes,
            "left_for_kv_bytes": fit.kv_bytes,
            "kv_tokens": fit.kv_tokens,
        },
        "output": {name: {"size": s["size"], "digest": s["digest"]} for name, s in sorted(log.shards.items())},
        "tensors": tensors,
        "run": {"command": command, "seconds": round(finished.seconds, 3), "resumed": finished.resumed},
    }


def _relative(error: float, square: float) -> float:
    return math.sqrt(error / square) if square else 0.0


def _errors(error: float, square: float) -> dict[str, float | None]:
    relative = _relative(error, square)
    return {"relative_error": relative, "sqnr_db": -20 * math.log10(relative) if relative else None}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def render(report: dict[str, Any]) -> str:
    """The table that a run ends with."""
    totals, run = report["totals"], report["run"]
    before, after = totals["source_bytes"], totals["output_bytes"]
    rows = [
        ("size before", format_bytes(before)),
        ("size after", format_bytes(after)),
        ("ratio", f"{after / before:.3f}"),
        ("time", format_duration(run["seconds"])),
    ]
    if not run["resumed"]:
        rows.append(("speed", f"{before / max(run['seconds'], 1e-9) / 1e9:.2f} GB/s"))
    rows.append(("mean relative error", f"{totals['mean_relative_error']:.4f}"))
    rows.append(("worst relative error", f"{totals['worst_relative_error']:.4f}"))
    rows += fit_rows(report["h100_80gb"])
    worst = sorted(report["tensors"].items(), key=lambda pair: -pair[1]["relative_error"])[:WORST]
    lines = [
        (name, entry["kind"], f"{entry['relative_error']:.4f}", "-" if entry["sqnr_db"] is None else
         f"{entry['sqnr_db']:.1f} dB")
        for name, entry in worst
    ]  # fmt: skip
    text = table(rows)
    return f"{text}\n\n{table(lines, header=('worst tensors', 'kind', 'error', 'SQNR'))}" if lines else text


def fit_rows(fit: dict[str, Any]) -> list[tuple[str, str]]:
    """The H100 line: weights, a reserve for CUDA context and activations, and one sequence's KV cache in bf16."""
    reserve = format_bytes(fit["reserved_bytes"])
    if not fit["fits"]:
        return [("fits an 80 GB H100", f"no ({reserve} reserved)")]
    return [("fits an 80 GB H100", f"yes, {fit['kv_tokens']:,} KV tokens left ({reserve} reserved)")]


def render_plan(reader: Reader, recipe: Recipe, plan: Plan, budget: Budget) -> str:
    """What a dry run prints: sizes and scheme per class, shards, memory, and whether the result fits."""
    rows = [
        (label, kind if kind != "copy" else reader.arch.dtype, format_bytes(before), format_bytes(after))
        for label, (kind, before, after) in plan.classes.items()
    ]
    rows.append(("total", "", format_bytes(plan.source_bytes), format_bytes(plan.output_bytes)))
    fit = memory.fit(reader.arch.text, plan.output_bytes)
    kinds = {kind for kind, _, _ in plan.classes.values()}
    groups = f", scale {recipe.scale}, group size {recipe.group_size}" if "int4" in kinds else ""
    facts = [
        ("scheme", f"{recipe.scheme}{groups}, {recipe.format}"),
        ("shards", str(len(plan.shards))),
        ("at once", f"{budget.jobs} pieces"),
        *fit_rows({"fits": fit.fits, "kv_tokens": fit.kv_tokens, "reserved_bytes": fit.reserved_bytes}),
    ]
    return f"{table(rows, header=('tensors', 'as', 'before', 'after'))}\n\n{table(facts)}"
