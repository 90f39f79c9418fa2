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
HINT = "start from the unquantized checkpoint, or from one in integers of 2 to 8 bits or FP8"
INFERRED = (None, "mixed-precision")  # a format that leaves it to each group, or to what the group quantizes
PACKED = "pack-quantized"
FORMATS = {"int": (PACKED, "int-quantized", "naive-quantized"), "float": ("float-quantized", "naive-quantized")}
BITS = {"int": range(2, 9), "float": range(8, 9)}
STRATEGIES = ("tensor", "channel", "group", "block")
STATUSES = ("compressed", "frozen")  # "frozen": what early versions wrote into compressed checkpoints
SCALE_DTYPES = (None, "bfloat16", "float16", "float32")  # MX scales are exponents (uint8), those of NVFP4 are FP8
NOT_STORED = (None, False, "weight", "static")  # activation orders that only steer calibration
STORED_ORDERS = (True, "group", "dynamic")  # columns belong to groups as `weight_g_idx` says
TOKEN_STRATEGIES = ("token", "tensor", "group")


@dataclass(frozen=True)
class Activations:
    """How the input of a Linear is quantized. `number`: "int" or "float". `dynamic`: at run time, nothing is stored;
    else one scale lies in the file (`input_scale` [1], and `input_zero_point` [1] where not `symmetric`)."""

    num_bits: int
    number: str
    strategy: str  # "token", "tensor", "group"
    group_size: int | None
    symmetric: bool
    dynamic: bool

    def __str__(self) -> str:
        """'FP8 per token at run time'"""
        number = ("FP" if self.number == "float" else "INT") + str(self.num_bits)
        per = {"token": " per token", "group": f" per {self.group_size} inputs", "tensor": ""}[self.strategy]
        return f"{number}{per} at run time" if self.dynamic else f"{number}, scale stored"


FP8_TOKEN = Activations(8, "float", "token", None, True, True)


@dataclass(frozen=True)
class LinearFormat:
    """How one Linear [out, in] is stored: `converters.compressed.stored_parts` lists names, shapes and dtypes.

    `kind`: "fp8" (e4m3fn) or "int2" … "int8". `packed`: codes lie in int32 words (`weight_packed`), else one a byte
    (`weight`). One scale is for the whole tensor, an output ("channel"), `group_size` inputs of an output ("group"), or
    `block` = (outputs, inputs). Value: (code - zero point) · scale; symmetric ones have no zero point.
    """

    kind: str
    num_bits: int
    strategy: str  # "tensor", "channel", "group", "block"
    group_size: int | None
    symmetric: bool
    activations: Activations | None
    packed: bool
    block: tuple[int, int] | None = None
    has_g_idx: bool = False

    @property
    def dynamic_activations(self) -> bool:
        """Activations are quantized per token to FP8 at run time."""
        return self.activations == FP8_TOKEN

    @property
    def codes(self) -> str:
        """The last name of the tensor that holds the codes."""
        return "weight_packed" if self.packed else "weight"

    @property
    def value_parts(self) -> tuple[str, ...]:
        """The last names of the tensors that values are made of, codes first."""
        zero = () if self.symmetric else ("weight_zero_point",)
        return (self.codes, "weight_scale", *zero, *(("weight_g_idx",) if self.has_g_idx else ()))

    @property
    def is_native(self) -> bool:
        """True for what `l4tool quantize` writes and `l4tool batch` computes with; the rest can only be read."""
        if not self.symmetric or self.has_g_idx:
            return False
        if self.kind == "int4":
            whole = self.group_size is not None and self.group_size % 8 == 0
            return self.packed and self.strategy == "group" and whole and self.activations is None
        return self.kind == "fp8" and self.strategy == "channel" and self.activations in (None, FP8_TOKEN)

    def __str__(self) -> str:
        """'INT4, symmetric, one scale for each 128 inputs'; FP8 is symmetric where nothing else is said."""
        number = "FP8 (e4m3fn)" if self.kind == "fp8" else self.kind.upper()
        signed = ", asymmetric" if not self.symmetric else ", symmetric" if self.kind != "fp8" else ""
        per = {
            "tensor": "one scale", "channel": "one scale for each output",
            "group": f"one scale for each {self.group_size} inputs",
            "block": "one scale for each block of " + " × ".join(map(str, self.block or ())),
        }[self.strategy]  # fmt: skip
        order = " in a stored order" if self.has_g_idx else ""
        tail = f", activations in {self.activations}" if self.activations is not None else ""
        return f"{number}{signed}, {per}{order}{tail}"


@dataclass(frozen=True)
class QuantizationSpec:
    """A parsed quantization_config. `targets`: what a group's target says → that group's format."""

    targets: Mapping[str, LinearFormat]
    ignore: frozenset[str]
    ignore_patterns: tuple[re.Pattern[str], ...]
    patterns: tuple[tuple[re.Pattern[str], LinearFormat], ...]  # in order of precedence
    for_activations: tuple[str, ...] = ()  # what else the config asks of a run; weights as floats do without

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
    if status not in STATUSES:
        raise _unsupported(f, f"quantization_status {status!r}")
    _refuse_extras(f)
    asked = ["a quantized KV cache (kv_cache_scheme)"] if f.get("kv_cache_scheme") is not None else []
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
        asked += ["quantized outputs (output_activations)"] if group.get("output_activations") is not None else []
        targets.update(dict.fromkeys(_strings(group, "targets"), scheme))
    ignore = _strings(f, "ignore")
    patterns = sorted(target for target in targets if target.startswith("re:"))
    return QuantizationSpec(
        targets={target: scheme for target, scheme in targets.items() if not target.startswith("re:")},
        ignore=frozenset(item for item in ignore if not item.startswith("re:")),
        ignore_patterns=tuple(_compile(f, item) for item in ignore if item.startswith("re:")),
        patterns=tuple((_compile(f, target), targets[target]) for target in patterns),
        for_activations=tuple(dict.fromkeys(asked)),
    )


def _refuse_extras(f: Fields) -> None:
    """Features that change how weights are stored, and that this tool does not read."""
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
    bits, number = weights.integer("num_bits", 8), (weights.string("type", "int") or "").lower()
    activations = _activations(group)
    stored_as = group.string("format") or default_format
    if stored_as in INFERRED and number in FORMATS:
        stored_as = FORMATS[number][number == "int" and activations is not None]
    strategy = (weights.string("strategy") or _implied_strategy(weights)).lower()
    if bits not in BITS.get(number, ()) or strategy not in STRATEGIES:
        raise _unsupported(weights, f"{bits}-bit {number} weights with strategy {strategy!r}")
    if stored_as not in FORMATS[number]:
        raise _unsupported(group, f"format {stored_as!r} for {bits}-bit {number} weights")
    _refuse_weights(weights)
    order = weights.get("actorder")
    has_g_idx = order in STORED_ORDERS
    if order not in NOT_STORED and not (has_g_idx and strategy == "group"):
        raise _unsupported(weights, f"activation ordering (actorder {order!r}) with strategy {strategy!r}")
    return LinearFormat(
        kind=f"int{bits}" if number == "int" else "fp8",
        num_bits=bits,
        strategy=strategy,
        group_size=weights.integer("group_size") if strategy == "group" else None,
        symmetric=weights.flag("symmetric", True),
        activations=activations,
        packed=stored_as == PACKED,
        block=_block(weights) if strategy == "block" else None,
        has_g_idx=has_g_idx,
    )


def _refuse_weights(w: Fields) -> None:
    """Features of weights that change what is stored."""
    if w.get("dynamic", False) is not False:
        raise _unsupported(w, "dynamically quantized weights")
    scale_dtype = w.string("scale_dtype")
    if (scale_dtype or "").removeprefix("torch.") not in [dtype or "" for dtype in SCALE_DTYPES]:
        raise _unsupported(w, f"scales as {scale_dtype!r} (MX and NVFP4 formats)")


def _implied_strategy(w: Fields) -> str:
    size = w.integer("group_size", 0, low=-1)
    return "group" if size > 0 else "channel" if size == -1 else "tensor"


def _block(w: Fields) -> tuple[int, int]:
    """`block_structure`: [outputs, inputs], in old configs also "128x128"."""
    value = w.get("block_structure")
    sides = value.split("x") if isinstance(value, str) else value
    if isinstance(sides, list) and len(sides) == 2 and all(re.fullmatch(r"[1-9]\d{0,6}", str(side)) for side in sides):
        return int(sides[0]), int(sides[1])
    raise w.bad("block_structure", "two positive integers")


def _activations(group: Fields) -> Activations | None:
    """None: activations stay as they are."""
    a = group.child("input_activations")
    if a is None:
        return None
    bits, number = a.integer("num_bits", 8), (a.string("type", "int") or "").lower()
    strategy, dynamic = (a.string("strategy") or _implied_strategy(a)).lower(), a.get("dynamic", False)
    size = a.integer("group_size", None) if strategy == "group" else None
    found = Activations(bits, number, strategy, size, a.flag("symmetric", True), dynamic is True)
    known = number in FORMATS and bits <= 8 and strategy in TOKEN_STRATEGIES and isinstance(dynamic, bool)
    if not known or (strategy != "tensor" and not dynamic):
        how = "dynamic" if dynamic else "static"
        raise _unsupported(a, f"{how} {bits}-bit {number} activations with strategy {strategy!r}")
    return found


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
