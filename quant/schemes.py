"""Named schemes: which class of Linear is stored how, and the `quantization_config` that says so.

Classes: `experts` (routed), `shared` (shared experts, and the dense MLPs between Maverick's MoE layers), `attention`.
Everything else (router, norms, embeddings, lm_head, vision tower, projector) is never quantized.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from l4tool.core.errors import UsageError

CLASSES = ("experts", "shared", "attention")
SCHEMES: dict[str, dict[str, str]] = {
    "int4": {"experts": "int4", "shared": "int4", "attention": "bf16"},
    "fp8": {"experts": "fp8", "shared": "fp8", "attention": "bf16"},
    "mixed": {"experts": "int4", "shared": "fp8", "attention": "bf16"},
}
FORMATS = ("compressed-tensors", "quanto")
SCALES = ("absmax", "mse", "hqq")
COMPRESSED_TENSORS_VERSION = "0.20.0"

_ALWAYS_IGNORED = ["re:.*lm_head$", "re:.*router$", "re:vision_model.*", "re:multi_modal_projector.*"]
_IGNORE = {
    "experts": [],
    "shared": ["re:.*shared_expert.*", r"re:.*feed_forward\.(gate|up|down)_proj$"],
    "attention": ["re:.*self_attn.*"],
}
_TARGETS = {
    "experts": [r"re:.*\.feed_forward\.experts\..*"],
    "attention": [r"re:.*\.self_attn\.(q|k|v|o)_proj$"],
    "shared": [
        r"re:.*\.feed_forward\.shared_expert\.(gate|up|down)_proj$",
        r"re:.*\.feed_forward\.(gate|up|down)_proj$",
    ],
}
_STORED_AS = {"int4": "pack-quantized", "fp8": "float-quantized"}


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the output's bytes. `kinds`: class → "int4", "fp8" or "bf16" (left as it is)."""

    scheme: str
    kinds: dict[str, str]
    group_size: int = 128
    scale: str = "mse"
    format: str = "compressed-tensors"

    def kind_of(self, name: str) -> str:
        """ "int4", "fp8" or "bf16" for a canonical tensor name."""
        linear = class_of(name)
        return "bf16" if linear is None else self.kinds[linear]


def make_recipe(
    scheme: str,
    shared_experts: bool = True,
    attention: str = "bf16",
    group_size: int = 128,
    scale: str | None = None,
    format: str = "compressed-tensors",
) -> Recipe:
    """The command's options → a Recipe. Raises UsageError where they do not fit together."""
    if scheme == "mixed" and not shared_experts:
        raise UsageError("--mixed means FP8 shared experts", hint="write --int4 --no-shared-experts")
    if group_size < 8 or group_size % 8:
        raise UsageError(f"--group-size {group_size} is not a multiple of 8", hint="use 128, which every runtime loads")
    if format == "quanto":
        scale = scale or "absmax"
        if scale == "mse":
            raise UsageError("--format quanto has no mse scale", hint="use --scale absmax or --scale hqq")
        if group_size != 128:
            raise UsageError("--format quanto fixes the group size to 128", hint="leave --group-size away")
    scale = scale or "mse"
    if scale == "hqq" and format == "compressed-tensors":
        raise UsageError(
            "hqq needs float zero points, which the compressed-tensors format does not hold",
            hint="use --scale mse, or --format quanto --scale hqq",
        )
    kinds = dict(SCHEMES[scheme])
    if not shared_experts:
        kinds["shared"] = "bf16"
    kinds["attention"] = attention
    if scale == "hqq" and "int4" not in kinds.values():
        raise UsageError("hqq is for INT4 weights", hint="use --int4 or --mixed, or leave --scale away")
    return Recipe(scheme, kinds, group_size, scale, format)


def class_of(name: str) -> str | None:
    """The class of a canonical tensor name, or None for what is never quantized."""
    if not name.startswith("language_model.model.layers.") or not name.endswith("_proj.weight"):
        return None
    if ".self_attn." in name:
        return "attention"
    if ".feed_forward.experts." in name:
        return "experts"
    return "shared" if ".feed_forward." in name else None


def quantization_config(recipe: Recipe) -> dict[str, Any]:
    """config.json's `quantization_config` for the compressed-tensors format.

    One kind in use: the group targets "Linear" and the rest is ignored. Two kinds: every group names its patterns.
    Patterns, not names, so that it holds for the multimodal and the text-only model alike.
    """
    used = list(dict.fromkeys(kind for kind in recipe.kinds.values() if kind != "bf16"))
    ignore = _ALWAYS_IGNORED + [p for name in CLASSES if recipe.kinds[name] == "bf16" for p in _IGNORE[name]]
    groups = {}
    for number, kind in enumerate(sorted(used, key=["int4", "fp8"].index)):
        classes = [name for name in ("experts", "attention", "shared") if recipe.kinds[name] == kind]
        targets = ["Linear"] if len(used) == 1 else [p for name in classes for p in _TARGETS[name]]
        groups[f"group_{number}"] = _group(kind, targets, recipe.group_size)
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": _STORED_AS[used[0]] if len(used) == 1 else "mixed-precision",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "sparsity_config": {},
        "transform_config": {},
        "version": COMPRESSED_TENSORS_VERSION,
        "ignore": ignore,
        "config_groups": groups,
    }


def _group(kind: str, targets: list[str], group_size: int) -> dict[str, Any]:
    weights = {
        "num_bits": 4, "type": "int", "strategy": "group", "group_size": group_size, "symmetric": True,
        "dynamic": False, "observer": "minmax", "observer_kwargs": {}, "actorder": None, "block_structure": None,
        "scale_dtype": None, "zp_dtype": None,
    }  # fmt: skip
    activations = None
    if kind == "fp8":
        weights |= {"num_bits": 8, "type": "float", "strategy": "channel", "group_size": None}
        activations = weights | {"strategy": "token", "dynamic": True, "observer": None}
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": activations,
        "output_activations": None,
        "format": _STORED_AS[kind],
    }
