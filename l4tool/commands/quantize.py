"""`l4tool quantize`: options, one call, what is printed."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from l4tool.core.errors import InputMissing, UsageError

if TYPE_CHECKING:
    from quant import pipeline
    from quant.schemes import Recipe

RECIPE_OPTIONS = ("shared_experts", "attention", "group_size", "scale", "format")


@click.command("quantize", short_help="Quantize a Llama 4 checkpoint to INT4, FP8 or a mix of both.")
@click.argument("source", metavar="SRC")
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
    "--format", type=click.Choice(["compressed-tensors", "quanto"]), default="compressed-tensors",
    show_default=True, help="Layout of the output.",
)  # fmt: skip
@click.option("--memory", default="8GiB", show_default=True, help="Most memory to use, page cache not counted.")
@click.option("--jobs", type=click.IntRange(1), help="Tensors worked on at once.  [default: one per core]")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option(
    "--license", "licence", metavar="FILE", type=click.Path(path_type=Path),
    help="Text of the weights' licence, written as LICENSE.  [default: the source's]",
)  # fmt: skip
@click.option(
    "--keep-source", metavar="DIR", type=click.Path(path_type=Path, file_okay=False),
    help="Keep a repository's files in DIR instead of deleting each shard once it is used up.",
)  # fmt: skip
@click.option(
    "--ahead", type=click.IntRange(1, 16), default=2, show_default=True,
    help="Shards to download beyond the one that is being quantized.",
)  # fmt: skip
@click.option("--accept-license", is_flag=True, help="Accept the model's licence without being asked (for cron).")
@click.option("--dry-run", is_flag=True, help="Show sizes, shards and what fits; write nothing.")
@click.option("--force", is_flag=True, help="Start afresh in a folder that another quantize run wrote.")
def command(source: str, out: Path | None, dry_run: bool, **options: Any) -> None:
    """Quantize the Llama 4 checkpoint SRC: a folder, or a repository (scout, org/name, org/name@revision).

    A repository that is not on this machine is downloaded shard by shard, each deleted once it is used up.
    Interrupted or killed, the same command carries on where it stopped.
    """
    from l4tool.core.sizes import parse_bytes

    memory_bytes = parse_bytes(options["memory"])
    schemes = [name for name in ("int4", "fp8", "mixed") if options[name]]
    if len(schemes) != 1:
        told = f"--{' and --'.join(schemes)} exclude each other" if schemes else "what shall it become?"
        raise UsageError(told, hint="give one of --int4, --fp8 and --mixed")
    if out is None and not dry_run:
        raise UsageError("where shall it go?", hint="add -o OUT, a new folder")
    from quant import pipeline, report
    from quant.schemes import make_recipe

    recipe = make_recipe(schemes[0], **{name: options[name] for name in RECIPE_OPTIONS})
    how = pipeline.Options(
        memory_bytes=memory_bytes,
        command=" ".join(["l4tool", *sys.argv[1:]]),
        **{name: options[name] for name in ("jobs", "device", "force", "licence")},
    )
    if out is None or dry_run:
        from converters.opening import open_headers

        with contextlib.closing(open_headers(source)) as reader:
            click.echo(report.render_plan(reader, recipe, *pipeline.prepare(reader, None, recipe, how)))
    else:
        folder = _folder(source, out, options["keep_source"])
        if folder is not None:
            result = _from_folder(folder, out, recipe, how)
        else:
            result = _from_repo(source, out, recipe, how, options)
        click.echo(report.render(result))


def _from_folder(folder: Path, out: Path, recipe: Recipe, how: pipeline.Options) -> dict[str, Any]:
    from converters.detect import open_checkpoint
    from quant import pipeline

    with contextlib.closing(open_checkpoint(folder)) as reader:
        return pipeline.quantize(reader, out, recipe, how)


def _from_repo(
    source: str, out: Path, recipe: Recipe, how: pipeline.Options, options: dict[str, Any]
) -> dict[str, Any]:
    from l4tool.hub.client import Hub
    from l4tool.hub.names import parse_repo
    from quant.from_hub import Download, quantize_repo

    download = Download(options["ahead"], options["keep_source"], options["accept_license"])
    return quantize_repo(Hub(), parse_repo(source), out, recipe, how, download)


def _folder(source: str, out: Path, keep: Path | None) -> Path | None:
    """The folder to read from, or None for a repository that has to be downloaded."""
    from converters.writing.journal import begun_from_repo
    from l4tool.hub.local import locate
    from l4tool.hub.names import is_repo

    if not is_repo(source):
        if not Path(source).exists():
            hint = "give a checkpoint folder, a short name such as scout, or org/name"
            raise InputMissing(f"{source!r} is neither a folder nor a repository", hint=hint)
        return Path(source)
    return None if keep is not None or begun_from_repo(out) else locate(source)
