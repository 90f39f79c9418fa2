#!/usr/bin/env python3
"""What quantizing costs in right answers: the demo model in every scheme, on held-out questions, against bfloat16.

  python bench/accuracy.py                          the shipped demo model
  python bench/accuracy.py --model DIR --data FILE.jsonl --json figures.json

Each scheme is `l4tool quantize`, then `l4tool eval --against` the source: the tool as a user runs it. `±` is the
standard error of the share of right answers. KL(bfloat16 ‖ quantized) is over the answers' tokens, in nats a token.
HQQ's float zero points fit only optimum-quanto's format, which no engine here runs: its values are put back as bfloat16
(no size, and rounded once more than they would be).
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from converters.reader import TensorInfo  # noqa: E402
from converters.writing.encoder import Scratch  # noqa: E402
from l4tool.core.console import table  # noqa: E402
from quant.quanto import GROUP_SIZE, QuantoInt4, unpack  # noqa: E402

SCHEMES: dict[str, list[str]] = {
    "FP8": ["--fp8"],
    "INT4 absmax": ["--int4", "--scale", "absmax"],
    "INT4 MSE": ["--int4"],
    "INT4 HQQ": [],
    "mixed": ["--mixed"],
    "mixed, FP8 attention": ["--mixed", "--attention", "fp8"],
}


def l4tool(*arguments: str | Path) -> None:
    subprocess.run([sys.executable, "-m", "l4tool.main", *map(str, arguments), "--quiet"], check=True,
                   stdout=subprocess.DEVNULL)  # fmt: skip


def evaluate(model: Path, source: Path, data: Path, folder: Path) -> dict[str, Any]:
    """The figures of `l4tool eval`."""
    out = folder / "figures.json"
    l4tool("eval", model, "--data", data, "--against", source, "--json", out)
    return json.loads(out.read_text())


def hqq_values(weight: torch.Tensor) -> torch.Tensor:
    """Matrices [..., out, in] as optimum-quanto's HQQ stores them, groups of 128 in features, in the same dtype."""
    rows = weight.reshape(-1, 2 * GROUP_SIZE)  # its groups do not fit rows of just one
    info = TensorInfo("weight", tuple(rows.shape), rows.dtype, rows.nbytes, "memory")
    parts = {name: part for name, part, _ in QuantoInt4("hqq").encode(rows, info, "weight", 0, Scratch()).pieces}
    codes = unpack(parts["weight._data._data"], 4)[: len(parts["weight._scale"])]
    return (codes * parts["weight._scale"] - parts["weight._shift"]).to(weight.dtype).view(weight.shape)


def write_hqq(source: Path, out: Path) -> None:
    """A copy in bfloat16 whose experts, routed and shared, hold HQQ's values."""
    shutil.copytree(source, out, dirs_exist_ok=True)
    for path in out.glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if ".experts." in name:  # [E, in, out]
                tensors[name] = hqq_values(tensor.mT.contiguous()).mT.contiguous()
            elif ".shared_expert." in name:
                tensors[name] = hqq_values(tensor)
        save_file(tensors, path, metadata={"format": "pt"})


def size(folder: Path) -> int:
    """Bytes of weights."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "examples" / "demo_model" / "notllama-3m")
    parser.add_argument("--data", type=Path, nargs="+", help="lines with answers; else held-out questions")
    parser.add_argument("--per-task", type=int, default=500, help="held-out questions of each task")
    parser.add_argument("--growth", default="1", help="of held-out questions: 2 are up to twice as long as in training")
    parser.add_argument("--json", type=Path, help="also write every figure here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        data = arguments.data
        if not data:
            maker = ROOT / "examples" / "demo_model" / "held_out.py"
            options = ["--per-task", str(arguments.per_task), "--growth", arguments.growth]
            subprocess.run([sys.executable, maker, work, *options], check=True)
            data = [work / "text.jsonl", work / "pictures.jsonl"]
        rows, figures = [], {}
        for scheme, options in {"bfloat16": [], **SCHEMES}.items():
            model = arguments.model
            if options:
                model = work / "quantized"
                l4tool("quantize", arguments.model, "-o", model, *options, "--force")
            elif "HQQ" in scheme:
                model = work / "hqq"
                write_hqq(arguments.model, model)
            row = [scheme, "-" if "HQQ" in scheme else f"{size(model) / 1e6:.2f}"]
            for path in data:
                found = evaluate(model, arguments.model, path, work)
                figures[f"{scheme}, {path.stem}"] = found
                every = found["all"]
                share, number = every["exact_match"], every["answers"]
                error = math.sqrt(share * (1 - share) / number)
                row += [f"{share:.2%} ± {error:.2%}", f"{every['perplexity']:.4f}", f"{every['kl_mean']:.6f}"]
            rows.append(row)
            print(*row, flush=True)
    heads = [f"{path.stem}: {what}" for path in data for what in ("right", "perplexity", "KL")]
    print(table(rows, ["scheme", "MB", *heads]))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
