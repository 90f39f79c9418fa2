"""`plan`'s answer: what a model becomes under each scheme, what making it takes, and where it then fits.

Sizes come from `build_plan`, which is what `quantize` runs: they are the sizes it writes, not estimates.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from converters.names import canonical_shapes
from converters.reader import Reader
from converters.writing.checks import SLACK_BYTES
from converters.writing.plan import BASE_BYTES, Budget, Plan, make_budget, split, unfinished
from l4tool.core.errors import UsageError
from quant.fitting import Demand, Fitting, Hardware, Weights, fit_on, weigh, would_fit
from quant.hub_supply import window_bytes
from quant.plan import build_plan
from quant.schemes import Recipe

STORED = "stored"  # the checkpoint as it is
# bf16 read per second on two cores, the slower of what was measured where a scheme was not: docs/benchmarks.md
GIGABYTES_PER_S = {"int4": 0.83, "fp8": 0.79, "mixed": 0.79}


@dataclass(frozen=True)
class Making:
    """What quantizing takes. `streaming_disk_bytes`: with the source downloaded shard by shard; None without files.

    `seconds` is an estimate: the measured rate, or the given disk speed where that is lower.
    """

    source_file_bytes: int
    disk_bytes: int
    streaming_disk_bytes: int | None
    memory_bytes: int
    pieces_at_once: int
    gigabytes_per_s: float
    seconds: float
    limited_by_disk: bool


@dataclass(frozen=True)
class Outlook:
    """One scheme. `file_bytes`: all shards on disk; `tensor_bytes`: without headers.

    Where it does not fit: `would_fit`, the hardware that it fits, `schemes_that_fit` the hardware asked about, and
    whether it fits that with keys and values in FP8.
    """

    scheme: str
    file_bytes: int
    tensor_bytes: int
    making: Making | None
    fitting: Fitting
    would_fit: tuple[Hardware, ...]
    fits_with_fp8_kv: bool = False
    schemes_that_fit: tuple[str, ...] = ()


@dataclass(frozen=True)
class Question:
    """What is asked. `disk_bytes_per_s` None: as fast as the machine that was measured."""

    hardware: Hardware
    demand: Demand
    memory_bytes: int
    jobs: int | None = None
    disk_bytes_per_s: int | None = None


def stored(reader: Reader, question: Question) -> Outlook:
    """The checkpoint as it is."""
    infos = reader.tensors().values()
    tensor_bytes = sum(info.nbytes for info in infos)
    weights = weigh(reader.arch, ((info.name, info.nbytes) for info in infos))
    return _outlook(reader, STORED, (source_file_bytes(reader), tensor_bytes), None, weights, question)


def quantized(reader: Reader, recipe: Recipe, question: Question) -> Outlook:
    """The checkpoint that `recipe` makes of it. Raises UsageError where it does not fit a tensor, or the memory."""
    plan = build_plan(reader, recipe, "cpu")
    weights = weigh(reader.arch, ((spec.name, spec.nbytes) for shard in plan.shards for spec in shard.specs))
    sizes = sum(shard.nbytes for shard in plan.shards), plan.output_bytes
    making = _making(reader, recipe, plan, question)
    return _outlook(reader, recipe.scheme, sizes, making, weights, question)


def with_schemes_that_fit(outlooks: list[Outlook], all_of_them: list[Outlook]) -> list[Outlook]:
    """`outlooks`, each that does not fit with the names of those that do."""
    names = tuple(other.scheme for other in all_of_them if other.fitting.fits)
    return [found if found.fitting.fits else replace(found, schemes_that_fit=names) for found in outlooks]


def source_file_bytes(reader: Reader) -> int:
    """All shards on disk; for a config alone, the tensors that it implies."""
    files = reader.weight_files()
    if not files:
        return sum(info.nbytes for info in reader.tensors().values())
    return sum(path.stat().st_size for path in files)


def num_parameters(reader: Reader) -> int:
    return sum(math.prod(shape) for shape in canonical_shapes(reader.arch).values())


def _outlook(
    reader: Reader, scheme: str, sizes: tuple[int, int], making: Making | None, weights: Weights, question: Question
) -> Outlook:
    fitting = fit_on(reader.arch, weights, question.hardware, question.demand)
    other = [] if fitting.fits else would_fit(reader.arch, weights, question.hardware, question.demand)
    halved = replace(question.demand, kv_dtype="fp8")
    fits_halved = not fitting.fits and fit_on(reader.arch, weights, question.hardware, halved).fits
    return Outlook(scheme, *sizes, making, fitting, tuple(other), fits_halved)


def _making(reader: Reader, recipe: Recipe, plan: Plan, question: Question) -> Making:
    budget = make_budget(plan, question.memory_bytes, question.jobs)
    source, output = source_file_bytes(reader), sum(shard.nbytes for shard in plan.shards) + SLACK_BYTES
    shards = [path.stat().st_size for path in unfinished(plan, {})] if reader.weight_files() else []
    rate = GIGABYTES_PER_S[recipe.scheme]
    seconds = source / (rate * 1e9)
    disk_s = (source + output) / question.disk_bytes_per_s if question.disk_bytes_per_s else 0.0
    return Making(
        source_file_bytes=source,
        disk_bytes=output,
        streaming_disk_bytes=output + window_bytes(shards) if shards else None,
        memory_bytes=BASE_BYTES + budget.jobs * _largest_unit_bytes(plan, budget),
        pieces_at_once=budget.jobs,
        gigabytes_per_s=rate,
        seconds=max(seconds, disk_s),
        limited_by_disk=disk_s > seconds,
    )


def _largest_unit_bytes(plan: Plan, budget: Budget) -> int:
    """Anonymous memory of the largest unit that will be worked on."""
    first = (next(split(item, budget)) for items in plan.items for item in items)
    return max(unit.item.encoder.scratch_bytes(unit.item.info, unit.stop - unit.start) for unit in first)


def as_json(model: dict[str, Any], outlooks: list[Outlook], question: Question) -> dict[str, Any]:
    """The whole answer in plain values, under keys that stay."""
    hardware, demand = question.hardware, question.demand
    return {
        "model": model,
        "gpu": {"name": hardware.gpu.name, "count": hardware.count, "usable_bytes": hardware.gpu.usable_bytes},
        "context_tokens": demand.context_tokens,
        "concurrency": demand.concurrency,
        "kv_dtype": demand.kv_dtype,
        "schemes": {
            outlook.scheme: {
                "file_bytes": outlook.file_bytes,
                "tensor_bytes": outlook.tensor_bytes,
                "quantize": asdict(outlook.making) if outlook.making else None,
                "per_gpu": asdict(outlook.fitting),
                "fits": outlook.fitting.fits,
                "would_fit": [{"gpu": other.gpu.name, "count": other.count} for other in outlook.would_fit],
                "fits_with_fp8_kv": outlook.fits_with_fp8_kv,
                "schemes_that_fit": list(outlook.schemes_that_fit),
            }
            for outlook in outlooks
        },
    }


def require_unquantized(reader: Reader, scheme: str) -> None:
    """Raises UsageError for a scheme asked of a checkpoint that is quantized already."""
    if reader.quantization is not None:
        raise UsageError(
            f"{reader.path} is quantized already, so it cannot become {scheme}",
            hint=f"leave --{scheme} away to plan with it as it is, or give the original checkpoint "
            f"(or what `l4tool convert {reader.path} -o OUT --to hf` makes of it)",
        )
