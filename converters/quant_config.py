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
HINT = "`l4tool convert SRC -o OUT --to hf` makes plain weights of it, which everything else takes"
NO_HINT = "start from the unquantized checkpoint"
FOREIGN = "foreign"
FORMATS = {
    "int4": ("pack-quantized",), "fp8": ("float-quantized", "naive-quantized"),
    FOREIGN: ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized"),
}  # fmt: skip
PACKED_BITS = (4, 8)  # widths that every version of the library packs alike
NOT_STORED = (None, False, "weight", "static")  # activation orders that only steer calibration
STORED = (True, "group", "dynamic")


@dataclass(frozen=True)
class LinearFormat:
    """How one Linear [out, in] is stored.

    kind "int4" (strategy "group"): `weight_packed` int32 [out, in/8], `weight_scale` [out, in/group_size],
    `weight_shape` int [2]. kind "fp8" (strategy "channel"): `weight` float8_e4m3fn [out, in], `weight_scale` [out, 1].
    Both can be computed with. kind "foreign" can only be dequantized: anything else that `converters/compressed.py` has
    parts for.
    """

    kind: str
    num_bits: int
    strategy: str  # group, channel, tensor, block: what shares a scale
    group_size: int | None
    symmetric: bool  # False: `weight_zero_point`
    dynamic_activations: bool  # activations are quantized per token to FP8 at run time
    number: str = "int"  # or "float"
    packed: bool = True  # several codes in an int32
    reordered: bool = False  # `weight_g_idx` [in] says which group an input belongs to
    block: tuple[int, int] | None = None  # rows and columns that share a scale
    static_activations: bool = False  # `input_scale`, which weights do not need


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


def parse_quantization(config: Mapping[str, Any], where: str, foreign: bool = False) -> QuantizationSpec:
    """quantization_config's object → QuantizationSpec.

    `foreign`: formats that can only be dequantized are let through. Raises CheckpointError for another quantization
    method, a feature that is not supported (named), or a bad value.
    """
    f = Fields(config, f"{where}: quantization_config")
    method = f.string("quant_method")
    if method != "compressed-tensors":
        raise _unsupported(f, f"quant_method {method!r}", NO_HINT)
    status = f.string("quantization_status", "compressed")
    if status != "compressed" and not (foreign and status == "frozen"):
        raise _unsupported(f, f"quantization_status {status!r}")
    _refuse_extras(f, foreign)
    groups = f.child("config_groups")
    if groups is None or not groups.values:
        raise f.bad("config_groups", "an object with at least one group")
    targets: dict[str, LinearFormat] = {}
    for name in groups.values:
        if isinstance(groups.values[name], list):
            raise _unsupported(groups, f"preset group {name!r}", NO_HINT)
        group = groups.child(name)
        if group is None:
            raise groups.bad(name, "an object")
        scheme = _group_format(group, f.string("format"), foreign)
        targets.update(dict.fromkeys(_strings(group, "targets"), scheme))
    ignore = _strings(f, "ignore")
    patterns = sorted(target for target in targets if target.startswith("re:"))
    return QuantizationSpec(
        targets={target: scheme for target, scheme in targets.items() if not target.startswith("re:")},
        ignore=frozenset(item for item in ignore if not item.startswith("re:")),
        ignore_patterns=tuple(_compile(f, item) for item in ignore if item.startswith("re:")),
        patterns=tuple((_compile(f, target), targets[target]) for target in patterns),
    )


def _refuse_extras(f: Fields, foreign: bool) -> None:
    """Features that change how weights or the cache are stored, and that this tool does not read."""
    if f.get("kv_cache_scheme") is not None and not foreign:
        raise _unsupported(f, "a quantized KV cache (kv_cache_scheme)")
    sparsity = f.child("sparsity_config")
    if sparsity is not None and sparsity.string("format", "dense") != "dense":
        raise _unsupported(f, f"sparsity format {sparsity.string('format')!r}", NO_HINT)
    transform = f.child("transform_config")
    if transform is not None and transform.get("config_groups"):
        raise _unsupported(f, "transforms (transform_config)", NO_HINT)


def _group_format(group: Fields, default_format: str | None, foreign: bool) -> LinearFormat:
    weights = group.child("weights")
    if weights is None:
        raise _unsupported(group, "a group that quantizes activations only", NO_HINT)
    if group.get("output_activations") is not None and not foreign:
        raise _unsupported(group, "output_activations")
    kind, problem = _kind(weights)
    if kind == FOREIGN and not foreign:
        raise _unsupported(weights, problem)
    activations, static = _activations(group, foreign)
    if kind == "int4" and group.get("input_activations") is not None:
        if not foreign:
            raise _unsupported(group, "INT4 weights with quantized activations")
        kind = FOREIGN
    stored_as = group.string("format") or default_format
    if stored_as not in (None, "mixed-precision", *FORMATS[kind]):
        raise _unsupported(group, f"format {stored_as!r} for {kind} weights", NO_HINT)
    return _linear_format(weights, kind, stored_as, activations, static)


def _linear_format(w: Fields, kind: str, stored_as: str | None, activations: bool, static: bool) -> LinearFormat:
    bits, number, strategy = _scheme(w)
    group_size = w.integer("group_size") if strategy == "group" else None
    if kind == "int4" and group_size is not None and group_size % 8:
        raise w.bad("group_size", "a multiple of 8")
    if kind == "int4":
        return LinearFormat(kind, bits, strategy, group_size, True, False)
    if kind == "fp8":
        return LinearFormat(kind, bits, strategy, None, True, activations, "float", packed=False)
    packed = number == "int" and stored_as in (None, "mixed-precision", "pack-quantized")
    block = w.integers("block_structure", low=1) if strategy == "block" else None
    if strategy == "block" and (block is None or len(block) != 2):
        raise w.bad("block_structure", "two integers")
    return LinearFormat(
        kind, bits, strategy, group_size, w.flag("symmetric", True), activations, number, packed,
        reordered=w.get("actorder") in STORED, block=(block[0], block[1]) if block else None, static_activations=static,
    )  # fmt: skip


def _scheme(w: Fields) -> tuple[int, str, str]:
    """(bits, "int" or "float", strategy)."""
    bits, number = w.integer("num_bits", 8), (w.string("type", "int") or "").lower()
    return bits, number, (w.string("strategy") or _implied_strategy(w)).lower()


def _kind(w: Fields) -> tuple[str, str]:
    """("int4" or "fp8", ""), or ("foreign", the feature that makes it so); other combinations are an error."""
    bits, number, strategy = _scheme(w)
    if w.get("dynamic", False) is not False:
        raise _unsupported(w, "dynamically quantized weights", NO_HINT)
    order, words = w.get("actorder"), f"{bits}-bit {number} weights with strategy {strategy!r}"
    if order not in (*NOT_STORED, *STORED):
        raise _unsupported(w, f"activation ordering (actorder {order!r})", NO_HINT)
    integers = number == "int" and bits in PACKED_BITS and strategy in ("group", "channel", "tensor")
    floats = number == "float" and bits == 8 and strategy in ("channel", "tensor", "block")
    if not integers and not floats:
        raise _unsupported(w, words, NO_HINT)
    if not w.flag("symmetric", True):
        return FOREIGN, "asymmetric weights (zero points)"
    if order in STORED:
        return FOREIGN, f"activation ordering (actorder {order!r})"
    found = {(4, "int", "group"): "int4", (8, "float", "channel"): "fp8"}.get((bits, number, strategy))
    return (found, "") if found else (FOREIGN, words)


def _implied_strategy(w: Fields) -> str:
    size = w.integer("group_size", 0, low=-1)
    return "group" if size > 0 else "channel" if size == -1 else "tensor"


def _activations(group: Fields, foreign: bool) -> tuple[bool, bool]:
    """(FP8 per token at run time, a static scale is stored). Weights as floats need neither."""
    a = group.child("input_activations")
    if a is None:
        return False, False
    if a.get("dynamic", False) is not True:
        if not foreign:
            raise _unsupported(a, "static activation scales")
        return False, True
    found = (a.integer("num_bits", 8), (a.string("type", "int") or "").lower(), (a.string("strategy") or "").lower())
    if found == (8, "float", "token") and a.flag("symmetric", True):
        return True, False
    if not foreign:
        raise _unsupported(a, f"{found[0]}-bit {found[1]} activations with strategy {found[2]!r}")
    return False, False


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


def _unsupported(f: Fields, feature: str, hint: str = HINT) -> CheckpointError:
    what = "cannot be computed with" if hint == HINT else "cannot be read by this version"
    return CheckpointError(f"{f.where}: {feature} {what}", hint=hint)
