"""A quantized checkpoint against its source: the error of every quantized tensor, and that the rest is a true copy."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import torch

from converters.findings import Collector, Finding
from converters.names import canonical_shapes
from converters.quant_config import LinearFormat
from converters.reader import Reader, TensorInfo
from l4tool.core.errors import CheckpointError
from quant import ops
from quant.dequantize import read_linear
from quant.reference import FP8_BLOCK
from quant.schemes import class_of

CHUNK_ELEMENTS = 4 * 2**20
MIN_ROWS = 1024  # what the kernels read side by side of a fused expert
READ_AHEAD = 2  # tensors beyond those in work
BEYOND = 1.001  # relative error of a row for which zeros would be the better weights


@dataclass(frozen=True)
class TensorError:
    """One quantized tensor. `error` and `square`: sums of (w - b)² and w² over it; `worst_row` the row of the largest
    relative error, `worst_row_error` that error; `max_abs_error` the largest |w - b|."""

    name: str
    group: str  # "experts", "shared" or "attention"
    kind: str  # "int2" … "int8" or "fp8"
    error: float
    square: float
    max_abs_error: float
    worst_row: int
    worst_row_error: float

    @property
    def relative_error(self) -> float:
        """Frobenius norm of the difference over that of the source."""
        return _relative(self.error, self.square)

    @property
    def sqnr_db(self) -> float | None:
        """-20 log10 of the relative error; None where there is no error."""
        return -20 * math.log10(self.relative_error) if self.relative_error else None


@dataclass(frozen=True)
class Compared:
    """`errors` worst first (NaN before all), `copies`: how many unquantized tensors were bit-equal."""

    errors: tuple[TensorError, ...]
    copies: int


def source_bytes(source: Reader) -> int:
    """What `compare` reads of the source."""
    return sum(info.nbytes for info in source.tensors().values())


def require_same_architecture(target: Reader, source: Reader) -> None:
    """Raises CheckpointError where the two cannot be the same model, or the source is quantized itself."""
    if source.quantization is not None:
        raise CheckpointError(
            f"{source.path} is quantized itself", hint="give the checkpoint that it was made from with --against"
        )
    if canonical_shapes(target.arch) != canonical_shapes(source.arch):
        raise CheckpointError(
            f"{target.path} and {source.path} are different architectures",
            hint="give the checkpoint that it was quantized from with --against",
        )


def compare(
    target: Reader, source: Reader, threads: int, on_bytes: Callable[[int], None], noted: Collector
) -> Compared:
    """Stream both checkpoints. What `target` lacks is not looked at; it was found before."""
    errors: list[TensorError] = []
    copies = 0
    stop = threading.Event()
    with ThreadPoolExecutor(threads, thread_name_prefix="compare") as pool:
        try:
            for info, result in _run(pool, threads, target, source, stop):
                if isinstance(result, TensorError):
                    errors.append(result)
                elif isinstance(result, Finding):
                    noted.add(result)
                else:
                    copies += result
                on_bytes(info.nbytes)
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    errors.sort(key=lambda one: (not math.isnan(one.relative_error), -one.relative_error, one.name))
    noted.add(*(finding for one in errors if (finding := _judge(one)) is not None))
    return Compared(tuple(errors), copies)


Result = TensorError | Finding | bool


def _run(
    pool: ThreadPoolExecutor, threads: int, target: Reader, source: Reader, stop: threading.Event
) -> Iterator[tuple[TensorInfo, Result]]:
    """(source tensor, result) as they finish; a few tensors are read ahead, and pages let go behind."""
    running: dict[Future[Result], TensorInfo] = {}
    used: deque[str] = deque()
    waiting = deque(source.tensors().values())
    while waiting or running:
        while waiting and len(running) < threads + READ_AHEAD:
            info = waiting.popleft()
            source.prefetch(info.name)
            running[pool.submit(_one, target, source, info, stop)] = info
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            info = running.pop(future)
            used.append(info.name)
            if len(used) > threads + READ_AHEAD:  # gate and up of one expert share their pages
                source.release(used.popleft())
            yield info, future.result()


def _one(target: Reader, source: Reader, info: TensorInfo, stop: threading.Event) -> Result:
    prefix = info.name.removesuffix(".weight")
    form = target.linear_format(prefix) if prefix != info.name else None
    if form is None:
        return _copied(target, source, info) if info.name in target.tensors() else False
    parts = [f"{prefix}.{part}" for part in form.value_parts]
    if any(part not in target.tensors() for part in parts):
        return False
    result = _measure(target, source, info, prefix, form, stop)
    for part in parts:
        target.release(part)
    return result


def _copied(target: Reader, source: Reader, info: TensorInfo) -> Finding | bool:
    other = target.tensors()[info.name]
    theirs, ours = target.read(info.name), source.read(info.name)
    if theirs.dtype != ours.dtype:
        what = f"is {theirs.dtype}, in the source {ours.dtype}".replace("torch.", "")
        return Finding("copy", f"{other.file}: tensor {info.name!r} {what}", other.file.name, info.name)
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[ours.dtype.itemsize]
    theirs, ours = theirs.view(bits), ours.view(bits)
    equal = torch.equal(theirs, ours)
    target.release(info.name)
    if equal:
        return True
    number = int((theirs != ours).sum())
    what = f"differs from the source in {number:,} of {ours.numel():,} values, though it is not quantized"
    return Finding("copy", f"{other.file}: tensor {info.name!r} {what}", other.file.name, info.name)


def _measure(
    target: Reader, source: Reader, info: TensorInfo, prefix: str, form: LinearFormat, stop: threading.Event
) -> TensorError:
    rows, cols = info.shape
    step = max(CHUNK_ELEMENTS // cols // MIN_ROWS, 1) * MIN_ROWS
    errors, squares, largest = [], [], 0.0
    for start in range(0, rows, step):
        if stop.is_set():
            raise InterruptedError("the comparison was stopped")
        part = slice(start, min(start + step, rows))
        back = read_linear(target, prefix, part)
        error, square, peak = ops.compare(source.read(info.name, part), back, form.group_size or FP8_BLOCK)
        errors.append(error)
        squares.append(square)
        largest = peak if math.isnan(peak) else max(largest, peak)
    error, square = torch.cat(errors), torch.cat(squares)
    relative = torch.where(error > 0, (error / square).sqrt(), error)  # 0 where both are 0, inf where only w is, or NaN
    worst = int(relative.argmax())
    sums = math.fsum(error.tolist()), math.fsum(square.tolist())
    return TensorError(
        info.name, class_of(info.name) or "other", form.kind, *sums, largest, worst, float(relative[worst])
    )


def _judge(one: TensorError) -> Finding | None:
    """A row that is further from its source than zeros would be was not made by rounding."""
    if one.worst_row_error <= BEYOND:
        return None
    if math.isnan(one.worst_row_error):
        return Finding("error", f"tensor {one.name!r} has no error: NaN or Inf in it or in the source", None, one.name)
    what = (
        f"tensor {one.name!r} differs from the source by {one.worst_row_error:.3g} times the size of row "
        f"{one.worst_row}: a wrong scale or wrong weights"
    )
    return Finding("error", what, None, one.name)


def _relative(error: float, square: float) -> float:
    if math.isnan(error) or math.isnan(square):
        return math.nan
    return math.sqrt(error / square) if square else math.inf if error else 0.0


def totals(errors: Sequence[TensorError]) -> list[dict[str, object]]:
    """One entry for each class and kind, and one for all: tensors, overall, mean and worst relative error."""
    groups: dict[tuple[str, str], list[TensorError]] = {}
    for one in errors:
        groups.setdefault((one.group, one.kind), []).append(one)
    entries = [(*key, members) for key, members in sorted(groups.items())] + [("all", "", list(errors))]
    return [
        {
            "class": group, "kind": kind, "tensors": len(members),
            "relative_error": _relative(_sum(members, "error"), _sum(members, "square")),
            "mean_relative_error": math.fsum(one.relative_error for one in members) / max(len(members), 1),
            "worst_relative_error": max((one.relative_error for one in members), default=0.0),
            "max_abs_error": max((one.max_abs_error for one in members), default=0.0),
        }
        for group, kind, members in entries
    ]  # fmt: skip


def _sum(members: Sequence[TensorError], field: str) -> float:
    return math.fsum(getattr(one, field) for one in members)
