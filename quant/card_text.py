"""The model card of a quantized checkpoint: front matter as the Hugging Face hub reads it, and what people read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from converters.origin import Origin
from converters.writing.plan import Plan
from l4tool import __version__
from l4tool.core import licence
from l4tool.core.arch import Arch
from l4tool.core.sizes import format_bytes
from quant.schemes import SCHEMES, Recipe, make_recipe

HUB_URL = "https://huggingface.co"
WORST = 5
SUFFIXES = {"int4": "INT4", "fp8": "FP8", "mixed": "INT4-FP8"}
CLASSES = {
    "experts": "routed experts",
    "shared": "shared experts, dense MLPs",
    "attention": "attention",
    "other": "everything else: router, norms, embeddings, lm_head, vision",
}
CARRIED = ("license", "license_name", "license_link")
HUB_LICENCE_FILES = ("LICENSE", "LICENSE.md")  # what the hub takes for `license_link`, besides a URL


@dataclass(frozen=True)
class CardFacts:
    """What the card is made of. `report` has `totals` and `tensors`; `files`: names beside the weights."""

    origin: Origin
    arch: Arch
    recipe: Recipe
    plan: Plan
    report: dict[str, Any]
    files: tuple[str, ...]

    @property
    def name(self) -> str:
        return suggested_name(self.origin, self.recipe)

    def file(self, start: str) -> str | None:
        return next((name for name in self.files if name.startswith(start)), None)


def suggested_name(origin: Origin, recipe: Recipe) -> str:
    """A name for the result: base model and scheme, beginning with "Llama" where the licence wants that."""
    base = re.sub(r"[^A-Za-z0-9._-]+", "-", origin.name).strip("-.") or "model"
    prefix = licence.NAME_PREFIX
    if origin.is_llama and not base.startswith(prefix):
        base = prefix + base[len(prefix) :] if base.lower().startswith(prefix.lower()) else f"{prefix}-{base}"
    return f"{base}-{SUFFIXES[recipe.scheme]}"


def command_line(origin: Origin, recipe: Recipe) -> str:
    """The command that makes these bytes: what decides them, and no path of this machine."""
    options = [f"--{recipe.scheme}"]
    if recipe.kinds["shared"] != SCHEMES[recipe.scheme]["shared"]:
        options.append("--no-shared-experts")
    if recipe.kinds["attention"] != SCHEMES[recipe.scheme]["attention"]:
        options.append(f"--attention {recipe.kinds['attention']}")
    if recipe.group_size != 128:
        options.append(f"--group-size {recipe.group_size}")
    if recipe.scale != make_recipe(recipe.scheme, format=recipe.format).scale:
        options.append(f"--scale {recipe.scale}")
    if recipe.format != "compressed-tensors":
        options.append(f"--format {recipe.format}")
    base = origin.repo or re.sub(r"[^A-Za-z0-9._-]+", "-", origin.name)
    return f"l4tool quantize {base} {' '.join(options)} -o {suggested_name(origin, recipe)}"


def model_card(facts: CardFacts) -> str:
    """README.md: YAML front matter, then Markdown. The same facts give the same text."""
    import yaml  # comes with huggingface-hub

    head = yaml.safe_dump(front_matter(facts), sort_keys=False, allow_unicode=True, width=1000)
    sections = (_intro(facts), _recipe(facts), _error(facts), _use(facts), _licence(facts))
    return f"---\n{head}---\n\n" + "\n".join(sections)


def front_matter(facts: CardFacts) -> dict[str, Any]:
    """Metadata for the hub. `base_model` only where the repository is known: the hub refuses any other value."""
    origin, recipe = facts.origin, facts.recipe
    values: dict[str, Any] = {}
    if origin.repo:
        values |= {"base_model": origin.repo, "base_model_relation": "quantized"}
    values |= _licence_fields(facts)
    if "language" in origin.card:
        values["language"] = origin.card["language"]
    if recipe.format == "compressed-tensors":
        values["library_name"] = "transformers"
    values["pipeline_tag"] = "text-generation" if facts.arch.vision is None else "image-text-to-text"
    formats = [kind for kind in ("int4", "fp8") if kind in recipe.kinds.values()]
    family = ["llama", "llama4"] if origin.is_llama else []
    values["tags"] = [*family, *formats, recipe.format, "quantized", "l4tool"]
    return values


def _licence_fields(facts: CardFacts) -> dict[str, Any]:
    if not facts.origin.is_llama:
        return {key: facts.origin.card[key] for key in CARRIED if facts.origin.card.get(key)}
    held = [name for name in HUB_LICENCE_FILES if name in facts.files]
    link = held[0] if held else licence.LICENCE_URL
    return {"license": "other", "license_name": licence.FAMILY, "license_link": link}


def _intro(facts: CardFacts) -> str:
    origin = facts.origin
    base = f"[{origin.repo}]({HUB_URL}/{origin.repo})" if origin.repo else f"`{re.sub('[`<>|]', '', origin.name)}`"
    commit = f" at commit `{origin.commit}`" if origin.commit else ""
    lines = [f"# {facts.name}", ""]
    if origin.is_llama:
        lines += [f"**{licence.BUILT_WITH}**", ""]
    lines.append(f"{base}{commit}, quantized with l4tool {__version__}.")
    source_card = facts.file("README.source")
    if source_card:
        lines.append(f"What the model is and how it was trained: [the base model's own card]({source_card}).")
    return "\n".join(lines) + "\n"


def _recipe(facts: CardFacts) -> str:
    recipe, plan = facts.recipe, facts.plan
    names = {
        "int4": f"INT4, groups of {recipe.group_size}, scales by {recipe.scale}",
        "fp8": "FP8 per output channel; activations FP8 per token at run time",
        "copy": f"{facts.arch.dtype}, unchanged",
    }
    rows = [
        (CLASSES.get(label, label), names.get(kind, kind), format_bytes(before), format_bytes(after))
        for label, (kind, before, after) in sorted(plan.classes.items(), key=lambda entry: _place(entry[0]))
    ]
    rows.append(("all", "", format_bytes(plan.source_bytes), format_bytes(plan.output_bytes)))
    table = _table(("tensors", "stored as", "before", "after"), rows)
    return (
        f"## Recipe\n\n{table}\n\nLayout: {recipe.format}. No calibration data. Made by\n\n"
        f"```\n{command_line(facts.origin, recipe)}\n```\n"
    )


def _place(label: str) -> int:
    return list(CLASSES).index(label) if label in CLASSES else len(CLASSES)


def _error(facts: CardFacts) -> str:
    totals, tensors = facts.report["totals"], facts.report["tensors"]
    if not tensors:
        return "## Measured error\n\nNo tensor was changed.\n"
    worst = sorted(tensors.items(), key=lambda entry: (-entry[1]["relative_error"], entry[0]))[:WORST]
    rows: list[tuple[str, str]] = [
        (f"all {len(tensors):,} quantized tensors together", f"{totals['overall_relative_error']:.4f}"),
        ("mean of the tensors", f"{totals['mean_relative_error']:.4f}"),
        *((f"worst: `{name}`", f"{entry['relative_error']:.4f}") for name, entry in worst),
    ]
    return (
        "## Measured error\n\nOf the weights, not of answers: the Frobenius norm of the difference over that of the "
        f"weight, after dequantization to bfloat16.\n\n{_table(('', 'relative error'), rows)}\n\n"
        "Every tensor: `l4tool-report.json`.\n"
    )


def _use(facts: CardFacts) -> str:
    if facts.recipe.format == "quanto":
        return (
            "## Use\n\nThe weights are in optimum-quanto's format: build the model, then load them with "
            "`optimum.quanto.requantize(model, state_dict, quantization_map)`, where `quantization_map` is "
            "`quantization_map.json`.\n"
        )
    multimodal = facts.arch.vision is not None
    model = "Llama4ForConditionalGeneration" if multimodal else "AutoModelForCausalLM"
    helper = "AutoProcessor" if multimodal else "AutoTokenizer"
    name = facts.name
    return (
        f"## Use\n\nvLLM:\n\n```\nvllm serve {name} --max-model-len 8192\n```\n\n"
        f"l4tool, for a JSONL file of requests:\n\n```\nl4tool batch in.jsonl out.jsonl --model {name}\n```\n\n"
        f"transformers, with the package `compressed-tensors`:\n\n```python\n"
        f"from transformers import {helper}, {model}\n\n"
        f'{"processor" if multimodal else "tokenizer"} = {helper}.from_pretrained("{name}")\n'
        f'model = {model}.from_pretrained("{name}", dtype="auto", device_map="auto")\n```\n'
    )


def _licence(facts: CardFacts) -> str:
    origin = facts.origin
    text, policy = facts.file("LICENSE"), facts.file("USE_POLICY")
    if not origin.is_llama:
        named = f"`{re.sub('[`<>|]', '', origin.licence_id)}`, " if origin.licence_id else ""
        where = f"see [{text}]({text})" if text else "see the base model"
        return f"## Licence\n\nThat of the base model: {named}{where}.\n"
    return (
        f"## Licence\n\n{licence.NOTICE}\n\n"
        f"- Licence: [{text or licence.LICENCE_URL}]({text or licence.LICENCE_URL})\n"
        f"- Acceptable use policy: [{policy or licence.POLICY_URL}]({policy or licence.POLICY_URL})\n"
        f"- {licence.EU_CLAUSE}\n- {licence.USERS_CLAUSE}\n- {licence.OUTPUTS_DUTY}\n"
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown; the first column left, the others as they are."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
