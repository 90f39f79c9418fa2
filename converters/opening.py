"""What people name as a model: a checkpoint folder, a repository, or a config alone → a reader of its headers."""

from __future__ import annotations

import os
from pathlib import Path

from converters.config_only import ConfigOnly
from converters.detect import open_checkpoint
from converters.reader import Reader
from l4tool.core.errors import InputMissing
from l4tool.hub.local import locate
from l4tool.hub.names import is_repo, parse_repo


def open_headers(text: str, config_alone: bool = False) -> Reader:
    """Open a folder, a repository (a short name, org/name, org/name@revision) or, if allowed, a config.json.

    A repository that is complete in the shared cache is opened there. Of any other only headers and small files are
    read, and kept in the user's cache; its weights cannot be read.
    Raises InputMissing, CheckpointError, and the hub's errors.
    """
    folder = locate(text) if text else None
    if folder is not None:
        return open_checkpoint(folder)
    if os.path.isfile(text):
        if config_alone and text.endswith(".json"):
            return ConfigOnly(Path(text))
        raise InputMissing(f"{text} is a file, not a checkpoint folder", hint="give the folder that holds config.json")
    if not is_repo(text):
        what = "a folder, a config.json nor a repository" if config_alone else "a folder nor a repository"
        raise InputMissing(
            f"{text!r} is neither {what}", hint="give a checkpoint folder, a short name such as scout, or org/name"
        )
    from l4tool.hub.client import Hub
    from l4tool.hub.skeleton import cached_skeleton

    hub = Hub()
    return open_checkpoint(cached_skeleton(hub, hub.snapshot(parse_repo(text))))
