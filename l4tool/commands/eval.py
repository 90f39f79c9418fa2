"""`l4tool eval`: options, one call, and the figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from l4tool.commands.batch import Size

_PATH = click.Path(path_type=Path)


@click.command("eval", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model", metavar="MODEL")
@click.option("--data", required=True, metavar="FILE.jsonl", help="What to ask and what is right; see above.")
@click.option("--against", metavar="OTHER", help="Another checkpoint with the same tokenizer, to compare with.")
@click.option("-o", "--output", type=_PATH, metavar="OUT.jsonl",
              help="One line for each line; with it, an interrupted run carries on.")  # fmt: skip
@click.option("--json", "as_json", type=_PATH, metavar="FILE", help="Write the figures as JSON, too; - for stdout.")
@click.option("--max-tokens", type=click.IntRange(1), help="Longest answer in tokens.  [default: 1024]")
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Only the first N lines.")
@click.option("--image-root", type=click.Path(path_type=Path, exists=True, file_okay=False), metavar="DIR",
              help="Folder that pictures may lie in.  [default: FILE.jsonl's]")  # fmt: skip
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--dtype", type=click.Choice(["auto", "bfloat16", "float32"]), default="auto", show_default=True)
@click.option("--weights", type=click.Choice(["memory", "stream"]), default="memory", show_default=True,
              help="stream: read layers from disk while it runs, for checkpoints larger than memory.")  # fmt: skip
@click.option("--memory", type=Size(), metavar="SIZE",
              help="With --weights stream: what the process may take.  [default: most of what is free]")  # fmt: skip
@click.option("--activations", type=click.Choice(["auto", "int8"]), default="auto", show_default=True,
              help="MODEL's: int8 is faster with INT4 weights on a CPU, slightly less exact.")  # fmt: skip
@click.option("--kv-dtype", type=click.Choice(["auto", "fp8"]), default="auto", show_default=True,
              help="MODEL's: fp8 holds twice the tokens in the same memory, on a CUDA device.")  # fmt: skip
@click.option("--max-batch-tokens", type=click.IntRange(1), help="Tokens computed in one step.")
@click.option("--kv-memory", type=Size(), metavar="SIZE", help="Memory of each model's KV cache, such as 4GiB.")
@click.option("--max-seqs", type=click.IntRange(1), help="Lines in work at the same time.")
@click.option("--prefix-cache/--no-prefix-cache", default=True, show_default=True,
              help="Compute the beginning that lines have in common, and their pictures, only once.")  # fmt: skip
@click.option("--wait", is_flag=True, help="Wait while another run writes OUT.jsonl.")
@click.option("--force", is_flag=True, help="Start over: what OUT.jsonl holds is lost.")
def command(**options: Any) -> int:
    """Score MODEL's answers, and how far it is from OTHER (say, quantized against bfloat16).

    Each line of FILE.jsonl is a request as `l4tool batch` takes it with "answer", a string or a list of accepted
    strings, and optionally "task", a name; or {"text": "…"}, of which only tokens are scored. It may be compressed,
    - for standard input, or a URL.

    Printed for each task and for all lines: how often the greedy answer is right, the perplexity of the reference, and
    with --against KL(OTHER ‖ MODEL) in nats a token and how often both have the same best token.
    """
    from batch.evaluation.job import EvalOptions, run_eval
    from batch.generation import SamplingOptions
    from batch.job import BatchOptions
    from batch.remote import is_url
    from batch.state import StateOptions
    from l4tool.core.console import note
    from l4tool.hub.local import require_local

    data, output, as_json = options.pop("data"), options.pop("output"), options.pop("as_json")
    model, against = require_local(options.pop("model")), options.pop("against")
    run = BatchOptions(
        data if is_url(data) else Path(data), Path(), model,
        sampling=SamplingOptions(max_tokens=options.pop("max_tokens"), temperature=0.0),
        state=StateOptions(force=options.pop("force"), wait=options.pop("wait")),
        kv_memory_bytes=options.pop("kv_memory"), memory_bytes=options.pop("memory"), **options,
    )  # fmt: skip
    found = run_eval(EvalOptions(run, None if against is None else require_local(against), as_json, output))
    note(found.summary.as_table(), "summary", exit_code=found.exit_code, summary=found.summary.as_json())
    click.echo(found.as_json() if str(as_json) == "-" else found.figures.as_table(), nl=str(as_json) != "-")
    return found.exit_code
