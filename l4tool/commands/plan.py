"""`l4tool plan`: options, one call, what is printed."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from l4tool.core.errors import DeviceError, UsageError

if TYPE_CHECKING:
    from converters.reader import Reader
    from quant.fitting import Demand
    from quant.outlook import Outlook, Question

DEFAULT_CONTEXT = 8192
SCHEMES = ("int4", "mixed", "fp8")


@click.command("plan", short_help="Show what fits where: disk, RAM, GPU memory, KV tokens.")
@click.argument("model", metavar="MODEL")
@click.option("--int4", is_flag=True, help="In detail: INT4 routed and shared experts.")
@click.option("--mixed", is_flag=True, help="In detail: INT4 routed experts, FP8 shared experts.")
@click.option("--fp8", is_flag=True, help="In detail: FP8 per channel.")
@click.option("--shared-experts/--no-shared-experts", default=True, help="Quantize shared experts too.  [default: yes]")
@click.option("--attention", type=click.Choice(["bf16", "fp8"]), default="bf16", show_default=True)
@click.option("--group-size", type=int, default=128, show_default=True, help="Inputs that share one INT4 scale.")
@click.option("--gpu", default="h100", show_default=True, help="A name (h200, a100-40, …) or usable memory (24GiB).")
@click.option("--gpus", type=click.IntRange(1, 1024), default=1, show_default=True, help="How many of them.")
@click.option("--context", help="Tokens of one sequence, prompt and answer: 8k, 128K, 1M.  [default: 8k]")
@click.option("--concurrency", type=click.IntRange(1, 10**6), default=1, show_default=True, help="Sequences at once.")
@click.option("--kv-dtype", type=click.Choice(["auto", "fp8"]), default="auto", show_default=True,
              help="What batch is to keep keys and values in; fp8 needs a CUDA device.")  # fmt: skip
@click.option("--memory", default="8GiB", show_default=True, help="Most memory that quantize may use.")
@click.option("--jobs", type=click.IntRange(1), help="Tensors quantized at once.  [default: one per core]")
@click.option("--disk-speed", metavar="SIZE", help="What the disk reads and writes per second: 500MB, 2GB.")
@click.option("--json", "as_json", is_flag=True, help="The whole answer as JSON.")
@click.option("--check", is_flag=True, help="Exit with 69 when nothing fits.")
def command(model: str, as_json: bool, check: bool, **options: Any) -> None:
    """Show what MODEL needs on disk, in memory and on GPUs, from its headers alone.

    MODEL is a checkpoint folder, a repository (scout, org/name@revision; a few KB are read), or a config.json.
    Without a scheme, all of them side by side.
    """
    question = _question(options)
    schemes = [name for name in SCHEMES if options[name]]
    if len(schemes) > 1:
        raise UsageError(f"--{' and --'.join(schemes)} exclude each other", hint="leave all away to compare them")
    from converters.opening import open_headers
    from quant import outlook, outlook_text

    reader = open_headers(model, config_alone=True)
    try:
        question = replace(question, demand=_demand(question.demand, options["context"] is None, reader))
        outlooks = _outlooks(reader, schemes, options, question)
        facts = _facts(model, reader)
    finally:
        reader.close()
    if as_json:
        click.echo(json.dumps(outlook.as_json(facts, outlooks, question), indent=2))
    else:
        click.echo(outlook_text.render(facts, outlooks, question))
    if check and not any(found.fitting.fits for found in outlooks):
        raise DeviceError(f"{model} does not fit {question.hardware} as asked")


def _question(options: dict[str, Any]) -> Question:
    """Options → Question; whatever is wrong with them is said before the model is opened."""
    from l4tool.core.sizes import parse_bytes, parse_tokens
    from quant.fitting import Demand, Hardware
    from quant.gpus import parse_gpu
    from quant.outlook import Question

    disk = parse_bytes(options["disk_speed"]) if options["disk_speed"] is not None else None
    if disk == 0:
        raise UsageError("a disk speed of 0 never ends", hint="write for example --disk-speed 500MB")
    context = parse_tokens(options["context"]) if options["context"] is not None else DEFAULT_CONTEXT
    return Question(
        Hardware(parse_gpu(options["gpu"]), options["gpus"]),
        Demand(context, options["concurrency"], options["kv_dtype"]),
        parse_bytes(options["memory"]),
        options["jobs"],
        disk,
    )


def _demand(demand: Demand, is_default: bool, reader: Reader) -> Demand:
    """The default context is at most the model's own; an asked one that is longer is an error."""
    longest = reader.arch.text.max_position_embeddings
    if demand.context_tokens <= longest:
        return demand
    if not is_default:
        raise UsageError(
            f"--context {demand.context_tokens:,} is more than the {longest:,} tokens that {reader.path} can have",
            hint=f"use --context {longest} or less",
        )
    return replace(demand, context_tokens=longest)


def _outlooks(reader: Reader, schemes: list[str], options: dict[str, Any], question: Question) -> list[Outlook]:
    """The checkpoint as it is, or one scheme, or all that apply."""
    from quant import outlook
    from quant.schemes import make_recipe

    if reader.quantization is not None:
        for scheme in schemes:
            outlook.require_unquantized(reader, scheme)
        return [outlook.stored(reader, question)]

    def under(scheme: str) -> Outlook:
        shared = options["shared_experts"] or (scheme == "mixed" and scheme not in schemes)
        recipe = make_recipe(scheme, shared, options["attention"], options["group_size"])
        return outlook.quantized(reader, recipe, question)

    found = [under(scheme) for scheme in schemes] or [outlook.stored(reader, question), *map(under, SCHEMES)]
    if all(each.fitting.fits for each in found):
        return found
    others = [under(scheme) for scheme in SCHEMES if scheme not in schemes] if schemes else found
    return outlook.with_schemes_that_fit(found, others)


def _facts(name: str, reader: Reader) -> dict[str, Any]:
    """The model, for the title and for JSON."""
    from quant.outlook import num_parameters, source_file_bytes

    text = reader.arch.text
    return {
        "name": name,
        "layout": reader.layout,
        "quantized": reader.quantization is not None,
        "dtype": reader.arch.dtype,
        "parameters": num_parameters(reader),
        "layers": text.num_layers,
        "experts": text.num_experts,
        "context_tokens": text.max_position_embeddings,
        "file_bytes": source_file_bytes(reader),
    }
