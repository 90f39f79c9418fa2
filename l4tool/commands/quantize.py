"""`l4tool quantize`: options, one call, what is printed."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from l4tool.core.errors import UsageError


@click.command("quantize", short_help="Quantize a Llama 4 checkpoint to INT4, FP8 or a mix of both.")
@click.argument("source", metavar="SRC", type=click.Path(path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Folder to write.  [required unless --dry-run]")
@click.option("--int4", is_flag=True, help="INT4 routed and shared experts.")
@click.option("--fp8", is_flag=True, help="FP8 per channel, activations quantized per token at run time.")
@click.option("--mixed", is_flag=True, help="INT4 routed experts, FP8 shared experts.")
@click.option("--shared-experts/--no-shared-experts", default=True, help="Quantize shared experts too.  [default: yes]")
@click.option(
    "--attention", type=click.Choice(["bf16", "fp8"]), default="bf16", show_default=True,
    help="Attention as it is, or in FP8.",
)  # fmt: skip
@click.option("--group-size", type=int, default=128, show_default=True, help="Inputs that share one INT4 scale.")
@click.option(
    "--scale", type=click.Choice(["absmax", "mse", "hqq"]),
    help="How INT4 scales are chosen.  [default: mse; absmax with --format quanto]",
)  # fmt: skip
@click.option(
    "--format", "format_", type=click.Choice(["compressed-tensors", "quanto"]), default="compressed-tensors",
    show_default=True, help="Layout of the output.",
)  # fmt: skip
@click.option("--memory", default="8GiB", show_default=True, help="Most memory to use, page cache not counted.")
@click.option("--jobs", type=click.IntRange(1), help="Tensors worked on at once.  [default: one per core]")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option(
    "--license", "licence", metavar="FILE", type=click.Path(path_type=Path),
    help="Text of the weights' licence, written as LICENSE.  [default: the source's]",
)  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Show sizes, shards and what fits; write nothing.")
@click.option("--force", is_flag=True, help="Start afresh in a folder that another quantize run wrote.")
def command(
    source: Path,
    out: Path | None,
    int4: bool,
    fp8: bool,
    mixed: bool,
    shared_experts: bool,
    attention: str,
    group_size: int,
    scale: str | None,
    format_: str,
    memory: str,
    jobs: int | None,
    device: str,
    licence: Path | None,
    dry_run: bool,
    force: bool,
) -> None:
    """Quantize the Llama 4 checkpoint in SRC (Hugging Face layout).

    Interrupted or killed, the same command carries on where it stopped.
    """
    from l4tool.core.sizes import parse_bytes

    memory_bytes = parse_bytes(memory)
    schemes = [name for name, asked in (("int4", int4), ("fp8", fp8), ("mixed", mixed)) if asked]
    if len(schemes) != 1:
        told = f"--{' and --'.join(schemes)} exclude each other" if schemes else "what shall it become?"
        raise UsageError(told, hint="give one of --int4, --fp8 and --mixed")
    if out is None and not dry_run:
        raise UsageError("where shall it go?", hint="add -o OUT, a new folder")
    from converters.detect import open_checkpoint
    from quant import pipeline, report
    from quant.schemes import make_recipe

    recipe = make_recipe(schemes[0], shared_experts, attention, group_size, scale, format_)
    options = pipeline.Options(
        memory_bytes=memory_bytes,
        jobs=jobs,
        device=device,
        force=force,
        licence=licence,
        command=" ".join(["l4tool", *sys.argv[1:]]),
    )
    reader = open_checkpoint(source)
    try:
        if out is None or dry_run:
            plan, budget = pipeline.prepare(reader, None, recipe, options)
            click.echo(report.render_plan(reader, recipe, plan, budget))
        else:
            click.echo(report.render(pipeline.quantize(reader, out, recipe, options)))
    finally:
        reader.close()
