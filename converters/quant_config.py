"""compressed-tensors `quantization_config` → the format of every Linear, matched as that library matches it.

Matching (`compressed_tensors.utils.match`): `re:PATTERN` is `re.match` on the module's name, anything else is its exact
name or the name of one of its classes. `ignore` wins. Of several targets the first in this order counts: exact names,
patterns (alphabetically), class names; of the same target in two groups, the later group.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from converters.fields import Fields
from l4tool.core.errors import CheckpointError

LINEAR = ("Linear", "Module")
ROUTER = ("Llama4Router", *LINEAR)
EMBEDDING = ("Embedding", "Module")
HINT = "start from the unquantized checkpoint, or from one with symmetric INT4 groups or per-channel FP8"
FORMATS = {"int4": ("pack-quantized",), "fp8": ("float-quantized", "naive-quantized")}
NOT_STORED = (None, False, "weight", "static")  # activation orders that only steer calibration


@dataclass(frozen=True)
class LinearFormat:
    """How one Linear [out, in] is stored.

    kind "int4" (strategy "group"): `weight_packed` int32 [out, in/8], `weight_scale` [out, in/group_size],
    `weight_shape` int [2]. kind "fp8" (strategy "channel"): `weight` float8_e4m3fn [out, in], `weight_scale` [out, 1].
    """

    kind: str
    num_bits: int
    strategy: str
    group_size: int | None
    symmetric: bool
    dynamic_activations: bool  # activations are quantized per token to FP8 at run time


@dataclass(frozen=True)
class QuantizationSpec:
    """A parsed quantization_config. `targets`: what a group's target says → that group's format."""

    targets: Mapping[str, LinearFormat]
    ignore: frozenset[str]
    ignore_patterns: tuple[re.Pattern[str], ...]
    patterns: tuple[tuple[re.Pattern[str], LinearFormat], ...]  # in order of precedence

    def format_of(self, module: str, classes: tuple[str, ...] = LINEAR) -> LinearFormat | None:
        """The format of the module with this stored name and these class names, or None when it is not quantized."""
        names = (module, *classes)
        if any(name in self.ignore for name in names) or any(p.match(module) for p in self.ignore_patterns):
            return None
        if module in self.targets:
            return self.targets[module]
        for pattern, scheme in self.patterns:
            if pattern.match(module):
                return scheme
        return next((self.targets[name] for name in sorted(classes) if name in self.targets), None)


def parse_quantization(config: Mapping[str, Any], where: str) -> QuantizationSpec:
    """quantization_config's object → QuantizationSpec.

    Raises CheckpointError for another quantization method, a feature that is not supported (named), or a bad value.
    """
    f = Fields(config, f"{where}: quantization_config")
    method = f.string("quant_method")
    if method != "compressed-tensors":
        raise _unsupported(f, f"quant_method {method!r}")
    status = f.string("quantization_status", "compressed")
    if status != "compressed":
        raise _unsupported(f, f"quantization_status {status!r}")
    _refuse_extras(f)
    groups = f.child("config_groups")
    if groups is None or not groups.values:
        raise f.bad("config_groups", "an object with at least one group")
    targets: dict[str, LinearFormat] = {}
    for name in groups.values:
        if isinstance(groups.values[name], list):
            raise _unsupported(groups, f"preset group {name!r}")
        group = groups.child(name)
        if group is None:
            raise groups.bad(name, "an object")
        scheme = _group_format(group, f.string("format"))
        targets.update(dict.fromkeys(_strings(group, "targets"), scheme))
    ignore = _strings(f, "ignore")
    patterns = sorted(target for target in targets if target.startswith("re:"))
    return QuantizationSpec(
        targets={target: scheme for target, scheme in targets.items() if not target.startswith("re:")},
        ignore=frozenset(item for item in ignore if not item.startswith("re:")),
        ignore_patterns=tuple(_compile(f, item) for item in ignore if item.startswith("re:")),
        patterns=tuple((_compile(f, target), targets[target]) for target in patterns),
    )


def _refuse_extras(f: Fields) -> None:
    """Features that change how weights or the cache are stored, and that this tool does not read."""
    if f.get("kv_cache_scheme") is not None:
        raise _unsupported(f, "a quantized KV cache (kv_cache_scheme)")
    sparsity = f.child("sparsity_config")
    if sparsity is not None and sparsity.string("format", "dense") != "dense":
        raise _unsupported(f, f"sparsity format {sparsity.string('format')!r}")
    transform = f.child("transform_config")
    if transform is not None and transform.get("config_groups"):
        raise _unsupported(f, "transforms (transform_config)")


def _group_format(group: Fields, default_format: str | None) -> LinearFormat:
    weights = group.child("weights")
    if weights is None:
        raise _unsupported(group, "a group that quantizes activations only")
    if group.get("output_activations") is not None:
        raise _unsupported(group, "output_activations")
    kind = _kind(weights)
    activations = _dynamic_activations(group)
    if kind == "int4" and activations:
        raise _unsupported(group, "INT4 weights with quantized activations")
    stored_as = group.string("format") or default_format
    if stored_as not in (None, "mixed-precision", *FORMATS[kind]):
        raise _unsupported(group, f"format {stored_as!r} for {kind} weights")
    group_size = weights.integer("group_size") if kind == "int4" else None
    if group_size is not None and group_size % 8:
        raise weights.bad("group_size", "a multiple of 8")
    strategy = "group" if kind == "int4" else "channel"
    return LinearFormat(kind, 4 if kind == "int4" else 8, strategy, group_size, True, activations)


def _kind(w: Fields) -> str:
    """ "int4" or "fp8"; any other combination is an error that names the feature."""
    bits, number = w.integer("num_bits", 8), (w.string("type", "int") or "").lower()
    strategy = (w.string("strategy") or _implied_strategy(w)).lower()
    if not w.flag("symmetric", True):
        raise _unsupported(w, "asymmetric weights (zero points)")
    if w.get("dynamic", False) is not False:
        raise _unsupported(w, "dynamically quantized weights")
    order = w.get("actorder")
    if order not in NOT_STORED:
        raise _unsupported(w, f"activation ordering (actorder {order!r})")
    found = (bits, number, strategy)
    if found == (4, "int", "group"):
        return "int4"
    if found == (8, "float", "channel"):
        return "fp8"
    raise _unsupported(w, f"{bits}-bit {number} weights with strategy {strategy!r}")


def _implied_strategy(w: Fields) -> str:
    size = w.integer("group_size", 0, low=-1)
    return "group" if size > 0 else "channel" if size == -1 else "tensor"


def _dynamic_activations(group: Fields) -> bool:
    """False: activations stay as they are. True: FP8 per token. Anything else is not supported."""
    a = group.child("input_activations")
    if a is None:
        return False
    if a.get("dynamic", False) is not True:
        raise _unsupported(a, "static activation scales")
    found = (a.integer("num_bits", 8), (a.string("type", "int") or "").lower(), (a.string("strategy") or "").lower())
    if found != (8, "float", "token") or not a.flag("symmetric", True):
        raise _unsupported(a, f"{found[0]}-bit {found[1]} activations with strategy {found[2]!r}")
    return True


def _strings(f: Fields, name: str) -> list[str]:
    value = f.get(name, [])
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise f.bad(name, "a list of strings")
    return value


def _compile(f: Fields, target: str) -> re.Pattern[str]:
    try:
        return re.compile(target.removeprefix("re:"))
    except (re.error, RecursionError, OverflowError) as error:
        raise CheckpointError(f"{f.where}: {target!r} is not a regular expression: {error}") from error


def _unsupported(f: Fields, feature: str) -> CheckpointError:
    return CheckpointError(f"{f.where}: {feature} cannot be read by this version", hint=HINT)
