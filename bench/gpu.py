#!/usr/bin/env python3
"""Scout on one GPU: does it fit, and how near does it come to what the card can do?

  python bench/gpu.py --model scout --random                       INT4, as on a card of 80 GB (79.1 GiB usable)
  python bench/gpu.py --model scout --random --scheme fp8 --memory-cap 139
  python bench/gpu.py --model scout --random --layers 4 --no-peer  a quick run
  python bench/gpu.py … --write docs/benchmarks.md                 the figures into the page, between its marks

Weights are random and made on the device, at Scout's real shapes; the engine is the one that `l4tool batch` runs. First
the card is measured: a copy of 2 GiB (read and written) and a product of 8192 × 8192 in bf16. Shares are of the least
time that these allow for the weights touched, the keys and values, and the arithmetic (bench/limits.py). Prompts are of
random tokens, greedy (drawn: temperature 0.6, top-p 0.9), without end tokens; decoding follows 300 of them, 64 where
more than 64 sequences decode. Pictures have five tiles.
Side by side, unless --no-peer: four layers of Scout's widths in bf16, ours and transformers' generate(), 16 prompts of
300 tokens, 64 new ones.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

SCHEMES = ("int4", "fp8", "bf16")
PREFILL = {2048: 8, 8192: 4}  # prompts of each length
DECODE = (1, 16, 64, 256)
DRAWN = (64, 256)  # not greedily
FEW, MANY = [1, 4, 16], [512, 1024]  # tokens of each expert
PEER_LAYERS, PEER_PROMPTS, PEER_LENGTH, PEER_NEW = 4, 16, 300, 64
MAX_BATCH_TOKENS = 8192
BEGIN, END = "<!-- gpu {}: begin -->", "<!-- gpu {}: end -->"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["scout"], default="scout")
    parser.add_argument("--random", action="store_true", required=True, help="random weights, made on the device")
    parser.add_argument("--scheme", choices=SCHEMES, default="int4")
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--memory-cap", type=float, default=79.1, metavar="GIB", help="of device memory, at most")
    parser.add_argument("--no-peer", action="store_true", help="do not run transformers beside ours")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path, help="also write every figure here")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the table between this page's marks")
    return parser.parse_args()


def command_line() -> str:
    """As it was typed, without the page that it writes."""
    words = sys.argv[1:]
    if "--write" in words:
        at = words.index("--write")
        del words[at : at + 2]
    return " ".join(["python bench/gpu.py", *words])


def cap_memory(cap_gib: float, device: Any) -> float:
    """Keep this process below so many GiB of the device; returns what it may really take."""
    import torch

    total_bytes = torch.cuda.mem_get_info(device)[1]
    share = min(cap_gib * 2**30 / total_bytes, 1.0)
    torch.cuda.set_per_process_memory_fraction(share, device)
    return share * total_bytes / 2**30


def measure(arguments: argparse.Namespace, device: Any, folder: Path) -> dict[str, Any]:
    """The card, its products, and the model: all figures of one scheme."""
    import torch
    import triton
    from gpu_measure import draw_seconds, measure_card, measure_products, quantize_rate

    from batch.kernels import cuda, triton_experts
    from l4tool.core.console import note
    from l4tool.core.errors import DeviceError

    figures: dict[str, Any] = {
        "card": torch.cuda.get_device_name(device), "torch": torch.__version__, "triton": triton.__version__,
        "date": datetime.date.today().isoformat(), "command": command_line(),
        "cap_gib": cap_memory(arguments.memory_cap, device), "layers": arguments.layers, "scheme": arguments.scheme,
    }  # fmt: skip
    machine = measure_card(device)
    figures |= {"copy_bytes_s": machine.read_bytes_s, "matmul_flops": machine.bf16_flops}
    note("products of one layer's experts")
    products = measure_products(
        arguments.scheme, FEW + MANY, machine, device,
        lambda x, logits, experts: triton_experts.routed_experts(x, logits, *cuda.moe_banks(experts)),
    )  # fmt: skip
    figures["products"] = [asdict(product) for product in products]
    note("quantizing")
    figures["quantize_bytes_s"] = quantize_rate(device)
    figures["draw_s"] = {count: draw_seconds(count, device) for count in DECODE}
    torch.cuda.empty_cache()
    note(f"{arguments.layers} layers in {arguments.scheme}")
    try:
        figures |= measure_model(arguments, device, folder, machine, figures["cap_gib"])
    except DeviceError as error:
        figures["failure"] = str(error).splitlines()[0]
    return figures


def measure_model(
    arguments: argparse.Namespace, device: Any, folder: Path, machine: Any, cap_gib: float
) -> dict[str, Any]:
    """Memory and speed of the whole engine. Raises DeviceError where it does not fit."""
    import torch
    from gpu_measure import decode_rate, engine_of, images_per_second, prefill_rate
    from gpu_random import RandomReader, scout_config
    from limits import model_costs

    from batch.backends.embedded import EmbeddedOptions, engine_config
    from batch.model.model import load_model
    from quant import outlook
    from quant.fitting import Demand, Hardware
    from quant.gpus import Gpu
    from quant.memory import kv_tokens

    reader = RandomReader(scout_config(arguments.layers), arguments.scheme, device, folder)
    card = Gpu("this", int(cap_gib * 2**30), "")
    foretold = outlook.stored(reader, outlook.Question(Hardware(card, 1), Demand(8192), 0)).fitting
    model, costs = load_model(reader, device, "bfloat16"), model_costs(reader)
    default_kv_bytes = engine_config(model, EmbeddedOptions(device=str(device))).kv_bytes
    options = EmbeddedOptions(device=str(device), max_batch_tokens=MAX_BATCH_TOKENS, prefix_cache=False)
    config = engine_config(model, options)
    engine = engine_of(model, config)
    figures: dict[str, Any] = {
        "weight_bytes": model.weights_nbytes, "kv_bytes": config.kv_bytes, "default_kv_bytes": default_kv_bytes,
        "plan_kv_bytes": foretold.kv_bytes,
        "kv_tokens": kv_tokens(reader.arch.text, config.kv_bytes, model.dtype.itemsize, config.block_size),
        "prefill": {n: rate_of(lambda: prefill_rate(engine, n, count, costs, machine)) for n, count in PREFILL.items()},  # noqa: B023
        "decode": {n: rate_of(lambda: decode_rate(engine, n, costs, machine)) for n in DECODE},  # noqa: B023
        "drawn": {n: rate_of(lambda: decode_rate(engine, n, costs, machine, drawn=True)) for n in DRAWN},  # noqa: B023
        "images_s": images_per_second(engine),
    }  # fmt: skip
    figures["peak_bytes"] = torch.cuda.max_memory_reserved(device)
    engine.close()
    return figures


def rate_of(measured: Callable[[], Any]) -> dict[str, Any]:
    """A Rate's fields, or why there is none."""
    from gpu_measure import Unmeasured

    try:
        return asdict(measured())
    except Unmeasured as error:
        return {"failure": str(error)}


def measure_peer(device: Any, folder: Path) -> dict[str, float]:
    """New tokens per second of ours and of transformers, a whole job each, the second of two runs."""
    import torch
    from gpu_measure import engine_of, random_prompts, run_all, synchronize
    from gpu_random import RandomReader, scout_config
    from transformers import AutoConfig, Llama4ForCausalLM

    from batch.engine.engine import EngineConfig
    from batch.model.model import load_model

    reader = RandomReader(scout_config(PEER_LAYERS), "bf16", device, folder)
    prompts = random_prompts(PEER_PROMPTS, PEER_LENGTH, reader.arch.text.vocab_size)
    config = EngineConfig(8192, PEER_PROMPTS, 4 << 30, 32, prefix_cache=False, overlap=True)
    engine = engine_of(load_model(reader, device, "bfloat16"), config)
    rates = {}
    for _ in range(2):
        synchronize(device)
        began = time.perf_counter()
        run_all(engine, prompts, PEER_NEW)
        rates["ours"] = PEER_PROMPTS * PEER_NEW / (time.perf_counter() - began)
    engine.close()
    del engine
    torch.cuda.empty_cache()
    with torch.device(device):
        theirs = Llama4ForCausalLM(AutoConfig.from_pretrained(folder).text_config).to(torch.bfloat16).eval()
    ids = torch.tensor(prompts, device=device)
    for _ in range(2):
        synchronize(device)
        began = time.perf_counter()
        theirs.generate(ids, do_sample=False, max_new_tokens=PEER_NEW, min_new_tokens=PEER_NEW, pad_token_id=0)
        synchronize(device)
        rates["transformers"] = PEER_PROMPTS * PEER_NEW / (time.perf_counter() - began)
    return rates


def markdown(figures: dict[str, Any]) -> str:
    """The figures as docs/benchmarks.md shows them."""
    lines = [
        f"{figures['card']}, torch {figures['torch']}, Triton {figures['triton']}, {figures['date']}, at most "
        f"{figures['cap_gib']:.1f} GiB: `{figures['command']}`. Copy {figures['copy_bytes_s'] / 1e12:.2f} TB/s, bf16 "
        f"product {figures['matmul_flops'] / 1e12:.0f} TFLOP/s.",
        "",
        "| | measured | of the limit |",
        "|---|---|---|",
    ]
    rows = [*model_rows(figures), *product_rows(figures["products"])]
    rows.append(("quantizing to INT4, from host memory", f"{figures['quantize_bytes_s'] / 1e9:.1f} GB/s of bf16", ""))
    rows += [
        (f"drawing {count} tokens", f"{seconds * 1e6:,.0f} µs", "") for count, seconds in figures["draw_s"].items()
    ]
    if "peer" in figures:
        ours, theirs = figures["peer"]["ours"], figures["peer"]["transformers"]
        what = f"{PEER_LAYERS} layers in bf16, {PEER_PROMPTS} prompts"
        rows.append((what, f"{ours:,.0f} tokens/s, transformers {theirs:,.0f}", f"{ours / theirs:.1f} times"))
    elif "peer_failure" in figures:
        rows.append(("transformers beside ours", f"did not run: {figures['peer_failure']}", ""))
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def model_rows(figures: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Of the whole engine."""
    layers = f"weights, {figures['layers']} layers"
    if "failure" in figures:
        return [(layers, f"do not fit: {figures['failure']}", "")]
    kv, default, plan = (figures[name] / 2**30 for name in ("kv_bytes", "default_kv_bytes", "plan_kv_bytes"))
    rows = [
        (layers, f"{figures['weight_bytes'] / 1e9:.1f} GB", ""),
        (f"KV cache, steps of {MAX_BATCH_TOKENS} tokens", f"{kv:.1f} GiB, {figures['kv_tokens']:,} tokens", ""),
        ("KV cache, default steps", f"{default:.1f} GiB, {plan:.1f} by `plan`", f"{default / plan - 1:+.1%}"),
        ("memory reserved, at most", f"{figures['peak_bytes'] / 2**30:.1f} GiB", ""),
    ]
    named = [(f"prompts of {length} tokens", rate) for length, rate in figures["prefill"].items()]
    named += [(f"decoding, {count} at a time", rate) for count, rate in figures["decode"].items()]
    named += [(f"decoding, {count} at a time, drawn", rate) for count, rate in figures["drawn"].items()]
    for name, rate in named:
        if "failure" in rate:
            rows.append((name, f"not measured: {rate['failure']}", ""))
        else:
            rows.append((name, f"{rate['per_second']:,.0f} tokens/s", f"{rate['of_limit']:.0%}"))
    return [*rows, ("pictures of five tiles", f"{figures['images_s']:.1f} a second", "")]


def product_rows(products: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """Of one layer's experts: few tokens are held against the copy's rate, many against the product's."""
    rows = []
    for product in products:
        few = product["tokens"] in FEW
        share = f"{product['of_bandwidth']:.0%} of the copy" if few else f"{product['of_flops']:.0%} of the product"
        rows.append((f"experts, {product['tokens']} tokens each", f"{product['seconds'] * 1e6:,.0f} µs", share))
    return rows


def write_into(page: Path, scheme: str, text: str) -> None:
    """Replace what stands between a scheme's marks. Raises SystemExit where the page has none."""
    content = page.read_text()
    begin, end = BEGIN.format(scheme), END.format(scheme)
    before, found_begin, rest = content.partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found_begin and found_end):
        raise SystemExit(f"{page} has no lines {begin} and {end}")
    page.write_text(f"{before}{begin}\n{text}\n{end}{after}")


def main() -> None:
    arguments = parse_arguments()
    import torch
    from gpu_device import require_cuda

    device = require_cuda(arguments.device)
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(arguments, device, Path(folder))
        torch.cuda.empty_cache()
        put_down(arguments, figures)  # before the peer, which may take the process with it
        if not arguments.no_peer:
            try:
                figures["peer"] = measure_peer(device, Path(folder))
            except Exception as error:
                figures["peer_failure"] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            put_down(arguments, figures)
    print(markdown(figures))


def put_down(arguments: argparse.Namespace, figures: dict[str, Any]) -> None:
    """The figures where they are wanted."""
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    if arguments.write:
        write_into(arguments.write, arguments.scheme, markdown(figures))


if __name__ == "__main__":
    main()
