"""`plan`'s answer as text: a table of schemes side by side, or one scheme in detail; then what fits, in words."""

from __future__ import annotations

from typing import Any

from l4tool.core.console import table
from l4tool.core.sizes import format_bytes, format_duration
from quant.outlook import STORED, Making, Outlook, Question

MOST_NAMED = 4  # ways out in one line; JSON has them all


def render(model: dict[str, Any], outlooks: list[Outlook], question: Question) -> str:
    """Everything, ready for stdout."""
    title = (
        f"{model['name']}: {_count(model['parameters'])} parameters, {model['layers']} layers, "
        f"{model['experts']} experts, {model['dtype']}, context {model['context_tokens']:,}"
    )
    names = _names(model)
    body = _comparison(outlooks, names, question) if len(outlooks) != 1 else _detail(outlooks[0], names, question)
    return "\n\n".join([title, body, "\n".join(verdicts(outlooks, names, question))])


def verdicts(outlooks: list[Outlook], names: dict[str, str], question: Question) -> list[str]:
    """One line for each scheme: it fits, or why not and what would."""
    lines = []
    for outlook in outlooks:
        name = names[outlook.scheme]
        if outlook.fitting.fits:
            lines.append(f"{name} fits {question.hardware}.")
            continue
        others = [str(other) for other in outlook.would_fit[:MOST_NAMED]]
        instead = (
            f"It fits {', '.join(others)}."
            if others
            else "No number of GPUs of the table that divides the model is enough."
        )
        if outlook.fits_with_fp8_kv:
            instead = f"With --kv-dtype fp8 it does. {instead}"
        if outlook.schemes_that_fit:
            instead += f" On {question.hardware}: {' or '.join(names[scheme] for scheme in outlook.schemes_that_fit)}."
        lines.append(f"{name} does not fit {question.hardware}: {_reason(outlook, question)}. {instead}")
    return lines


def _count(number: int) -> str:
    return f"{number / 1e9:,.1f} B" if number >= 10**9 else f"{number / 1e6:,.1f} M"


def _names(model: dict[str, Any]) -> dict[str, str]:
    as_it_is = "as it is" if model["quantized"] else model["dtype"]
    return {STORED: as_it_is, "int4": "--int4", "mixed": "--mixed", "fp8": "--fp8"}


def _reason(outlook: Outlook, question: Question) -> str:
    fitting, demand = outlook.fitting, question.demand
    if fitting.obstacle:
        return fitting.obstacle
    usable = format_bytes(question.hardware.gpu.usable_bytes)
    if not fitting.weights_fit or not fitting.kv_bytes:
        reserved = format_bytes(fitting.reserved_bytes)
        return f"{format_bytes(fitting.weight_bytes)} of weights and {reserved} reserved on a GPU of {usable}"
    return (
        f"{format_bytes(fitting.kv_bytes)} for the KV cache of a GPU hold {fitting.sequences} of {demand.concurrency} "
        f"sequences of {demand.context_tokens:,} tokens"
    )


def _comparison(outlooks: list[Outlook], names: dict[str, str], question: Question) -> str:
    context = question.demand.context_tokens
    cache = "FP8 KV cache/GPU" if question.demand.kv_dtype == "fp8" else "KV cache/GPU"
    header = ("", "on disk", "weights/GPU", cache, "longest context", f"× {context:,} tokens", "fits")
    rows = []
    for outlook in outlooks:
        fitting = outlook.fitting
        room = fitting.weights_fit and fitting.kv_bytes > 0 and fitting.obstacle is None
        rows.append(
            (
                names[outlook.scheme],
                format_bytes(outlook.file_bytes),
                format_bytes(fitting.weight_bytes),
                format_bytes(fitting.kv_bytes) if room else "-",
                f"{fitting.longest_tokens:,}" if room else "-",
                f"{fitting.sequences:,}" if room else "-",
                "yes" if fitting.fits else "no",
            )
        )
    return f"{_hardware(question)}\n{table(rows, header=header)}"


def _hardware(question: Question) -> str:
    gpu = question.hardware.gpu
    return f"{question.hardware}, {format_bytes(gpu.usable_bytes)} usable each"


def _detail(outlook: Outlook, names: dict[str, str], question: Question) -> str:
    sections = [table([(f"{names[outlook.scheme]} on disk", format_bytes(outlook.file_bytes))])]
    if outlook.making is not None:
        sections.append(table(_making_rows(outlook.making)))
    sections.append(f"{_hardware(question)}\n{table(_gpu_rows(outlook, question))}")
    return "\n\n".join(sections)


def _making_rows(making: Making) -> list[tuple[str, str]]:
    rows = [("quantize: disk, the output", format_bytes(making.disk_bytes))]
    if making.streaming_disk_bytes is not None:
        rows.append(("  from a repository, shard by shard", format_bytes(making.streaming_disk_bytes)))
    rows.append(("  from a folder, with the source", format_bytes(making.disk_bytes + making.source_file_bytes)))
    rows.append((f"  memory, {making.pieces_at_once} pieces at once", format_bytes(making.memory_bytes)))
    rate = f"{making.source_file_bytes / making.seconds / 1e9:.2f} GB/s"
    measured = "the disk" if making.limited_by_disk else "two cores"
    rows.append((f"  time, estimated from {rate} of source ({measured})", format_duration(making.seconds)))
    return rows


def _gpu_rows(outlook: Outlook, question: Question) -> list[tuple[str, str]]:
    fitting, demand = outlook.fitting, question.demand
    rows = [
        ("weights", format_bytes(fitting.weight_bytes)),
        ("reserved: CUDA context, activations, fragments", format_bytes(fitting.reserved_bytes)),
    ]
    if not fitting.weights_fit or not fitting.kv_bytes:
        return rows
    at_once = f"{fitting.sequences:,}"
    if fitting.sequences_by_memory > fitting.sequences:
        at_once += f" (of {fitting.sequences_by_memory:,} if divided for it)"
    return [
        *rows,
        ("KV cache, FP8" if demand.kv_dtype == "fp8" else "KV cache", format_bytes(fitting.kv_bytes)),
        (f"  blocks of {fitting.block_tokens} tokens, NoPE layers", f"{fitting.full_blocks:,}"),
        ("  blocks, rope layers (current chunk only)", f"{fitting.chunked_blocks:,}"),
        (f"  one sequence of {demand.context_tokens:,} tokens", format_bytes(fitting.kv_bytes_per_sequence)),
        (f"sequences of {demand.context_tokens:,} tokens at once", at_once),
        ("longest context of one sequence", f"{fitting.longest_tokens:,}"),
    ]
