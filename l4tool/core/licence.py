"""The Llama 4 Community License: its facts, which checkpoints are under it, and its acceptance before a download.

The licence's own text is not here: every repository of Meta's holds it, and it travels with the weights.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from l4tool.core.atomic import write_errors, write_file
from l4tool.core.console import note
from l4tool.core.errors import AccessDenied, WriteError

FAMILY = "llama4"  # `license_name` on the hub, and the key under which an acceptance is remembered
NAME = "Llama 4 Community License"
OWNER = "Meta Platforms, Inc."
LICENCE_URL = "https://www.llama.com/llama4/license/"
POLICY_URL = "https://www.llama.com/llama4/use-policy/"
NOTICE = (
    "Llama 4 is licensed under the Llama 4 Community License, "
    "Copyright © Meta Platforms, Inc. All Rights Reserved."
)  # fmt: skip
BUILT_WITH = "Built with Llama"
NAME_PREFIX = "Llama"
EU_CLAUSE = (
    "For multimodal models it gives no rights to individuals domiciled in the European Union or companies "
    "with their principal place of business there; end users of products are excepted."
)
USERS_CLAUSE = "Whoever had more than 700 million monthly users when Llama 4 was released must ask Meta for a licence."
OUTPUTS_DUTY = (
    "A model that is made or improved with these weights or their outputs, and given to others, must have a name that "
    f'begins with "{NAME_PREFIX}".'
)  # fmt: skip

ACCEPT_ENV = "L4TOOL_ACCEPT_LICENSE"
ACCEPTED_FILE = "accepted-licences.json"
_SAYS_NOTHING = ("", "other", "unknown")
_LLAMA_4 = re.compile(r"llama[-_ ]?4(?![0-9])", re.IGNORECASE)
_LICENCE_TITLE = re.compile(r"llama\s+4\s+community\s+license", re.IGNORECASE)
_META_LLAMA_4 = re.compile(r"meta-llama/llama-4(?![0-9])", re.IGNORECASE)


def front_matter(text: str) -> dict[str, Any]:
    """The YAML block that a model card begins with; {} where there is none, or none that can be read."""
    block = re.match(r"\ufeff?\s*---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", text, re.DOTALL | re.MULTILINE)
    if block is None:
        return {}
    import yaml  # comes with huggingface-hub

    try:
        values = yaml.safe_load(block.group(1))
    except (yaml.YAMLError, ValueError, RecursionError):  # ValueError: a date such as 2025-13-45
        return {}
    return values if isinstance(values, dict) else {}


def licence_id(card: Mapping[str, Any]) -> str:
    """What a card's metadata name as its licence, such as "llama4" or "apache-2.0"; "" where they name none."""
    given = card.get("license")
    if isinstance(given, list):
        given = given[0] if given else None
    given = str(given or "").strip().lower()
    return given if given not in _SAYS_NOTHING else str(card.get("license_name") or "").strip().lower()


def is_llama(
    card: Mapping[str, Any], repo_id: str = "", licence_text: str = "", llama_architecture: bool = False
) -> bool:
    """Is a checkpoint under the Llama 4 licence?

    `card`: model card metadata; `licence_text`: its LICENSE file; `llama_architecture`: config.json says Llama 4.
    Anything that points to Meta's weights (licence, repository, base model, licence text) says yes, even against
    another licence in the card: a derivative that somebody relabelled is still a derivative. Otherwise a licence that
    the card or the text names says no. Where nothing is said, the architecture decides: nearly all weights of this
    shape are Meta's or made from them, and a NOTICE too many does no harm, while a missing one breaks the licence.
    """
    named = licence_id(card)
    if _LLAMA_4.search(named) or _META_LLAMA_4.match(repo_id) or is_licence_text(licence_text):
        return True
    bases = card.get("base_model") or []
    if any(_META_LLAMA_4.match(str(base)) for base in (bases if isinstance(bases, list) else [bases])):
        return True
    if named or licence_text.strip():
        return False
    return llama_architecture or repo_id.lower().startswith("meta-llama/") or bool(_LLAMA_4.search(repo_id))


def is_licence_text(text: str) -> bool:
    """True for a text that holds the Llama 4 licence."""
    return bool(_LICENCE_TITLE.search(text))


def gate_text(repo_id: str) -> str:
    """What a user reads before the first download."""
    return "\n".join(
        (
            f"{repo_id} is under the {NAME} of {OWNER}: {LICENCE_URL}",
            f"  - {EU_CLAUSE}",
            f"  - {USERS_CLAUSE}",
            f"  - Use must follow the Acceptable Use Policy: {POLICY_URL}",
            f'  - Copies and derivatives carry the licence, its notice and "{BUILT_WITH}", and a name that begins with '
            f'"{NAME_PREFIX}".',
        )
    )


def accept(repo_id: str, asked: bool) -> None:
    """Make sure that the user has accepted the licence; silent when this was remembered from an earlier time.

    Otherwise the gate is shown on stderr. `asked` (--accept-license) or L4TOOL_ACCEPT_LICENSE=1 accepts; without
    either a terminal is asked. Raises AccessDenied when the answer is no, or when there is nobody to ask.
    """
    path = accepted_path()
    if _accepted(path):
        return
    note(gate_text(repo_id))
    if asked or os.environ.get(ACCEPT_ENV, "").strip().lower() in ("1", "true", "yes", "on"):
        note("accepted by " + ("--accept-license" if asked else f"{ACCEPT_ENV} in the environment"))
    elif not (sys.stdin and sys.stdin.isatty() and sys.stderr.isatty()):
        raise AccessDenied(
            f"{repo_id}: the {NAME} has not been accepted yet, and there is no terminal to ask",
            hint=f"read {LICENCE_URL}, then add --accept-license, or set {ACCEPT_ENV}=1",
        )
    elif not _ask():
        raise AccessDenied(f"{repo_id}: the {NAME} was not accepted", hint=f"read it at {LICENCE_URL}")
    _remember(path, repo_id)


def accepted_path() -> Path | None:
    """Where acceptances are remembered: $XDG_CONFIG_HOME/l4tool, else ~/.config/l4tool; None without a home."""
    base = os.environ.get("XDG_CONFIG_HOME", "")
    try:
        config = Path(base) if os.path.isabs(base) else Path.home() / ".config"  # a relative one is to be ignored
    except RuntimeError:
        return None
    return config / "l4tool" / ACCEPTED_FILE


def _ask() -> bool:
    print("Do you accept the licence? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _read_accepted(path: Path | None) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes()) if path is not None else {}
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _accepted(path: Path | None) -> bool:
    return FAMILY in _read_accepted(path)


def _remember(path: Path | None, repo_id: str) -> None:
    """Write it down for the next time; where that fails, only say so."""
    if path is None:
        note("this cannot be remembered: there is no home directory")
        return
    entry = {"license": NAME, "repo": repo_id, "accepted": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    try:
        with write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, json.dumps(_read_accepted(path) | {FAMILY: entry}, indent=2) + "\n")
    except WriteError as error:
        if not _accepted(path):  # another process was faster
            note(f"this cannot be remembered, so next time it is asked again: {error.message}")
