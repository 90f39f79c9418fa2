"""A loaded Llama 4: text, vision and the memory figures that the engine plans with."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch

from batch.kernels import ops
from batch.model import kv as paged
from batch.model.head import LogitRows
from batch.model.inputs import StepInput
from batch.model.kv import KVCache
from batch.model.loading import load_weights
from batch.model.stream import StreamedText, VisionOnDemand
from batch.model.text import TextModel
from batch.model.vision import VisionModel
from batch.model.weights import nbytes_of
from batch.requests import ImageTiles
from converters.disk import WeightFiles
from converters.reader import Reader
from l4tool.core.arch import Arch
from l4tool.core.errors import DeviceError, UsageError
from quant.memory import Kind, bytes_per_block

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}


class Model:
    """One model on one device. `forward` and `encode_images` are all that runs; neither keeps state."""

    def __init__(
        self, arch: Arch, text: TextModel, vision: VisionModel | VisionOnDemand | None, device: torch.device,
        dtype: torch.dtype, files: WeightFiles | None = None, kv_dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        self.arch, self.text, self.vision = arch, text, vision
        self.device, self.dtype = device, dtype
        self.kv_dtype = kv_dtype or dtype  # of keys and values in the cache
        self._files = files  # that weights are streamed from
        tower = vision.weights if isinstance(vision, VisionModel) else None
        self.weights_nbytes = nbytes_of(text.weights) + nbytes_of(tower)  # of those that stay in memory

    def kv_bytes_per_block(self, kind: Kind, block_size: int) -> int:
        """Bytes of one KV block ("full" or "chunked") over all its layers."""
        return bytes_per_block(self.arch.text, kind, block_size, self.kv_dtype.itemsize)

    def allocate_kv(self, num_full_blocks: int, num_chunked_blocks: int, block_size: int) -> KVCache:
        """An empty paged cache. Raises DeviceError when it does not fit."""
        try:
            return paged.allocate(
                self.arch.text, num_full_blocks, num_chunked_blocks, block_size, self.device, self.kv_dtype
            )
        except (MemoryError, RuntimeError) as error:
            raise DeviceError(f"the KV cache does not fit: {error}", hint="give a smaller --kv-memory") from error

    @torch.inference_mode()
    def forward(self, step: StepInput, kv: KVCache) -> torch.Tensor:
        """One step over flat tokens: updates `kv`, returns float32 logits [N, V] for step.logits_rows."""
        return self.rows(step, kv).logits()

    @torch.inference_mode()
    def rows(self, step: StepInput, kv: KVCache) -> LogitRows:
        """As `forward`, but the logits come when they are asked for, some rows at a time."""
        if isinstance(self.vision, VisionOnDemand):
            self.vision.let_go()
        return self.text.rows(step, kv)

    @torch.inference_mode()
    def encode_images(self, images: Sequence[ImageTiles]) -> list[torch.Tensor]:
        """Per picture: features [num_tiles · tokens_per_tile, H] in the order its patch tokens stand in the prompt."""
        if self.vision is None:
            raise UsageError("this checkpoint has no vision tower", hint="send text only, or use a multimodal export")
        return [self.vision.encode(torch.from_numpy(image.pixels)) for image in images]

    @property
    def is_streamed(self) -> bool:
        """Every step reads the weights anew."""
        return self._files is not None

    def weights_read(self) -> tuple[int, float]:
        """Bytes of streamed weights read so far, and seconds that computing waited for them."""
        if self._files is None or not isinstance(self.text.weights, StreamedText):
            return 0, 0.0
        return self._files.num_bytes, self.text.weights.wait_s

    def close(self) -> None:
        """End what streams weights; without that nothing happens."""
        if isinstance(self.text.weights, StreamedText):
            self.text.weights.close()
        if self._files is not None:
            self._files.close()


def load_model(
    reader: Reader,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
    activations: str = "auto",
    kv_dtype: str = "auto",
) -> Model:
    """Load every weight of a checkpoint. dtype None: the checkpoint's own. activations "int8": inputs of INT4 weights
    are quantized before each product. kv_dtype "fp8": keys and values are cached in e4m3. Raises DeviceError,
    UsageError, CheckpointError."""
    where, kind = resolve_device(device), resolve_dtype(dtype, reader.arch)
    if kv_dtype == "fp8" and not ops.has_cuda_kernels(where):
        raise DeviceError(
            "--kv-dtype fp8 needs a CUDA device, and torch sees none", hint="run it where there is one, or leave it out"
        )
    if where.type == "cuda" and where.index is not None:
        torch.cuda.set_device(where)  # kernels are launched on the current one
    try:
        with torch.inference_mode():
            weights, tower = load_weights(reader, where, kind, activations)
            text = TextModel(reader.arch.text, weights)
            vision = None if tower is None or reader.arch.vision is None else VisionModel(reader.arch.vision, tower)
    except torch.OutOfMemoryError as error:
        raise DeviceError(
            f"{reader.path} does not fit on {where}: {error}", hint="quantize it first: l4tool quantize --int4"
        ) from error
    held = torch.float8_e4m3fn if kv_dtype == "fp8" else None
    return Model(reader.arch, text, vision, where, kind, kv_dtype=held)


def stream_model(
    reader: Reader, dtype: torch.dtype | str | None, activations: str, ahead: int, keep_cached: bool
) -> Model:
    """A model on the CPU whose layers are read while it runs, `ahead` (0 or 1) of them before they are needed; it
    must be closed. `keep_cached`: files stay in the page cache. Raises UsageError, CheckpointError, InputMissing."""
    kind, arch = resolve_dtype(dtype, reader.arch), reader.arch
    files = WeightFiles(reader.weight_files(), keep_cached)
    try:
        text = TextModel(arch.text, StreamedText(reader, files, kind, activations, ahead))
    except BaseException:
        files.close()
        raise
    vision = VisionOnDemand(reader, files, kind) if arch.vision is not None else None
    return Model(arch, text, vision, torch.device("cpu"), kind, files)


def resolve_device(device: str | torch.device) -> torch.device:
    """'cpu', 'cuda' or 'cuda:1' → a device that is there. Raises UsageError, DeviceError."""
    try:
        where = torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"not a device: {device!r}", hint="write cpu, cuda or cuda:0") from error
    if where.type == "cpu":
        return where
    if where.type != "cuda":
        raise UsageError(f"device {where} is not supported", hint="use --device cpu or --device cuda")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (where.index or 0) >= count:
        raise DeviceError(f"device {where} is not available: torch sees {count} CUDA devices", hint="use --device cpu")
    if importlib.util.find_spec("triton") is None:
        raise DeviceError(f"device {where} needs Triton, which is not installed", hint="pip install 'l4tool[cuda]'")
    # Some of torch.cuda's functions refuse a device without a number.
    return where if where.index is not None else torch.device("cuda", torch.cuda.current_device())


def resolve_dtype(dtype: torch.dtype | str | None, arch: Arch) -> torch.dtype:
    """The activation dtype; None means the checkpoint's. Raises UsageError."""
    name = str(arch.dtype if dtype is None else dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise UsageError(f"dtype {name} is not supported", hint=f"use one of {', '.join(DTYPES)}")
    return DTYPES[name]
