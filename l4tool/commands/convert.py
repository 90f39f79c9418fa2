"""`l4tool convert`: options, one call, what is printed."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from l4tool.core.errors import UsageError

if TYPE_CHECKING:
    from converters.conversion import Conversion
    from converters.reader import Reader

TO = ("hf", "hf-experts", "meta", "gguf", "compressed-tensors")


@click.command("convert", short_help="Write a checkpoint in another layout.")
@click.argument("source", metavar="SRC")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Folder to write.  [required unless --dry-run]")
@click.option("--to", type=click.Choice(TO), required=True, help="Layout of the output.")
@click.option("--dtype", help="bf16, f16 or f32; GGUF also q8_0, q4_0 and more.  [default: the source's]")
@click.option("--text-only", is_flag=True, help="Leave the vision tower out.")
@click.option(
    "--vision-from", metavar="DIR", type=click.Path(path_type=Path),
    help="Take the vision tower that SRC does not have from this checkpoint.",
)  # fmt: skip
@click.option("--shards", type=click.IntRange(1), help="Meta: how many files (tensor-parallel ranks).  [default: 8]")
@click.option("--shard-size", help="Most bytes per file, for example 5GB.  [default: 5GB; GGUF: one file]")
@click.option("--memory", default="1GiB", show_default=True, help="Most memory to use, page cache not counted.")
@click.option("--jobs", type=click.IntRange(1), help="Pieces worked on at once.  [default: one per core]")
@click.option(
    "--license", "licence", metavar="FILE", type=click.Path(path_type=Path),
    help="Text of the weights' licence, written as LICENSE.  [default: the source's]",
)  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Show which tensor becomes which, and sizes; write nothing.")
@click.option("--tensors", is_flag=True, help="With --dry-run: every tensor, not one line for each kind.")
@click.option("--force", is_flag=True, help="Start afresh in a folder that another run wrote.")
def command(source: str, out: Path | None, dry_run: bool, **given: Any) -> None:
    """Write the Llama 4 checkpoint SRC in another layout: a folder in any layout, a .gguf file, or a repository that
    `l4tool fetch` has brought. Values stay bit for bit, unless --dtype or a quantized GGUF type says otherwise; a
    compressed-tensors source becomes floats, except with --to compressed-tensors.

    Interrupted or killed, the same command carries on where it stopped.
    """
    from converters import conversion
    from converters.targets import Options
    from l4tool.core.sizes import parse_bytes

    if out is None and not dry_run:
        raise UsageError("where shall it go?", hint="add -o OUT, a new folder")
    shard_bytes = parse_bytes(given["shard_size"]) if given["shard_size"] else None
    options = conversion.check_options(
        Options(given["to"], given["dtype"], given["text_only"], given["shards"], shard_bytes)
    )
    told = " ".join(["l4tool", *sys.argv[1:]])
    how = conversion.How(
        parse_bytes(given["memory"]), given["jobs"], given["force"], told, given["licence"]
    )  # fmt: skip
    with contextlib.ExitStack() as stack:
        reader = _open(stack, source, options.to, given["vision_from"])
        if out is None or dry_run:
            click.echo(render_plan(conversion.Conversion(reader, options, how), given["tensors"]))
        else:
            click.echo(render(conversion.convert(reader, out, options, how)))


def _open(stack: contextlib.ExitStack, source: str, to: str, vision_from: Path | None) -> Reader:
    """The source as the target wants it: floats, unless the target keeps quantized tensors; with another's vision."""
    from converters.targets import TARGETS
    from l4tool.hub.local import require_local

    def opened(path: Path) -> Reader:
        from converters.detect import open_source

        reader: Reader = stack.enter_context(contextlib.closing(open_source(path)))
        if reader.quantization is not None and TARGETS[to].floats:
            from quant.plain_reader import PlainReader

            return PlainReader(reader)
        return reader

    reader = opened(require_local(source))
    if vision_from is None:
        return reader
    from converters.graft import Grafted

    return Grafted(reader, opened(require_local(str(vision_from))))


def render_plan(job: Conversion, each: bool) -> str:
    """What a dry run prints: stored tensor, shape, dtype, and what it is made of; files and sizes."""
    from converters.name_map import name_map, render_line
    from l4tool.core.console import table
    from l4tool.core.sizes import format_bytes

    lines = [render_line(line) for line in name_map(job, each)]
    files = [(shard.file_name, str(len(shard.specs)), format_bytes(shard.nbytes)) for shard in job.plan.shards]
    files.append(("all", str(sum(map(len, job.plan.items))), format_bytes(sum(s.nbytes for s in job.plan.shards))))
    sizes = f"source: {format_bytes(job.plan.source_bytes)}; beside the weights: {', '.join(job.files())}"
    return "\n\n".join(["\n".join(lines), table(files, header=("file", "tensors", "size")), sizes])


def render(report: dict[str, Any]) -> str:
    """The table that a run ends with."""
    from l4tool.core.console import table
    from l4tool.core.sizes import format_bytes, format_duration

    totals, ran = report["totals"], report["run"]
    rows = [
        ("files", str(len(report["output"]))),
        ("tensors", f"{totals['tensors']:,}"),
        ("size before", format_bytes(totals["source_bytes"])),
        ("size after", format_bytes(totals["output_bytes"])),
        ("time", format_duration(ran["seconds"])),
    ]
    if not ran["resumed"]:
        rows.append(("speed", f"{totals['output_bytes'] / max(ran['seconds'], 1e-9) / 1e9:.2f} GB/s written"))
    return table(rows)
