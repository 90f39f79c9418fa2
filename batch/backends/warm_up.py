"""Makes the CPU kernels ready while the weights load: a tiny model of the same kinds runs a few requests.

Importing numba and reading compiled kernels takes half a second, compiling them after an installation many seconds;
reading weights leaves a core and the interpreter free for that. Only what this checkpoint needs is compiled, because it
is found by running: every kind of layer that the checkpoint has, stored as the checkpoint stores it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import sys
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch

from batch.engine.engine import Engine, EngineConfig
from batch.engine.sequence import Sequence
from batch.model.model import load_model
from batch.requests import SamplingParams
from converters.quant_config import LinearFormat
from converters.reader import Extent, Reader, TensorInfo
from l4tool.core.arch import Arch, TextArch

SWITCH_S = 0.0005  # while two threads share the interpreter: the default lets the one that loads wait ten times as long
HIDDEN, WIDTH, VOCAB, EXPERTS, CONTEXT = 256, 256, 512, 2, 1024  # of the tiny model; widths are whole INT4 groups
LAYER = "language_model.model.layers."


class WarmUp:
    """`with WarmUp(reader, dtype, activations):` load the weights; at the end the kernels are ready too.

    What fails here does not end the run: the first step meets it again, with a sequence to blame. L4TOOL_DEBUG shows
    it.
    """

    def __init__(self, reader: Reader, dtype: str | None, activations: str) -> None:
        self._reader, self._dtype, self._activations = reader, dtype, activations
        self._thread = threading.Thread(target=self._run, name="warm-up", daemon=True)
        self._is_wanted = True

    def __enter__(self) -> WarmUp:
        self._switch_s = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_S)
        self._thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._is_wanted = error is None
        self._thread.join()  # also after an error: a process must not end in the middle of a compiler
        sys.setswitchinterval(self._switch_s)

    def _run(self) -> None:
        try:
            for _ in tiny_steps(self._reader, self._dtype, self._activations):
                if not self._is_wanted:
                    return
        except Exception:
            if os.environ.get("L4TOOL_DEBUG"):
                traceback.print_exc()


def tiny_steps(reader: Reader, dtype: str | None, activations: str = "auto") -> Iterator[list[Sequence]]:
    """The steps of a tiny model with the layers of `reader`'s: long and short prompts, alone and together."""
    model = load_model(TinyReader(reader), "cpu", dtype, activations)
    engine = Engine(model, EngineConfig(512, 16, 16 << 20, 16), eos_token_ids=())
    # One long prompt, sequences with a common beginning, one that decodes alone at the end.
    for name, length in enumerate((600, *itertools.repeat(40, 9), 1)):
        engine.add(name, [1] * (length - 1) + [2 + name], SamplingParams(6 if length == 1 else 3))
    while engine.has_work:
        yield engine.step()
    engine.close()


class TinyReader(Reader):
    """The checkpoint of `reader` with small dimensions, one layer of each kind and random weights."""

    def __init__(self, reader: Reader) -> None:
        self._real = reader
        self.path: Path = reader.path
        self.dtype = reader.dtype
        self.layout, self.quantization, self.config = reader.layout, reader.quantization, reader.config
        self._layers = list(_one_of_each_kind(reader.arch.text))
        self.arch: Arch = dataclasses.replace(reader.arch, text=_tiny(reader.arch.text, self._layers), vision=None)
        self._random = torch.Generator().manual_seed(0)

    def tensors(self) -> dict[str, TensorInfo]:
        names = [name for name in self._real.tensors() if self._is_here(name)]
        back = {real: place for place, real in enumerate(self._layers)}
        infos = {}
        for name in names:
            tiny = name
            if name.startswith(LAYER):
                number, _, rest = name.removeprefix(LAYER).partition(".")
                tiny = f"{LAYER}{back[int(number)]}.{rest}"
            info = self._real.tensors()[name]
            infos[tiny] = dataclasses.replace(info, name=tiny, shape=tuple(self._shape(tiny)))
        return infos

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        real = self._real.read(self._real_name(name))  # a view: nothing is read
        if real.dtype.is_floating_point:
            tiny = torch.randn(self._shape(name), generator=self._random).mul_(0.02).to(real.dtype)
        else:
            tiny = torch.randint(-(2**31), 2**31 - 1, self._shape(name), generator=self._random, dtype=real.dtype)
        return tiny if real.is_contiguous() else tiny.T.contiguous().T  # fused experts are stored [in, out]

    def extent(self, name: str) -> Extent:
        return self._real.extent(self._real_name(name))

    def from_bytes(self, name: str, raw: torch.Tensor) -> torch.Tensor:
        return self._real.from_bytes(self._real_name(name), raw)

    def release(self, name: str) -> None:
        pass

    def prefetch(self, name: str, rows: slice | None = None) -> None:
        pass

    def forget(self, file: Path) -> None:
        pass

    def close(self) -> None:
        pass

    def side_files(self) -> list[Path]:
        return []

    def weight_files(self) -> list[Path]:
        return []

    def linear_format(self, prefix: str) -> LinearFormat | None:
        return self._real.linear_format(self._real_name(prefix))

    def _real_name(self, name: str) -> str:
        if not name.startswith(LAYER):
            return name
        number, _, rest = name.removeprefix(LAYER).partition(".")
        return f"{LAYER}{self._layers[int(number)]}.{rest}"

    def _is_here(self, name: str) -> bool:
        if not name.startswith(LAYER):
            return name.startswith("language_model.")
        parts = name.removeprefix(LAYER).split(".")
        is_expert = parts[1:3] == ["feed_forward", "experts"]
        return int(parts[0]) in self._layers and not (is_expert and int(parts[3]) >= EXPERTS)

    def _shape(self, name: str) -> list[int]:
        prefix, _, what = name.rpartition(".")
        if prefix.endswith("norm"):
            return [HIDDEN]
        rows, columns = _linear_shape(prefix.rpartition(".")[2], prefix, self.arch.text)
        form = self.linear_format(prefix)
        if what == "weight_packed":
            return [rows, columns // 8]
        if what == "weight_scale":
            return [rows, columns // form.group_size if form is not None and form.group_size else 1]
        return [rows, columns]


def _one_of_each_kind(text: TextArch) -> Iterator[int]:
    """The first layer of each kind: routed or dense, with or without rope."""
    seen = set()
    for layer in range(text.num_layers):
        kind = (text.is_moe(layer), text.rope_layers[layer])
        if kind not in seen:
            seen.add(kind)
            yield layer


def _tiny(text: TextArch, layers: list[int]) -> TextArch:
    """`text` with small dimensions and the given layers; what else decides about kernels stays: heads per group,
    head_dim."""
    return dataclasses.replace(
        text, vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=WIDTH, intermediate_size_mlp=WIDTH,
        num_layers=len(layers), num_heads=text.num_heads // text.num_kv_heads, num_kv_heads=1, num_experts=EXPERTS,
        moe_layers=tuple(place for place, layer in enumerate(layers) if text.is_moe(layer)),
        rope_layers=tuple(text.rope_layers[layer] for layer in layers), attention_chunk_size=CONTEXT,
        max_position_embeddings=CONTEXT,
    )  # fmt: skip


def _linear_shape(kind: str, prefix: str, text: TextArch) -> tuple[int, int]:
    """[out, in] of a Linear by its last name."""
    heads, groups = text.num_heads * text.head_dim, text.num_kv_heads * text.head_dim
    if kind == "router":
        return EXPERTS, HIDDEN
    shapes = {
        "embed_tokens": (VOCAB, HIDDEN), "lm_head": (VOCAB, HIDDEN), "q_proj": (heads, HIDDEN),
        "k_proj": (groups, HIDDEN), "v_proj": (groups, HIDDEN), "o_proj": (HIDDEN, heads),
        "gate_proj": (WIDTH, HIDDEN), "up_proj": (WIDTH, HIDDEN), "down_proj": (HIDDEN, WIDTH),
    }  # fmt: skip
    assert kind in shapes, f"no shape for {prefix}"
    return shapes[kind]


@contextlib.contextmanager
def warm_up(reader: Reader, device: str, dtype: str | None, activations: str = "auto") -> Iterator[None]:
    """While it is open, the CPU kernels that `reader`'s model needs are made ready; on other devices nothing is."""
    if torch.device(device).type != "cpu":
        yield
        return
    with WarmUp(reader, dtype, activations):
        yield
