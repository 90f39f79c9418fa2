"""The tables of bench/batch_cpu.py: one per scenario, each engine beside the best peer, the target and the limit."""

from __future__ import annotations

from typing import Any

from limits import Costs, Limit, job_limit
from machine import Machine

from l4tool.core.console import table
from l4tool.core.sizes import format_bytes

# Our time over that of the best peer: bf16 against peers in bf16, INT4 against all of them.
TARGETS = {
    "bf16": {"B1": 0.95, "B16": 0.75, "B64": 0.7, "mixed": 0.7},
    "int4": {"B1": 0.9, "B16": 0.7, "B64": 0.6, "mixed": 0.6},
}
BF16_PEERS = ("vllm", "llamacpp-bf16", "transformers")
HEADER = [
    "", "seconds", "prompt tok/s", "decode tok/s", "CPU s", "others' CPU", "peak RSS", "load s", "× best peer",
    "target", "limit s", "share of limit",
]  # fmt: skip


def print_scenario(
    scenario: dict[str, Any], runs: list[dict[str, Any]], costs: dict[str, Costs], machine: Machine
) -> None:
    """Every engine's best round. Limits are of the engine's own weights: bf16, or INT4 with bf16 or int8 arithmetic."""
    lengths, new_tokens = [len(prompt) for prompt in scenario["prompts"]], scenario["new_tokens"]
    limits = {
        f"{kind}/{math}": job_limit(costs[kind], machine, lengths, new_tokens, math)
        for kind, math in (("bf16", "bf16"), ("int4", "bf16"), ("int4", "int8"))
        if kind in costs
    }
    best = best_rounds(scenario["name"], runs)
    spread = f"{min(lengths)}–{max(lengths)}" if min(lengths) < max(lengths) else str(lengths[0])
    total = f"{sum(lengths):,} in all, {new_tokens} new each"
    print(f"\n{scenario['name']}: {len(lengths)} prompts of {spread} tokens, {total}")
    print(table([_row(engine, scenario["name"], best, limits, lengths, new_tokens) for engine in best], HEADER))
    for name, limit in limits.items():
        print(f"limit {name.replace('/', ' weights, ')} arithmetic: {_limit_text(limit, lengths, new_tokens)}")
    for engine, figures in best.items():
        if "decode_step" in figures and figures["decode_step"]["sequences"]:
            print(f"{engine}: {_overhead(figures['decode_step'])}")


def best_rounds(name: str, runs: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """engine → the figures of its fastest round, with the slowest round's seconds as `worst_s`."""
    found: dict[str, dict[str, Any]] = {}
    for engine in dict.fromkeys(run["engine"] for run in runs):
        rounds = [run["scenarios"][name] | {"load_s": run["load_s"]} for run in runs if run["engine"] == engine]
        worst = max(figures["seconds"] for figures in rounds)
        found[engine] = min(rounds, key=lambda figures: figures["seconds"]) | {"worst_s": worst}
    return found


def compared(engine: str, name: str, best: dict[str, dict[str, Any]]) -> tuple[float, float] | None:
    """(our seconds / the best peer's, the target) of one of our engines; None without a peer to compare with."""
    if not engine.startswith("ours"):
        return None
    kind = "bf16" if engine == "ours-bf16" else "int4"
    peers = [peer for peer in best if not peer.startswith("ours") and (kind == "int4" or peer in BF16_PEERS)]
    if not peers:
        return None
    fastest = min(best[peer]["seconds"] for peer in peers)
    return best[engine]["seconds"] / fastest, TARGETS[kind][name]


def limit_of(engine: str, limits: dict[str, Limit]) -> Limit | None:
    """An engine's own limit. llama.cpp's Q4_0 multiplies in int8; for Q8_0 none is computed."""
    if engine in ("ours-int8", "llamacpp-q4_0"):
        return limits.get("int4/int8")
    if engine == "llamacpp-q8_0":
        return None
    return limits.get("int4/bf16" if engine == "ours-int4" else "bf16/bf16")


def _row(
    engine: str,
    name: str,
    best: dict[str, dict[str, Any]],
    limits: dict[str, Limit],
    lengths: list[int],
    new_tokens: int,
) -> list[str]:
    figures, limit, ratio = best[engine], limit_of(engine, limits), compared(engine, name, best)
    seconds = f"{figures['seconds']:.2f}"
    if figures["worst_s"] > figures["seconds"]:
        seconds += f" (–{figures['worst_s']:.2f})"
    row = [
        engine, seconds, f"{figures['prompt_tokens_s']:.0f}", f"{figures['decode_tokens_s']:.0f}",
        f"{figures['cpu_s']:.1f}", f"{figures['others_cpu_s'] / figures['seconds']:.0%}",
        format_bytes(figures["peak_rss_bytes"]), f"{figures['load_s']:.1f}",
    ]  # fmt: skip
    row += [f"{ratio[0]:.2f}", f"≤ {ratio[1]:.2f} {'✓' if ratio[0] <= ratio[1] else '✗'}"] if ratio else ["", ""]
    if limit is None:
        return [*row, "", ""]
    prompt = figures["prompt_tokens_s"] * limit.prompt_s / sum(lengths)
    decode = figures["decode_tokens_s"] * limit.decode_s / (len(lengths) * (new_tokens - 1))
    shares = f"{limit.seconds / figures['seconds']:.0%} (prompt {prompt:.0%}, decode {decode:.0%})"
    return [*row, f"{limit.seconds:.2f}", shares]


def _limit_text(limit: Limit, lengths: list[int], new_tokens: int) -> str:
    prompt, decode = sum(lengths) / limit.prompt_s, len(lengths) * (new_tokens - 1) / limit.decode_s
    return f"{limit.seconds:.2f} s (prompt {prompt:.0f} tok/s, decode {decode:.0f} tok/s)"


def _overhead(step: dict[str, float]) -> str:
    spent = step["schedule_ms"] + step["build_ms"] + step["sample_ms"]
    return (
        f"a decode step of {step['sequences']} sequences takes {step['step_ms']:.1f} ms, of it schedule "
        f"{step['schedule_ms']:.3f}, inputs {step['build_ms']:.3f}, sampling {step['sample_ms']:.3f} ms "
        f"= {100 * spent / step['step_ms']:.2f} % outside the model"
    )
