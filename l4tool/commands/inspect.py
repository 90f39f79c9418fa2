"""`l4tool inspect`: options, one call, and the tables that are printed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click


@click.command("inspect", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model", metavar="DIR|REPO")
@click.option("--tensors", is_flag=True, help="List every tensor, not one line for each kind.")
@click.option("--shards", is_flag=True, help="List every weight file.")
@click.option("--filter", "wanted", metavar="GLOB|/REGEX/", help="Only tensors with this in their names.")
@click.option("--stored", is_flag=True, help="Tensors as the files name and shape them, instead of one per Linear.")
@click.option("--json", "as_json", is_flag=True, help="Everything as JSON.")
def command(model: str, tensors: bool, shards: bool, wanted: str | None, stored: bool, as_json: bool) -> int:
    """Show layout, architecture, quantization, tokenizer, licence and tensors of a checkpoint in any layout.

    Reads headers only: of a folder, or of a repository on the hub (a few small requests). A broken folder is shown as
    far as it can be read; the exit code then says what is wrong.
    """
    from converters.findings import worst_code
    from converters.inspection import inspect, matcher
    from converters.survey import survey

    matcher(wanted)
    found = survey(_folder(model))
    try:
        facts = inspect(found, stored, wanted) | {"path": model}
    finally:
        found.close()
    if as_json:
        click.echo(json.dumps(facts, indent=2, ensure_ascii=False))
    else:
        click.echo(render(facts, tensors, shards, wanted))
        _complain(facts)
    return worst_code(found.findings)


def _folder(model: str) -> Path:
    """The folder itself, or the skeleton of a repository."""
    from l4tool.hub.names import is_repo, parse_repo

    if not is_repo(model):
        return Path(model)
    from l4tool.hub.client import Hub
    from l4tool.hub.local import locate
    from l4tool.hub.skeleton import cached_skeleton

    local = locate(model)
    if local is not None:
        return local
    hub = Hub()
    return cached_skeleton(hub, hub.snapshot(parse_repo(model)))


def render(facts: dict[str, Any], tensors: bool, shards: bool, wanted: str | None) -> str:
    """The facts for a person."""
    from l4tool.core.console import table
    from l4tool.core.sizes import format_bytes

    parts = [table(_summary(facts))]
    if facts["classes"] and wanted is None:
        rows = [(c["class"], c["tensors"], ", ".join(c["dtypes"]), format_bytes(c["bytes"])) for c in facts["classes"]]
        rows.append(("all", sum(row[1] for row in rows), "", format_bytes(sum(c["bytes"] for c in facts["classes"]))))
        parts.append(table(rows, header=("class", "tensors", "stored as", "size")))
    parts.append(_tensor_table(facts, tensors))
    if shards and facts["shards"]:
        files = [(s["file"], s["tensors"] or "-", format_bytes(s["bytes"])) for s in facts["shards"]]
        parts.append(table(files, header=("file", "tensors", "size")))
    if wanted is not None and not facts["tensors"]:
        parts.append(f"no tensor's name fits {wanted}")
    return "\n\n".join(part for part in parts if part)


def _tensor_table(facts: dict[str, Any], each: bool) -> str:
    from l4tool.core.console import table
    from l4tool.core.sizes import format_bytes

    if each:
        rows = [(t["name"], _shape(t), t["dtype"], format_bytes(t["bytes"]), t["file"]) for t in facts["tensors"]]
        return table(rows, header=("tensor", "shape", "dtype", "size", "file")) if rows else ""
    rows = [(k["pattern"], k["count"], _shape(k), k["dtype"], format_bytes(k["bytes"])) for k in facts["kinds"]]
    return table(rows, header=("tensor", "count", "shape", "dtype", "size")) if rows else ""


def _shape(entry: dict[str, Any]) -> str:
    return " × ".join(map(str, entry["shape"])) or "scalar"


def _summary(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """What stands at the top: one fact a line, its name before it."""
    from l4tool.core.sizes import format_bytes

    rows = [("layout", facts["layout_name"])]
    if facts["shards"]:
        sizes = [shard["bytes"] for shard in facts["shards"]]
        span = f", {format_bytes(min(sizes))} to {format_bytes(max(sizes))} each" if len(sizes) > 1 else ""
        files = "1 file" if len(sizes) == 1 else f"{len(sizes)} files"
        rows.append(("weights", f"{format_bytes(facts['bytes'])} in {files}{span}"))
    rows += _architecture(facts)
    if facts["params"] is not None:
        scalars = {key: value for key, value in facts["params"].items() if not isinstance(value, dict | list)}
        rows.append(("params.json", ", ".join(f"{key} {value}" for key, value in scalars.items())))
    elif facts["architecture"] is not None or facts["quantization"] is not None:
        rows += _quantization(facts["quantization"])
    rows += _beside(facts)
    width = max(len(name) for name, _ in rows)
    return [(f"{name:<{width}}  {text}",) for name, text in rows]  # type: ignore[misc]  # text lines up on the left


def _architecture(facts: dict[str, Any]) -> list[tuple[str, str]]:
    from converters.inspection import layer_ranges

    arch, counts = facts["architecture"], facts["parameters"]
    if arch is None:
        return []
    t, v = arch["text"], arch["vision"]
    moe = tuple(layer in t["moe_layers"] for layer in range(t["num_layers"]))
    scaling = t["rope_scaling"]
    without = layer_ranges(t["rope_layers"], False)
    some = False in t["rope_layers"]
    rope = f"theta {t['rope_theta']:g}, all layers" + (f" but {without}" if some else "")
    if scaling:
        rope += f"; scaled by {scaling['factor']:g} (low {scaling['low_freq_factor']:g}, "
        rope += f"high {scaling['high_freq_factor']:g}, from {scaling['original_max_position_embeddings']:,})"
    rows = [
        ("parameters", f"{_count(counts['total'])}, {_count(counts['active'])} active for a text token"),
        ("text", f"{t['num_layers']} layers, hidden {t['hidden_size']}, vocabulary {t['vocab_size']:,}, {arch['dtype']}"
                 + (", tied embeddings" if t["tie_word_embeddings"] else "")),
        ("attention", f"{t['num_heads']} heads, {t['num_kv_heads']} KV heads, head size {t['head_dim']}"
                      + (", QK norm" if t["use_qk_norm"] else "")),
        ("context", f"{t['max_position_embeddings']:,} tokens; rope layers see their chunk of "
                    f"{t['attention_chunk_size']:,}, {f'layers {without}' if some else 'none'} everything"),
        ("rope", rope),
        ("experts", f"{t['num_experts']}, {t['experts_per_token']} per token, intermediate {t['intermediate_size']}, "
                    f"layers {layer_ranges(moe, True)}"),
    ]  # fmt: skip
    if not all(moe):
        rows.append(("dense MLPs", f"intermediate {t['intermediate_size_mlp']}, layers {layer_ranges(moe, False)}"))
    if v is None:
        return [*rows, ("vision", "none")]
    tower = f"{v['num_layers']} layers, hidden {v['hidden_size']}, tiles of {v['image_size']} pixels, "
    return [*rows, ("vision", f"{tower}patches of {v['patch_size']}, {_count(counts['vision'])} parameters")]


def _quantization(quantization: dict[str, Any] | None) -> list[tuple[str, str]]:
    if quantization is None:
        return [("quantization", "none")]
    rows = [("quantization", f"{quantization['method']}" + (f", {f}" if (f := quantization.get("format")) else ""))]
    if "problem" in quantization:
        rows.append(("", quantization["problem"]))
    for group in quantization["groups"]:
        linears = f" ({group['linears']:,} Linears)" if "linears" in group else ""
        rows.append(("", group["scheme"] + linears))
    if quantization["ignore"]:
        rows.append(("not quantized", " ".join(str(item).removeprefix("re:") for item in quantization["ignore"])))
    return rows


def _beside(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """Tokenizer and licence."""
    tokenizer, licence = facts["tokenizer"], facts["licence"]
    text = "none"
    if tokenizer is not None:
        size = tokenizer["vocab_size"]
        parts = [tokenizer["kind"] or "tokenizer.json is not here"]
        parts += [f"{size:,} tokens"] if size else []
        parts += [f"{tokenizer['special_tokens']:,} of them special"] if tokenizer["special_tokens"] else []
        named = [f"{key.removesuffix('_token')} {tokenizer[key]}" for key in ("bos_token", "eos_token", "pad_token")
                 if tokenizer[key]]  # fmt: skip
        text = ", ".join([*parts, *named, "chat template" if tokenizer["chat_template"] else "no chat template"])
    said = [licence["id"] or "the model card names none"]
    said += [f"{licence['file']} ({licence['title']})"] if licence["file"] else ["no LICENSE file"]
    said += [f"base model {', '.join(licence['base_model'])}"] if licence["base_model"] else []
    return [("tokenizer", text), ("licence", ", ".join(said))]


def _count(parameters: int) -> str:
    """109000000000 → '109 B'."""
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6)):
        if parameters >= size:
            return f"{parameters / size:.3g} {unit}"
    return f"{parameters:,}"


def _complain(facts: dict[str, Any]) -> None:
    """Everything that is wrong, on stderr."""
    from l4tool.core.console import note

    for finding in facts["findings"]:
        note(f"{finding['severity']}: {finding['message']}")
        if finding["hint"]:
            note(f"  hint: {finding['hint']}")
    if facts["layout"] in ("meta", "gguf"):
        note(f"note: to quantize or run it: l4tool convert {facts['path']} -o OUT --to hf")
