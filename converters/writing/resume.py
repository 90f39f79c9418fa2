"""What an earlier run of the same job left in the output: only what is untouched, or was read again, counts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from converters.writer import ShardPlan, exists
from converters.writing.hashing import shard_digest, tensor_digests
from converters.writing.journal import Journaled
from converters.writing.plan import Item, Plan
from l4tool.core.atomic import fsync_dir, part_path, write_errors


def take_up(out: Path, plan: Plan, before: Journaled) -> Journaled:
    """The journal, less what is not there any more or has changed since.

    Finished shards count by size, header and mtime, or by their digest where the mtime is another. Tensors of other
    shards are hashed. A shard that has its final name without being finished (killed between rename and journal, or
    damaged since) becomes a `.part` again, so that its sound tensors count too.
    """
    tensors: dict[str, dict[str, dict[str, Any]]] = {}
    shards: dict[str, dict[str, Any]] = {}
    for shard, items in zip(plan.shards, plan.items, strict=True):
        entries = before.tensors.get(shard.file_name, {})
        if _untouched(out, shard, before.shards.get(shard.file_name)):
            shards[shard.file_name] = before.shards[shard.file_name]
            tensors[shard.file_name] = entries
        elif entries:
            _reopen(out / shard.file_name, exists(out, shard))
            tensors[shard.file_name] = _sound(out, shard, items, entries)
    return Journaled(before.job, tensors, shards, before.size)


def _untouched(out: Path, shard: ShardPlan, entry: dict[str, Any] | None) -> bool:
    if entry is None or not exists(out, shard):
        return False
    path = out / shard.file_name
    return path.stat().st_mtime_ns == entry["mtime_ns"] or shard_digest(path, shard) == entry["digest"]


def _reopen(path: Path, usable: bool) -> None:
    if usable and not part_path(path).exists():
        with write_errors(path):
            os.replace(path, part_path(path))
            fsync_dir(path.parent)


def _sound(
    out: Path, shard: ShardPlan, items: list[Item], entries: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """The journaled tensors whose bytes are in the `.part` file."""
    part = part_path(out / shard.file_name)
    if not exists(out, shard, part):
        return {}
    journaled = [item for item in items if item.info.name in entries]
    found = tensor_digests(part, shard, [name for item in journaled for name in item.parts])
    same = (item for item in journaled if [found[name] for name in item.parts] == entries[item.info.name]["sha256"])
    return {item.info.name: entries[item.info.name] for item in same}
