"""Weights of the model in memory, and loading them through a Reader.

Dense weights are copied once into the orientation the kernels want ([out, in], q/k/v and gate/up joined, experts of a
layer in one tensor), and the file's pages are let go as they are copied: the peak is the weights plus one layer.
Quantized weights stay where the Reader maps them (CPU) or go to the device as they are stored; nothing is expanded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch

from batch.kernels.linears import DenseLinear, Experts, Fp8Linear, FusedLinear, Int4Linear, Linear
from converters.reader import Reader
from l4tool.core.arch import TextArch
from l4tool.core.errors import CheckpointError

MODEL = "language_model.model."


@dataclass(frozen=True, eq=False)
class MoeWeights:
    """router H → E; `experts` per expert; the shared expert is an MLP that sees every token."""

    router: Linear
    experts: Experts
    shared_gate_up: Linear
    shared_down: Linear


@dataclass(frozen=True, eq=False)
class MlpWeights:
    """A dense feed-forward: gate_up H → 2M, down M → H."""

    gate_up: Linear
    down: Linear


@dataclass(frozen=True, eq=False)
class LayerWeights:
    """qkv H → (A + 2K)·D, o A·D → H, norms [H]."""

    input_norm: torch.Tensor
    qkv: Linear
    o: Linear
    post_norm: torch.Tensor
    feed_forward: MoeWeights | MlpWeights


@dataclass(frozen=True, eq=False)
class TextWeights:
    """embed [V, H], lm_head H → V, final norm [H]."""

    embed: torch.Tensor
    layers: tuple[LayerWeights, ...]
    norm: torch.Tensor
    lm_head: Linear

    def embedding(self, token_ids: torch.Tensor) -> torch.Tensor:
        """int64 [T] → rows of the embedding [T, H], a copy."""
        return self.embed[token_ids]

    def layer(self, index: int) -> LayerWeights:
        return self.layers[index]

    def head(self) -> Linear:
        return self.lm_head


class Loader:
    """Reads tensors to one device and dtype. `dtype` is that of the activations and of every unquantized weight."""

    def __init__(self, reader: Reader, device: torch.device, dtype: torch.dtype) -> None:
        self.reader, self.device, self.dtype = reader, device, dtype

    def tensor(self, name: str) -> torch.Tensor:
        """A private, contiguous copy; the file's pages are released."""
        source = self.reader.read(name)
        copy = torch.empty(source.shape, dtype=self.dtype, device=self.device)
        copy.copy_(source)
        self.reader.release(name)
        return copy

    def linear(self, *prefixes: str) -> Linear:
        """One linear, or several over the same input with their outputs in order. Raises CheckpointError."""
        formats = [self.reader.linear_format(prefix) for prefix in prefixes]
        if any(formats):
            parts = tuple(self._part(prefix) for prefix in prefixes)
            return parts[0] if len(parts) == 1 else FusedLinear(parts)
        sources = [self.reader.read(f"{prefix}.weight") for prefix in prefixes]
        rows = sum(source.shape[0] for source in sources)
        joined = torch.empty((rows, sources[0].shape[1]), dtype=self.dtype, device=self.device)
        self._fill(joined, prefixes)
        return DenseLinear(joined)

    def experts(self, base: str, num_experts: int) -> Experts:
        """The routed experts under `base` ("….experts."), dense ones as views of one tensor per projection."""
        names = [[f"{base}{e}.gate_proj", f"{base}{e}.up_proj"] for e in range(num_experts)]
        downs = [[f"{base}{e}.down_proj"] for e in range(num_experts)]
        return Experts(self._expert_bank(names), self._expert_bank(downs))

    def _expert_bank(self, names: list[list[str]]) -> tuple[Linear, ...]:
        if any(self.reader.linear_format(prefix) for group in names for prefix in group):
            return tuple(self.linear(*group) for group in names)
        infos = self.reader.tensors()
        rows = sum(infos[f"{prefix}.weight"].shape[0] for prefix in names[0])
        columns = infos[f"{names[0][0]}.weight"].shape[1]
        bank = torch.empty((len(names), rows, columns), dtype=self.dtype, device=self.device)  # [E, N, K]
        for expert, group in enumerate(names):
            self._fill(bank[expert], group)
        return tuple(DenseLinear(weight) for weight in bank.unbind(0))

    def _fill(self, joined: torch.Tensor, prefixes: tuple[str, ...] | list[str]) -> None:
        row = 0
        for prefix in prefixes:
            source = self.reader.read(f"{prefix}.weight")
            joined[row : row + source.shape[0]].copy_(source)
            row += source.shape[0]
        for prefix in prefixes:
            self.reader.release(f"{prefix}.weight")

    def _part(self, prefix: str) -> DenseLinear | Int4Linear | Fp8Linear:
        form = self.reader.linear_format(prefix)
        if form is None:
            return DenseLinear(self.tensor(f"{prefix}.weight"))
        scale = self.reader.read(f"{prefix}.weight_scale").to(self.device)
        if form.kind == "int4" and form.group_size:
            packed = self.reader.read(f"{prefix}.weight_packed").to(self.device)
            return Int4Linear(packed, scale, form.group_size)
        if form.kind == "fp8" and form.strategy in ("channel", "tensor"):
            weight = self.reader.read(f"{prefix}.weight").to(self.device)
            rows = scale.reshape(-1, 1).expand(weight.shape[0], 1).contiguous()  # [N, 1]
            return Fp8Linear(weight, rows, form.dynamic_activations)
        raise CheckpointError(
            f"{self.reader.path}: {prefix} is stored as {form.kind}/{form.strategy}, which cannot be computed with",
            hint="use INT4 with groups or FP8 per channel: l4tool quantize writes both",
        )


def require_top_1(reader: Reader, arch: TextArch) -> None:
    """Raises CheckpointError for what the kernels do not compute."""
    if arch.experts_per_token != 1 and arch.moe_layers:
        raise CheckpointError(
            f"{reader.path}: num_experts_per_tok is {arch.experts_per_token}; only top-1 routing is supported"
        )


def load_text(loader: Loader, arch: TextArch) -> TextWeights:
    """Every weight of the language model. Raises CheckpointError."""
    require_top_1(loader.reader, arch)
    return TextWeights(
        embed=loader.tensor(f"{MODEL}embed_tokens.weight"),
        layers=tuple(load_layer(loader, arch, layer) for layer in range(arch.num_layers)),
        norm=loader.tensor(f"{MODEL}norm.weight"),
        lm_head=loader.linear("language_model.lm_head"),
    )


def layer_prefix(layer: int) -> str:
    """What the canonical names of a layer's tensors begin with."""
    return f"{MODEL}layers.{layer}."


def load_layer(loader: Loader, arch: TextArch, layer: int) -> LayerWeights:
    """One decoder layer. Raises CheckpointError."""
    base = layer_prefix(layer)
    attention, feed_forward = base + "self_attn.", base + "feed_forward."
    weights: MoeWeights | MlpWeights
    if arch.is_moe(layer):
        shared = feed_forward + "shared_expert."
        weights = MoeWeights(
            router=loader.linear(feed_forward + "router"),
            experts=loader.experts(feed_forward + "experts.", arch.num_experts),
            shared_gate_up=loader.linear(shared + "gate_proj", shared + "up_proj"),
            shared_down=loader.linear(shared + "down_proj"),
        )
    else:
        weights = MlpWeights(
            gate_up=loader.linear(feed_forward + "gate_proj", feed_forward + "up_proj"),
            down=loader.linear(feed_forward + "down_proj"),
        )
    return LayerWeights(
        input_norm=loader.tensor(base + "input_layernorm.weight"),
        qkv=loader.linear(attention + "q_proj", attention + "k_proj", attention + "v_proj"),
        o=loader.linear(attention + "o_proj"),
        post_norm=loader.tensor(base + "post_attention_layernorm.weight"),
        feed_forward=weights,
    )


def tensors_of(weights: Any) -> Iterator[torch.Tensor]:
    """Every tensor in a tree of weight dataclasses and tuples."""
    if isinstance(weights, torch.Tensor):
        yield weights
    elif isinstance(weights, tuple | list):
        for item in weights:
            yield from tensors_of(item)
    elif is_dataclass(weights):
        for field in fields(weights):
            yield from tensors_of(getattr(weights, field.name))


def nbytes_of(weights: Any) -> int:
    """Bytes of all weights in a tree as they are stored in memory."""
    return sum(tensor.nbytes for tensor in tensors_of(weights))
