"""`l4tool fetch`: options, one call, and where the files are."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from l4tool.core.errors import InputMissing, UsageError


@click.command("fetch", short_help="Download a Llama 4 checkpoint: resumable, every byte checked.")
@click.argument("repo", metavar="REPO[@REVISION]", required=False)
@click.option("-o", "--out", type=click.Path(path_type=Path, file_okay=False), metavar="DIR",
              help="Folder to fill.  [default: the shared Hugging Face cache]")  # fmt: skip
@click.option("--include", multiple=True, metavar="GLOB", help="Only files like this; repeatable.")
@click.option("--exclude", multiple=True, metavar="GLOB", help="No files like this; repeatable.")
@click.option("--layout", type=click.Choice(["hf", "meta"]), default="hf", show_default=True,
              help="Hugging Face files, or those in Meta's own layout.")  # fmt: skip
@click.option("--jobs", type=click.IntRange(1, 64), default=8, show_default=True, help="Files at the same time.")
@click.option("--dry-run", is_flag=True, help="Show files, sizes and what is missing; fetch nothing.")
@click.option("--verify", is_flag=True, help="Read every file that is there again and compare its hash.")
@click.option("--token", metavar="TOKEN", help="@FILE or - (stdin); better set HF_TOKEN or run `hf auth login`.")
@click.option("--timeout", "timeout_s", type=click.FloatRange(0.1), default=30, show_default=True, metavar="SECONDS",
              help="A connection silent for this long is given up and tried again.")  # fmt: skip
@click.option("--retries", type=click.IntRange(0), default=5, show_default=True,
              help="New attempts in a row without progress.")  # fmt: skip
@click.option("--wait", is_flag=True, help="Wait for another fetch of the same target instead of exiting with 75.")
@click.option("--xet", is_flag=True, help="Try Xet first (not resumable); over HTTP as soon as it stalls.")
@click.option("--accept-license", is_flag=True, help="Accept the model's licence without being asked (for cron).")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON instead of the folder.")
@click.option("--list", "list_models", is_flag=True, help="List the short names and exit.")
def command(
    repo: str | None, list_models: bool, dry_run: bool, as_json: bool, out: Path | None, **options: Any
) -> None:
    """Download a Llama 4 checkpoint: whole, checked, and resumed where an earlier run stopped.

    REPO is a short name (see --list) or org/name. The last line, on stdout, is the folder that holds the files.
    """
    if list_models:
        click.echo(_models())
        return
    if repo is None:
        raise UsageError("which model?", hint="try `l4tool fetch --list`")
    from l4tool.hub.fetch import Options, fetch, preview
    from l4tool.hub.transport import RetryPolicy

    policy = RetryPolicy(attempts=options.pop("retries") + 1)
    choice = Options(token=_token(options.pop("token")), policy=policy, **options)
    if dry_run:
        click.echo(preview(repo, out, choice))
        return
    result = fetch(repo, out, choice)
    click.echo(json.dumps(result.as_json()) if as_json else result.folder)


def _models() -> str:
    """The table of short names."""
    from l4tool.core.console import table
    from l4tool.core.sizes import format_bytes
    from l4tool.hub.names import LICENCE, MODELS

    rows = [(m.name, m.repo_id, m.text, f"about {format_bytes(m.size_bytes)}", LICENCE) for m in MODELS]
    header = ("name", "repository (with --layout meta: …-Original)", "what", "weights", "licence")
    return table(rows, header=header)


def _token(text: str | None) -> str | None:
    """A token as given, from @FILE, or from stdin with `-`."""
    if text is None or not (text == "-" or text.startswith("@")):
        return text
    try:
        token = sys.stdin.read() if text == "-" else Path(text[1:]).expanduser().read_text()
    except (OSError, ValueError) as error:
        raise InputMissing(
            f"the token cannot be read from {text[1:]}", hint="--token @FILE, or set HF_TOKEN"
        ) from error
    if not token.strip():
        raise UsageError("the token is empty", hint="--token @FILE, or set HF_TOKEN")
    return token.strip()
