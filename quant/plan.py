"""The whole job of a quantize run from headers: what every canonical tensor becomes, and in which shard."""

from __future__ import annotations

from converters.names import TEXT_PREFIX
from converters.reader import Reader
from converters.writer import DEFAULT_SHARD_BYTES, plan_shards
from converters.writing.plan import Item, Plan
from quant.encoders import make_encoders
from quant.schemes import Recipe, class_of


def build_plan(reader: Reader, recipe: Recipe, device: str, max_shard_bytes: int = DEFAULT_SHARD_BYTES) -> Plan:
    """Reader's headers and recipe → Plan. Raises UsageError where the recipe does not fit a tensor."""
    encoders = make_encoders(recipe, device)
    text_only = reader.arch.vision is None
    items, owner, specs = [], {}, []
    classes: dict[str, tuple[str, int, int]] = {}
    for name, info in reader.tensors().items():
        encoder = encoders[recipe.kind_of(name)]
        stored = name.removeprefix(TEXT_PREFIX) if text_only else name
        parts = encoder.parts(info, stored)
        item = Item(info, stored, encoder, tuple(part.name for part in parts), sum(part.nbytes for part in parts))
        items.append(item)
        specs += parts
        owner.update({part.name: item for part in parts})
        label = class_of(name) or "other"
        _, before, after = classes.get(label, ("", 0, 0))
        classes[label] = (encoder.kind, before + info.nbytes, after + item.nbytes_out)
    shards = plan_shards(specs, max_shard_bytes, lambda spec: owner[spec.name].stored)
    shard_of = {spec.name: number for number, shard in enumerate(shards) for spec in shard.specs}
    grouped: list[list[Item]] = [[] for _ in shards]
    first_part = {id(item): name for name, item in reversed(owner.items())}
    for item in items:
        grouped[shard_of[first_part[id(item)]]].append(item)
    totals = (sum(item.info.nbytes for item in items), sum(item.nbytes_out for item in items))
    return Plan(shards, grouped, *totals, classes)
