"""`l4tool batch`: options, one call, and the table at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

_PATH = click.Path(path_type=Path)


class Size(click.ParamType):
    """A byte size as people write it: 4GiB, 500MB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        from l4tool.core.errors import UsageError
        from l4tool.core.sizes import parse_bytes

        if isinstance(value, int):
            return value
        try:
            size = parse_bytes(str(value))
        except UsageError as error:
            self.fail(f"{error.message} ({error.hint})", param, ctx)
        if size <= 0:
            self.fail("must be more than 0", param, ctx)
        return size


@click.command("batch", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("input", metavar="IN.jsonl")
@click.argument("output", metavar="OUT.jsonl", required=False)
@click.option("--model", required=True, help="Checkpoint folder, quantized or not; or a fetched repository's name.")
@click.option("--max-tokens", type=click.IntRange(1), help="Longest answer in tokens.  [default: 1024]")
@click.option("--temperature", type=click.FloatRange(0, 100), help="0 is greedy.")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), help="Nucleus sampling; 1 is off.")
@click.option("--top-k", type=click.IntRange(-1), help="Only the k likeliest tokens; 0 is off.")
@click.option("--min-p", type=click.FloatRange(0, 1), help="Only tokens this likely relative to the best; 0 is off.")
@click.option("--seed", type=click.IntRange(-(2**63), 2**63 - 1), default=0, show_default=True,
              help="Together with a line's own content, the seed of lines that give none.")  # fmt: skip
@click.option("--stop", multiple=True, metavar="TEXT", help="Text that ends an answer; repeatable.")
@click.option("--max-batch-tokens", type=click.IntRange(1), help="Tokens computed in one step.")
@click.option("--kv-memory", type=Size(), metavar="SIZE", help="Memory of the KV cache, such as 4GiB.")
@click.option("--max-seqs", type=click.IntRange(1), help="Answers in work at the same time.")
@click.option("--prefix-cache/--no-prefix-cache", default=True, show_default=True,
              help="Compute the beginning that lines have in common, and their pictures, only once.")  # fmt: skip
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--dtype", type=click.Choice(["auto", "bfloat16", "float32"]), default="auto", show_default=True)
@click.option("--weights", type=click.Choice(["memory", "stream"]), default="memory", show_default=True,
              help="stream: read layers from disk while it runs, for checkpoints larger than memory.")  # fmt: skip
@click.option("--memory", type=Size(), metavar="SIZE",
              help="With --weights stream: what the process may take.  [default: most of what is free]")  # fmt: skip
@click.option("--activations", type=click.Choice(["auto", "int8"]), default="auto", show_default=True,
              help="int8: faster products with INT4 weights on a CPU, slightly less exact.")  # fmt: skip
@click.option("--kv-dtype", type=click.Choice(["auto", "fp8"]), default="auto", show_default=True,
              help="fp8 holds twice the tokens in the same memory, on a CUDA device; slightly less exact.")  # fmt: skip
@click.option("--workers", type=click.IntRange(1), default=1, show_default=True, metavar="N",
              help="Processes that compute: one CUDA device each, or the CPU cores split.")  # fmt: skip
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Only the first N lines.")
@click.option("--shard", metavar="I/N", help="Only part I of N of the lines; `l4tool merge` puts the outputs together.")
@click.option("--max-images", type=click.IntRange(0), default=48, show_default=True, help="Images allowed in one line.")
@click.option("--image-root", type=click.Path(path_type=Path, exists=True, file_okay=False), metavar="DIR",
              help="Folder that pictures may lie in.  [default: IN.jsonl's]")  # fmt: skip
@click.option("--allow-url-images", is_flag=True, help="Fetch pictures from public http and https servers.")
@click.option("--allow-host", "allow_hosts", multiple=True, metavar="HOST",
              help="Only from there: a name, *.suffix, or host:port, which may be private; repeatable.")  # fmt: skip
@click.option("--max-image-bytes", type=Size(), metavar="SIZE", default="20MiB", show_default=True,
              help="Largest picture fetched from the web.")  # fmt: skip
@click.option("--order", type=click.Choice(["completion", "input"]), default="completion", show_default=True,
              help="Order of the finished output; while it runs, lines come as they finish.")  # fmt: skip
@click.option("--errors", metavar="FILE", help="Write error lines there instead; with many inputs a folder.")
@click.option("--max-errors", metavar="N|P%", help="Give up after more error lines than this.")
@click.option("--retry-errors", is_flag=True, help="Run lines again that were answered with an error.")
@click.option("--duplicates", type=click.Choice(["error", "run-each"]), default="error", show_default=True,
              help="A second line with the same id: an error line, or run like any other.")  # fmt: skip
@click.option("--sync-lines", type=click.IntRange(1), default=1000, show_default=True,
              help="Lines that a power cut may cost at most.")  # fmt: skip
@click.option("--sync-seconds", type=click.FloatRange(0), default=5, show_default=True,
              help="Seconds of work that a power cut may cost at most.")  # fmt: skip
@click.option("--grace", type=click.FloatRange(0), default=30, show_default=True, metavar="SECONDS",
              help="After SIGTERM or Ctrl-C, time for what runs to finish.")  # fmt: skip
@click.option("--wait", is_flag=True, help="Wait while another run writes OUT.jsonl.")
@click.option("--force", is_flag=True, help="Start over: what OUT.jsonl holds is lost.")
@click.option("--summary", type=_PATH, metavar="FILE", help="Write the final figures as JSON.")
@click.option("--spool", type=_PATH, metavar="DIR",
              help="Where outputs for URLs are written until they are complete.  [default: in your cache]")  # fmt: skip
@click.option("--check", is_flag=True, help="Run nothing: look at every line, count tokens and images, name errors.")
@click.option("--rate", type=click.FloatRange(0, min_open=True), metavar="TOKENS",
              help="With --check: tokens out per second, to estimate the time; else --summary has it.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="With --check: print what was found as JSON.")
def command(**options: Any) -> int:
    """Answer every line of IN.jsonl, text and images, and write one line each to OUT.jsonl.

    IN.jsonl may be compressed (gzip, zstd), - for standard input, or a URL (s3://, gs://, hf://). A folder or a quoted
    pattern such as 'inbox/*.jsonl' runs many inputs; OUT.jsonl is then a folder.

    Lines are in OpenAI's batch form or the short form {"prompt": "…"}. Values that a line gives win over these
    options, and these over the checkpoint's generation_config.json. Answers are written as they finish.

    Interrupted or killed, the same command carries on: OUT.jsonl.journal, beside the output, knows what is done.
    """
    from batch.generation import SamplingOptions
    from batch.job import BatchOptions
    from batch.line_keys import Shard
    from batch.many import run_places
    from batch.places import Places
    from batch.state import StateOptions
    from batch.summary import MaxErrors
    from l4tool.core.console import note
    from l4tool.hub.local import require_local

    options["model"] = require_local(options["model"])
    if any(not text for text in options["stop"]):
        raise click.BadParameter("an empty text would stop everything", param_hint="--stop")
    sampling = SamplingOptions(
        **{name: options.pop(name) for name in ("max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop")}
    )
    state = StateOptions(
        run_each=options.pop("duplicates") == "run-each", sync_s=options.pop("sync_seconds"),
        **{name: options.pop(name) for name in ("force", "wait", "retry_errors", "sync_lines")},
    )  # fmt: skip
    max_errors, shard = options.pop("max_errors"), options.pop("shard")
    renamed = {
        "kv_memory_bytes": options.pop("kv_memory"),
        "memory_bytes": options.pop("memory"),
        "in_order": options.pop("order") == "input",
        "grace_s": options.pop("grace"),
        "max_errors": MaxErrors.parse(max_errors) if max_errors else None,
        "shard": Shard.parse(shard) if shard else None,
    }
    check, rate, as_json = (options.pop(name) for name in ("check", "rate", "as_json"))
    if check:
        return _check(sampling, state, renamed, options, rate, as_json)
    if rate is not None or as_json:
        raise click.UsageError("--rate and --json go with --check")
    if options["output"] is None:
        raise click.UsageError("Missing argument 'OUT.jsonl'.")
    places = Places(*(options.pop(name) for name in ("input", "output", "errors", "spool")))
    run = BatchOptions(Path(places.input), Path(places.output), sampling=sampling, state=state, **renamed, **options)
    summary = run_places(places, run)
    note(summary.as_table(), "summary", exit_code=summary.exit_code, summary=summary.as_json())
    return summary.exit_code


def _check(sampling: Any, state: Any, renamed: dict[str, Any], options: dict[str, Any], rate: float | None,
           as_json: bool) -> int:  # fmt: skip
    """--check: what was found goes to stdout."""
    import json

    from batch.check import check_inputs
    from batch.job import BatchOptions
    from batch.places import find_inputs, is_many

    source = options.pop("input")
    for name in ("output", "errors", "spool"):
        options.pop(name)
    run = BatchOptions(Path(source), Path(), sampling=sampling, state=state, **renamed, **options)
    found = check_inputs(find_inputs(source) if is_many(source) else [source], run, rate)
    click.echo(json.dumps(found.as_json(), indent=2, ensure_ascii=False) if as_json else found.as_table())
    return found.exit_code
