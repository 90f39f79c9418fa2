"""What `l4tool inspect` knows about a checkpoint, as one JSON object; headers and side files only.

The keys are an interface: programs read them. Sizes are bytes, lengths tokens.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
import re
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

from converters.companions import licence_facts, tokenizer_facts
from converters.folding import fold, ranges
from converters.names import canonical_shapes
from converters.piece_reader import PieceReader
from converters.quant_config import LinearFormat, parse_quantization
from converters.safetensors_io import DTYPE_NAMES
from converters.survey import LAYOUTS, META, QUANTO, Survey
from converters.table_reader import TableReader
from l4tool.core.arch import Arch
from l4tool.core.errors import L4Error, UsageError

CLASSES = {  # part of the name → class, the first that matches
    "vision_model.": "vision tower", "multi_modal_projector.": "projector", ".experts.": "routed experts",
    ".shared_expert.": "shared experts", ".router.": "router", ".feed_forward.": "dense MLPs",
    ".self_attn.": "attention", "embed_tokens": "embedding", "lm_head": "lm_head", "norm": "norms",
}  # fmt: skip


def inspect(found: Survey, stored_names: bool = False, wanted: str | None = None) -> dict[str, Any]:
    """Every fact about a surveyed checkpoint.

    `stored_names`: tensors as the files call and shape them, instead of canonically (one 2-D [out, in] tensor per
    Linear, experts apart); also where a tensor is not as it must be. `wanted`: a glob or /regex/ that narrows
    `tensors`. Raises UsageError for a bad one.
    """
    matches = matcher(wanted)
    faulty = any(finding.is_error and finding.tensor for finding in found.findings)
    tensors = _tensors(found, stored_names or faulty)
    kept = [entry for entry in tensors if matches(entry["name"]) or matches(entry["stored"])]
    return {
        "path": str(found.path),
        "layout": found.layout,
        "layout_name": LAYOUTS[found.layout],
        "bytes": sum(path.stat().st_size for path in _weight_files(found)),
        "architecture": None if found.arch is None else architecture(found.arch),
        "parameters": None if found.arch is None else parameters(found.arch),
        "params": found.config if found.layout == META else None,
        "quantization": _quantization(found),
        "tokenizer": tokenizer_facts(found.path),
        "licence": licence_facts(found.path),
        "classes": _classes(tensors),
        "kinds": _kinds(kept),
        "tensors": kept,
        "shards": _shards(found),
        "findings": [finding.as_json() for finding in found.findings],
    }


def matcher(wanted: str | None) -> Callable[[str], bool]:
    """'layers.0.*q_proj' (a glob, found anywhere in the name) or '/regex/' (the same) → predicate. UsageError."""
    if wanted is None:
        return lambda name: True
    if len(wanted) > 1 and wanted.startswith("/") and wanted.endswith("/"):
        try:
            pattern = re.compile(wanted[1:-1])
        except (re.error, RecursionError, OverflowError) as error:
            raise UsageError(f"--filter {wanted} is not a regular expression: {error}") from error
        return lambda name: pattern.search(name) is not None
    return lambda name: fnmatch.fnmatchcase(name, f"*{wanted}*")


def architecture(arch: Arch) -> dict[str, Any]:
    """Arch as a JSON object."""
    return dataclasses.asdict(arch)


def parameters(arch: Arch) -> dict[str, int]:
    """`total`; `active`: the language model's that one text token goes through (one routed expert of each MoE layer,
    embedding and lm_head whole, no vision); `vision`: tower, adapter and projector."""
    text, experts, vision = 0, 0, 0
    for name, shape in canonical_shapes(arch).items():
        count = math.prod(shape)
        if not name.startswith("language_model."):
            vision += count
        elif ".feed_forward.experts." in name:
            experts += count
        else:
            text += count
    active = text + experts * arch.text.experts_per_token // arch.text.num_experts
    return {"total": text + experts + vision, "active": active, "vision": vision}


def class_label(name: str) -> str:
    """The class that a tensor counts to in tables, by its canonical or stored name."""
    return next((label for part, label in CLASSES.items() if part in name), "other")


def _tensors(found: Survey, stored_names: bool) -> list[dict[str, Any]]:
    if found.foreign is not None:
        stored = found.foreign.stored_tensors() if stored_names else []
        return [_entry(t.name, t.name, t.shape, t.dtype, t.nbytes, t.file) for t in stored] or _canonical(found.foreign)
    if found.shards is None:
        return []
    if stored_names or found.reader is None:
        stored = sorted(found.shards.stored.values(), key=lambda tensor: (tensor.file.name, tensor.start))
        return [_entry(t.name, t.name, t.shape, t.dtype, t.nbytes, t.file) for t in stored]
    return _canonical(found.reader)


def _canonical(reader: TableReader | PieceReader) -> list[dict[str, Any]]:
    return [
        _entry(info.name, reader.stored_name(info.name), info.shape, info.dtype, info.nbytes, info.file)
        for info in reader.tensors().values()
    ]


def _entry(name: str, stored: str, shape: tuple[int, ...], dtype: Any, nbytes: int, file: Path) -> dict[str, Any]:
    return {
        "name": name, "stored": stored, "shape": list(shape), "dtype": DTYPE_NAMES[dtype], "bytes": nbytes,
        "file": file.name, "class": class_label(name),
    }  # fmt: skip


def _kinds(tensors: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry for tensors that differ in layer or expert alone."""
    by_name = {entry["name"]: entry for entry in tensors}
    key: dict[str, Hashable] = {name: (tuple(e["shape"]), e["dtype"]) for name, e in by_name.items()}
    return [
        {
            "pattern": one.pattern, "count": len(one.names), "shape": by_name[one.names[0]]["shape"],
            "dtype": by_name[one.names[0]]["dtype"], "bytes": sum(by_name[name]["bytes"] for name in one.names),
            "class": by_name[one.names[0]]["class"],
        }
        for one in fold(by_name, key)
    ]  # fmt: skip


def _classes(tensors: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tensors, bytes and dtypes of each class; the largest first."""
    classes: dict[str, dict[str, Any]] = {}
    for entry in tensors:
        one = classes.setdefault(entry["class"], {"class": entry["class"], "tensors": 0, "bytes": 0, "dtypes": []})
        one["tensors"] += 1
        one["bytes"] += entry["bytes"]
        if entry["dtype"] not in one["dtypes"]:
            one["dtypes"].append(entry["dtype"])
    return sorted(classes.values(), key=lambda one: -one["bytes"])


def _weight_files(found: Survey) -> list[Path]:
    if found.foreign is not None:
        return found.foreign.weight_files()
    if found.layout == META:
        return sorted(found.path.glob("consolidated.*.pth"))
    return sorted(found.shards.files) if found.shards is not None else []


def _shards(found: Survey) -> list[dict[str, Any]]:
    counts = {path: len(file.tensors) for path, file in found.shards.files.items()} if found.shards else {}
    return [
        {"file": path.name, "bytes": path.stat().st_size, "tensors": counts.get(path)} for path in _weight_files(found)
    ]


def _quantization(found: Survey) -> dict[str, Any] | None:
    """`method`, `groups` (what is stored how, in words), `ignore`; None for a checkpoint that is not quantized."""
    if found.layout == QUANTO:
        return {"method": "optimum-quanto", "groups": [{"scheme": "see quantization_map.json"}], "ignore": []}
    config = found.config.get("quantization_config")
    if not isinstance(config, dict):
        return None
    result: dict[str, Any] = {"method": config.get("quant_method"), "format": config.get("format"), "groups": []}
    ignore = config.get("ignore")
    result["ignore"] = ignore if isinstance(ignore, list) else []
    try:
        spec = parse_quantization(config, str(found.path / "config.json"))
    except L4Error as error:
        return result | {"problem": error.message}
    targets: dict[LinearFormat, list[str]] = {}
    for target, form in spec.targets.items():
        targets.setdefault(form, []).append(target)
    for pattern, form in spec.patterns:
        targets.setdefault(form, []).append(f"re:{pattern.pattern}")
    counts = _format_counts(found)
    result["groups"] = [
        {"scheme": str(form), "targets": names, "linears": counts.get(form, 0)} for form, names in targets.items()
    ]
    return result


def _format_counts(found: Survey) -> dict[LinearFormat, int]:
    counts: dict[LinearFormat, int] = {}
    for name in found.reader.tensors() if found.reader is not None else ():
        prefix, _, part = name.rpartition(".")
        form = found.reader.linear_format(prefix) if found.reader is not None else None
        if form is not None and part == form.codes:
            counts[form] = counts.get(form, 0) + 1
    return counts


def layer_ranges(flags: tuple[bool, ...], value: bool) -> str:
    """The layers where `flags` is `value`, as ranges; 'none'."""
    layers = [layer for layer, flag in enumerate(flags) if flag is value]
    return ranges(layers) if layers else "none"
