"""Weights of the model in memory, and loading them through a Reader.

Weights are copied once into the form the kernels want (q/k/v and gate/up joined, experts of a layer in one tensor):
dense and INT4 ones in panels where this CPU has the kernels for it, else dense ones as [out, in]. The file's pages are
let go as they are copied: the peak is the weights plus one layer. Other quantized weights stay where the Reader maps
them (CPU) or go to the device as they are stored, joined; nothing is expanded. What goes to a device takes no memory of
the host's but the mapped pages of one tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch

from batch.kernels import ops
from batch.kernels.linears import (
    DenseLinear,
    Experts,
    Fp8Linear,
    FusedLinear,
    Int4Linear,
    Linear,
    PanelFp8Linear,
    PanelInt4Linear,
    PanelLinear,
)
from batch.model.upload import Upload
from converters.quant_config import LinearFormat
from converters.reader import Reader
from l4tool.core.arch import TextArch
from l4tool.core.errors import CheckpointError, UsageError
from quant.streaming import PACKING_BYTES

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
    """Reads tensors to one device and dtype. `dtype` is that of the activations and of every unquantized weight.

    activations "int8": INT4 weights take their inputs as int8. Raises UsageError where that cannot be.
    """

    def __init__(self, reader: Reader, device: torch.device, dtype: torch.dtype, activations: str = "auto") -> None:
        self.reader, self.device, self.dtype = reader, device, dtype
        self.packer = ops.packer(device, dtype)
        self.joins_parts = device.type == "meta" or ops.has_cuda_kernels(device)  # meta: asks for what a device would
        self._copy: Callable[[torch.Tensor, torch.Tensor], object] = torch.Tensor.copy_
        if self.joins_parts and device.type != "meta":
            self._copy = Upload(device).copy
        self.int8_activations = activations == "int8"
        if self.int8_activations:
            self._require_int8()

    def _require_int8(self) -> None:
        if self.dtype != torch.bfloat16:
            raise UsageError(
                f"--activations int8 needs bfloat16; this runs in {str(self.dtype).removeprefix('torch.')}",
                hint="add --dtype bfloat16, or leave --activations out",
            )
        if self.packer is None or not self.packer.has_int8():
            raise UsageError("--activations int8 needs a CPU with AVX-512 VNNI and BF16", hint="leave the option out")
        if not any(name.endswith(".weight_packed") for name in self.reader.tensors()):
            raise UsageError(
                f"--activations int8 is for INT4 weights; {self.reader.path} has none",
                hint="make them: l4tool quantize SRC --int4 -o OUT",
            )

    def tensor(self, name: str) -> torch.Tensor:
        """A private, contiguous copy; the file's pages are released."""
        source = self.reader.read(name)
        copy = torch.empty(source.shape, dtype=self.dtype, device=self.device)
        self._copy(copy, source)
        self.reader.release(name)
        return copy

    def linear(self, *prefixes: str, gated: bool = False) -> Linear:
        """One linear, or several over the same input with their outputs in order. Raises CheckpointError.

        gated: they are gate and up, whose outputs nobody but `ops.mlp` and `ops.moe` needs.
        """
        return self._bank([list(prefixes)], gated)[0]

    def experts(self, base: str, num_experts: int) -> Experts:
        """The routed experts under `base` ("….experts."), dense ones as views of one tensor per projection."""
        names = [[f"{base}{e}.gate_proj", f"{base}{e}.up_proj"] for e in range(num_experts)]
        downs = [[f"{base}{e}.down_proj"] for e in range(num_experts)]
        return Experts(self._bank(names, gated=True), self._bank(downs, gated=False))

    def _bank(self, names: list[list[str]], gated: bool) -> tuple[Linear, ...]:
        """Linears of the same shape, each of one or more joined by their outputs."""
        forms = [self.reader.linear_format(prefix) for group in names for prefix in group]
        if all(form is None for form in forms):
            return self._dense_bank(names, gated)
        form = forms[0]
        if self.packer is not None and form is not None and form.is_native and forms.count(form) == len(forms):
            if form.kind == "int4":
                rows, columns = self._shapes(names[0], "weight_packed")
                if self.packer.packs_int4(rows, 8 * columns, gated, form.group_size):
                    return self._int4_panels(names, gated)
            elif self.packer.packs_fp8(*self._shapes(names[0], "weight"), gated):
                return self._fp8_panels(names, gated, form.dynamic_activations)
        if self.joins_parts and form is not None and self._can_join(names, form, forms):
            return tuple(self._joined(group, form) for group in names)
        joined = [tuple(self._part(prefix) for prefix in group) for group in names]
        return tuple(parts[0] if len(parts) == 1 else FusedLinear(parts) for parts in joined)

    def _shapes(self, prefixes: list[str], suffix: str) -> tuple[list[int], int]:
        """Rows of each, and the columns of all."""
        infos = self.reader.tensors()
        shapes = [infos[f"{prefix}.{suffix}"].shape for prefix in prefixes]
        return [shape[0] for shape in shapes], shapes[0][1]

    def _dense_bank(self, names: list[list[str]], gated: bool) -> tuple[Linear, ...]:
        rows, columns = self._shapes(names[0], "weight")
        if self.packer is not None and self.packer.packs(rows, columns, gated):
            return self._dense_panels(names, gated, self.packer.panel_shape(sum(rows), columns))
        bank = torch.empty((len(names), sum(rows), columns), dtype=self.dtype, device=self.device)  # [E, N, K]
        for joined, group in zip(bank, names, strict=True):
            self._fill(joined, group)
        return tuple(DenseLinear(weight) for weight in bank.unbind(0))

    def _dense_panels(
        self, names: list[list[str]], gated: bool, shape: tuple[int, int, int]
    ) -> tuple[PanelLinear, ...]:
        words, packed = self.packer.empty_words((len(names), *shape)), []
        for first, groups in self._batches(names, "weight"):
            sources = [[self.reader.read(f"{prefix}.weight").to(self.dtype) for prefix in group] for group in groups]
            packed += self.packer.pack_dense(sources, gated, words[first : first + len(groups)])
            self._release(groups, "weight")
        return tuple(packed)

    def _int4_panels(self, names: list[list[str]], gated: bool) -> tuple[PanelInt4Linear, ...]:
        made: list[PanelInt4Linear] = []
        for _, groups in self._batches(names, "weight_packed"):
            packed = [[self.reader.read(f"{prefix}.weight_packed") for prefix in group] for group in groups]
            scales = [[self.reader.read(f"{prefix}.weight_scale").to(self.dtype) for prefix in g] for g in groups]
            made += self.packer.pack_int4(packed, scales, gated, self.int8_activations)
            self._release(groups, "weight_packed")
        return tuple(made)

    def _fp8_panels(self, names: list[list[str]], gated: bool, dynamic: bool) -> tuple[PanelFp8Linear, ...]:
        made: list[PanelFp8Linear] = []
        for _, groups in self._batches(names, "weight"):
            weights = [[self.reader.read(f"{prefix}.weight") for prefix in group] for group in groups]
            scales = [[self.reader.read(f"{prefix}.weight_scale") for prefix in group] for group in groups]
            made += self.packer.pack_fp8(weights, scales, gated, dynamic)
            self._release(groups, "weight")
        return tuple(made)

    def _batches(self, names: list[list[str]], suffix: str) -> Iterator[tuple[int, list[list[str]]]]:
        """(place of the first, as many of the weights as have PACKING_BYTES on disk): what is mapped at a time."""
        infos = self.reader.tensors()
        most = max(1, PACKING_BYTES // sum(infos[f"{prefix}.{suffix}"].nbytes for prefix in names[0]))
        for first in range(0, len(names), most):
            yield first, names[first : first + most]

    def _release(self, names: list[list[str]], suffix: str) -> None:
        for prefix in (prefix for group in names for prefix in group):
            self.reader.release(f"{prefix}.{suffix}")

    def _can_join(self, names: list[list[str]], form: LinearFormat, forms: list[LinearFormat | None]) -> bool:
        infos = self.reader.tensors()
        scales = {infos[f"{prefix}.weight_scale"].dtype for group in names for prefix in group}
        return form.is_native and forms.count(form) == len(forms) and scales == {torch.bfloat16}

    def _joined(self, prefixes: list[str], form: LinearFormat) -> Int4Linear | Fp8Linear:
        """Linears over the same input as one, as they are stored; INT4 scales turned, so that those of a group of k lie
        side by side, as the kernels read them."""
        suffix = "weight_packed" if form.kind == "int4" else "weight"
        rows, columns = self._shapes(prefixes, suffix)
        _, groups = self._shapes(prefixes, "weight_scale")
        dtype = torch.int32 if form.kind == "int4" else torch.float8_e4m3fn
        values = torch.empty((sum(rows), columns), dtype=dtype, device=self.device)
        scale = torch.empty((groups, sum(rows)), dtype=torch.bfloat16, device=self.device).T
        first = 0
        for prefix, count in zip(prefixes, rows, strict=True):
            part = slice(first, first + count)
            self._copy(values[part], self.reader.read(f"{prefix}.{suffix}"))
            self._copy(scale[part], self.reader.read(f"{prefix}.weight_scale").reshape(-1, groups))
            self.reader.release(f"{prefix}.{suffix}")
            first += count
        if form.kind == "int4":
            assert form.group_size
            return Int4Linear(values, scale, form.group_size)
        return Fp8Linear(values, scale, form.dynamic_activations)

    def _fill(self, joined: torch.Tensor, prefixes: tuple[str, ...] | list[str]) -> None:
        row = 0
        for prefix in prefixes:
            source = self.reader.read(f"{prefix}.weight")
            self._copy(joined[row : row + source.shape[0]], source)
            row += source.shape[0]
        for prefix in prefixes:
            self.reader.release(f"{prefix}.weight")

    def _part(self, prefix: str) -> DenseLinear | Int4Linear | Fp8Linear:
        form = self.reader.linear_format(prefix)
        if form is None:
            return DenseLinear(self.tensor(f"{prefix}.weight"))
        scale = self.reader.read(f"{prefix}.weight_scale").to(self.device)
        if form.kind == "int4" and form.is_native and form.group_size:
            packed = self.reader.read(f"{prefix}.weight_packed").to(self.device)
            return Int4Linear(packed, scale, form.group_size)
        if form.kind == "fp8" and form.is_native:
            weight = self.reader.read(f"{prefix}.weight").to(self.device)
            rows = scale.reshape(-1, 1).expand(weight.shape[0], 1).contiguous()  # [N, 1]
            return Fp8Linear(weight, rows, form.dynamic_activations)
        raise CheckpointError(
            f"{self.reader.path}: {prefix} is stored as {form}, which cannot be computed with",
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
            shared_gate_up=loader.linear(shared + "gate_proj", shared + "up_proj", gated=True),
            shared_down=loader.linear(shared + "down_proj"),
        )
    else:
        weights = MlpWeights(
            gate_up=loader.linear(feed_forward + "gate_proj", feed_forward + "up_proj", gated=True),
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
    return (node for node in _walk(weights) if isinstance(node, torch.Tensor))


def _walk(weights: Any) -> Iterator[Any]:
    """Every node of the tree."""
    yield weights
    if isinstance(weights, tuple | list):
        for item in weights:
            yield from _walk(item)
    elif is_dataclass(weights):
        for field in fields(weights):
            yield from _walk(getattr(weights, field.name))


def nbytes_of(weights: Any) -> int:
    """Bytes of all weights in a tree as they are stored in memory, without what panels add to those of the file: what
    fills up a router's only panel, and FP8 scales as float32."""
    added = sum(_added(node) for node in _walk(weights))
    return sum(tensor.nbytes for tensor in tensors_of(weights)) - added


def _added(weight: Any) -> int:
    if isinstance(weight, PanelLinear):
        return weight.words.nbytes - 2 * weight.out_features * weight.in_features
    return weight.scale.nbytes // 2 if isinstance(weight, PanelFp8Linear) else 0
