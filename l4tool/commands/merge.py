"""`l4tool merge`: the outputs of all shards of one batch, checked, as one file in input order."""

from __future__ import annotations

from pathlib import Path

import click

_PATH = click.Path(path_type=Path)


@click.command("merge", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("outputs", nargs=-1, required=True, type=_PATH, metavar="OUT.jsonl...")
@click.option("-o", "--output", required=True, type=_PATH, metavar="FILE", help="Write all lines there.")
@click.option("--errors", type=_PATH, metavar="FILE", help="Write error lines there instead.")
@click.option("--partial", is_flag=True, help="Write what there is, and say what is missing.")
@click.option("--force", is_flag=True, help="Overwrite FILE.")
def command(outputs: tuple[Path, ...], output: Path, errors: Path | None, partial: bool, force: bool) -> int:
    """Put the outputs of `l4tool batch --shard I/N` together, in the order of the input.

    Each OUT.jsonl has its journal beside it. They are checked to be complete, of one run and one input, with no id
    twice; every line is compared with its checksum. What is missing is named. FILE appears only when it is whole.
    """
    from batch.merge import merge
    from l4tool.core.console import note

    merged = merge(outputs, output, errors, partial, force)
    note(merged.as_table())
    return merged.exit_code
