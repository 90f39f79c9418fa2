"""Weights that come from disk while the model runs, for checkpoints larger than memory.

A step asks for one layer after the other and for lm_head at its end. A thread loads the next while one is computed
with, and after lm_head the first layer for the next step. Whatever is asked for, at most 1 + `ahead` of these parts
are in memory.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, cast

import torch

from batch.kernels.linears import Linear
from batch.model.vision import VisionModel, load_vision
from batch.model.weights import MODEL, LayerWeights, Loader, layer_prefix, load_layer, require_top_1
from converters.disk import WeightFiles
from converters.names import EMBEDDING, LM_HEAD
from converters.read_ahead import ReadAhead
from converters.reader import Reader
from l4tool.core.errors import DeviceError


class PartStream:
    """Parts 0 … count - 1, over and over; `take` waits for the one asked for, which is normally the next.

    What `load` raises is raised by `take`; another take begins anew. One thread takes.
    """

    def __init__(self, load: Callable[[int], Any], count: int, ahead: int) -> None:
        self._load, self._count, self._ahead = load, count, ahead
        self.wait_s = 0.0  # that `take` waited
        self._changed = threading.Condition()
        self._ready: deque[tuple[int, Any]] = deque()  # an exception in the place of a part that failed
        self._next = 0  # to be loaded
        self._is_waiting = False  # somebody is in `take`
        self._turn = 0  # what was loading in an earlier turn is not wanted any more
        self.is_closed = False
        started = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(started,), name="weights", daemon=True)
        threads = torch.get_num_threads()
        self._thread.start()
        started.wait()
        torch.set_num_threads(threads)  # the thread's own setting had become that of all threads to come

    def take(self, index: int) -> Any:
        """Part `index`; whoever took the last one must have let go of it."""
        began = time.perf_counter()
        with self._changed:
            assert not self.is_closed, "the weights are closed"
            upcoming = self._ready[0][0] if self._ready else self._next
            if upcoming != index:
                self._ready.clear()
                self._next, self._turn = index, self._turn + 1
            self._is_waiting = True
            self._changed.notify_all()
            try:
                self._changed.wait_for(lambda: bool(self._ready))
            finally:
                self._is_waiting = False
            _, part = self._ready.popleft()
            if isinstance(part, BaseException):
                self._next, self._turn = 0, self._turn + 1
            self._changed.notify_all()
        self.wait_s += time.perf_counter() - began
        if isinstance(part, BaseException):
            raise part
        return part

    def close(self) -> None:
        """Let go of all parts; waits until the thread is done with the one that it loads."""
        with self._changed:
            self.is_closed = True
            self._ready.clear()
            self._changed.notify_all()
        self._thread.join()

    def _run(self, started: threading.Event) -> None:
        torch.set_num_threads(1)  # the cores are for those who compute
        started.set()
        while True:
            with self._changed:
                self._changed.wait_for(self._may_load)
                if self.is_closed:
                    return
                index, turn = self._next, self._turn
            try:
                part = self._load(index)
            except BaseException as error:
                part = error
            with self._changed:
                if self.is_closed:
                    return
                if turn == self._turn:
                    self._ready.append((index, part))
                    self._next = (index + 1) % self._count
                    self._changed.notify_all()
            del part  # or it would be one more in memory

    def _may_load(self) -> bool:
        if self.is_closed:
            return True
        if self._ready and isinstance(self._ready[-1][1], BaseException):
            return False
        return len(self._ready) < self._ahead or (self._is_waiting and not self._ready)


class StreamedText:
    """As TextWeights; norm [H] is all that stays in memory. Parts 0 … L - 1 are the layers, part L is lm_head."""

    def __init__(self, reader: Reader, files: WeightFiles, dtype: torch.dtype, activations: str, ahead: int) -> None:
        require_top_1(reader, reader.arch.text)
        self._reader, self._files, self._dtype = reader, files, dtype
        self._source = ReadAhead(reader, files)
        self._orders: dict[str, list[str]] = {}  # kind of part → what it read, in order, its own prefix cut off
        self._loader = Loader(cast(Reader, self._source), torch.device("cpu"), dtype, activations)
        self.norm = self._loader.tensor(f"{MODEL}norm.weight")
        self._source.finish()
        self._parts = PartStream(self._load, reader.arch.text.num_layers + 1, ahead)

    def embedding(self, token_ids: torch.Tensor) -> torch.Tensor:
        """As `TextWeights.embedding`, the rows read from disk."""
        rows, places = token_ids.unique(return_inverse=True)
        extent, info = self._reader.extent(EMBEDDING), self._reader.tensors()[EMBEDDING]
        found = self._files.rows(extent, extent.nbytes // info.shape[0], rows.tolist())  # uint8 [R, bytes]
        return found.view(info.dtype).to(self._dtype)[places]  # [T, H]

    def layer(self, index: int) -> LayerWeights:
        """Waits for it. The layer taken before must have been let go."""
        return self._parts.take(index)

    def head(self) -> Linear:
        """Waits for lm_head."""
        return self._parts.take(self._reader.arch.text.num_layers)

    @property
    def wait_s(self) -> float:
        """Seconds that computing waited for weights."""
        return self._parts.wait_s

    def close(self) -> None:
        """End the thread that loads; it stops between two tensors."""
        self._source.stop()
        self._parts.close()

    def _load(self, index: int) -> Any:
        """Load a part. What the next one will read is fetched by the end of it, so that the disk never rests."""
        arch = self._reader.arch.text
        following = (index + 1) % (arch.num_layers + 1)
        try:
            self._source.expect([*self._foreseen(index), *self._foreseen(following)])
            with torch.inference_mode():
                if index == arch.num_layers:
                    part: Any = self._loader.linear(LM_HEAD.removesuffix(".weight"))
                else:
                    part = load_layer(self._loader, arch, index)
        except BaseException as error:
            self._source.finish()
            if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
                raise DeviceError(
                    f"no memory is left for the weights of the next layer: {error}",
                    hint="give a smaller --memory or --kv-memory; the same command carries on",
                ) from error
            raise
        kind, base = self._kind(index)
        self._orders[kind] = [name.removeprefix(base) for name in self._source.names]
        return part

    def _kind(self, index: int) -> tuple[str, str]:
        """Parts of one kind read the same names, but for what these begin with."""
        arch = self._reader.arch.text
        if index == arch.num_layers:
            return "head", ""
        return "moe" if arch.is_moe(index) else "dense", layer_prefix(index)

    def _foreseen(self, index: int) -> list[str]:
        """The tensors of a part in the order in which the last part of its kind read its own."""
        kind, base = self._kind(index)
        return [base + name for name in self._orders.get(kind, ()) if self._exists(base + name)]

    def _exists(self, name: str) -> bool:
        """Layers of one kind may be quantized differently."""
        return name in self._reader.tensors() or name == LM_HEAD


class VisionOnDemand:
    """The vision tower, loaded when a picture comes and let go when the layers run."""

    def __init__(self, reader: Reader, files: WeightFiles, dtype: torch.dtype) -> None:
        self._reader, self._files, self._dtype = reader, files, dtype
        self._order: list[str] = []  # in which the tensors were read the last time
        self._model: VisionModel | None = None

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """As `VisionModel.encode`."""
        if self._model is None:
            self._model = self._load()
        return self._model.encode(pixels)

    def let_go(self) -> None:
        self._model = None

    def _load(self) -> VisionModel:
        arch = self._reader.arch.vision
        assert arch is not None
        source = ReadAhead(self._reader, self._files)
        source.expect(self._order)
        weights = load_vision(Loader(cast(Reader, source), torch.device("cpu"), self._dtype), arch)
        self._order = source.names
        source.finish()
        return VisionModel(arch, weights)
