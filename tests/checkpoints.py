"""Tiny random checkpoints for tests, and ways to spoil copies of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from copy import deepcopy as copy_of
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from examples.make_checkpoint import make_checkpoint


def make(folder: Path, **options: Any) -> Path:
    """A checkpoint made by examples/make_checkpoint.py (its options by name) in `folder`."""
    make_checkpoint(folder, **options)
    return folder


def edit_config(folder: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    """Change config.json in place."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    edit(config)
    path.write_text(json.dumps(config))
    return folder


def copy(source: Path, folder: Path) -> Path:
    """A writable copy of a shared checkpoint."""
    shutil.copytree(source, folder)
    return folder


def shards(folder: Path) -> list[Path]:
    """The files that the index names, sorted."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return sorted({folder / name for name in index["weight_map"].values()})


def load(folder: Path) -> dict[str, torch.Tensor]:
    """Every stored tensor, read by the safetensors library."""
    return {name: tensor for path in shards(folder) for name, tensor in load_file(path).items()}


def save(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """Replace a checkpoint's weights by one shard with an index, written by the safetensors library."""
    for path in shards(folder):
        path.unlink()
    name = "model-00001-of-00001.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / name, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


BASE_IGNORE = ["re:.*lm_head$", "re:.*router$", "re:vision_model.*", "re:multi_modal_projector.*"]
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True, "dynamic": False}
FP8 = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False}
FP8_TOKEN = {"num_bits": 8, "type": "float", "strategy": "token", "symmetric": True, "dynamic": True}
EXPERTS = [r"re:.*\.feed_forward\.experts\..*"]
OTHERS = [
    r"re:.*\.self_attn\.(q|k|v|o)_proj$",
    r"re:.*\.feed_forward\.shared_expert\.(gate|up|down)_proj$",
    r"re:.*\.feed_forward\.(gate|up|down)_proj$",
]


def group(weights: dict[str, Any], targets: list[str], activations: dict[str, Any] | None = None) -> dict[str, Any]:
    """One entry of `config_groups`."""
    stored_as = "pack-quantized" if weights["type"] == "int" else "float-quantized"
    entry = {"targets": targets, "weights": weights, "input_activations": activations, "format": stored_as}
    return copy_of(entry)  # tests edit what they get


def quantization_config(kind: str, group_size: int = 128) -> dict[str, Any]:
    """`kind`: "int4" (experts only), "int4-all" (every text Linear), "fp8" or "mixed"; see docs/formats.md."""
    int4 = INT4 | {"group_size": group_size}
    groups, ignore = {
        "int4": (
            {"group_0": group(int4, ["Linear"])},
            ["re:.*self_attn.*", "re:.*shared_expert.*", r"re:.*feed_forward\.(gate|up|down)_proj$"],
        ),
        "int4-all": ({"group_0": group(int4, ["Linear"])}, []),
        "fp8": ({"group_0": group(FP8, ["Linear"], FP8_TOKEN)}, []),
        "mixed": ({"group_0": group(int4, EXPERTS), "group_1": group(FP8, OTHERS, FP8_TOKEN)}, []),
    }[kind]
    stored_as = "mixed-precision" if len(groups) > 1 else groups["group_0"]["format"]
    return {
        "quant_method": "compressed-tensors", "quantization_status": "compressed", "format": stored_as,
        "config_groups": groups, "ignore": BASE_IGNORE + ignore, "kv_cache_scheme": None,
        "sparsity_config": {}, "transform_config": {}, "global_compression_ratio": None, "version": "0.20.0",
    }  # fmt: skip


def compress(source: Path, folder: Path, kind: str, group_size: int = 128) -> Path:
    """A compressed-tensors checkpoint made of `source` by the compressed-tensors library, absmax scales."""
    return compress_with(source, folder, quantization_config(kind, group_size))


def compress_with(source: Path, folder: Path, config: dict[str, Any]) -> Path:
    """`source` compressed by the compressed-tensors library as this quantization_config says."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    from converters.detect import open_checkpoint

    reader = open_checkpoint(source)
    theirs = QuantizationConfig(**config)
    tensors: dict[str, torch.Tensor] = {}
    for name in reader.tensors():
        stored = name if reader.arch.vision is not None else name.removeprefix("language_model.")
        module = stored.removesuffix(".weight")
        weight = reader.read(name).contiguous()
        is_module = name.endswith(".weight") and weight.dim() == 2
        scheme = library_scheme(theirs, module, classes_of(module)) if is_module else None
        if scheme is None:
            tensors[stored] = weight
            continue
        scale, zero = library_qparams(weight, scheme.weights)
        state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
        parts = BaseCompressor.get_value_from_registry(scheme.format).compress(state, scheme)
        tensors |= {f"{module}.{part}": tensor for part, tensor in parts.items()}
    copy(source, folder)
    edit_config(folder, lambda c: c.update(quantization_config=config))
    return save(folder, tensors)


def classes_of(module: str) -> tuple[str, ...]:
    """The classes of a module that has a matrix."""
    if module.endswith("embed_tokens"):
        return ("Embedding",)
    return ("Llama4Router", "Linear") if module.endswith("router") else ("Linear",)


def library_qparams(weight: torch.Tensor, args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales in the weight's dtype and zero points, min-max, as the library's strategy shapes them."""
    from compressed_tensors.quantization.utils import calculate_qparams

    rows, cols = weight.shape
    strategy = str(getattr(args.strategy, "value", args.strategy))
    if strategy == "block":
        height, width = args.block_structure
        padded = torch.nn.functional.pad(weight, (0, -cols % width, 0, -rows % height))
        blocks = padded.view(padded.shape[0] // height, height, padded.shape[1] // width, width)
        low, high = blocks.amin((1, 3)), blocks.amax((1, 3))
    elif strategy == "tensor":
        low, high = weight.min().view(1), weight.max().view(1)
    else:
        grouped = weight.view(rows, -1, args.group_size or cols)
        low, high = grouped.amin(-1), grouped.amax(-1)
    scale, zero = calculate_qparams(low, high, args)
    return scale.to(weight.dtype), zero


def library_scheme(config: Any, module: str, classes: tuple[str, ...] = ("Linear",)) -> Any:
    """The scheme that the compressed-tensors library gives a module of this name, or None."""
    from compressed_tensors.utils.match import is_match, match_targets

    base: type[torch.nn.Module] = torch.nn.Embedding if "Embedding" in classes else torch.nn.Linear
    kind = base if classes[0] == base.__name__ else type(classes[0], (base,), {})
    instance = kind(1, 1, device="meta")
    targets = {target: scheme for scheme in config.config_groups.values() for target in scheme.targets}
    if not is_match(module, instance, list(targets), config.ignore or []):
        return None
    return targets[match_targets(module, instance, targets)[0]]
