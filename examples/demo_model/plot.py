#!/usr/bin/env python3
"""Draw a training and what came of it: loss, right answers to held-out questions, and which experts answer what.

  python examples/demo_model/plot.py MODEL training.png

Also prints, for each layer, the smallest share of tokens that an expert gets, and how much a token's expert says about
which token it is and about its task: mutual information in bits, of at most log2(experts).
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:  # run by its path, a script sees only its own folder
    sys.path.insert(0, str(ROOT))

import matplotlib  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import torch  # noqa: E402

from batch.tokenizer import Tokenizer  # noqa: E402
from converters.arch_io import read_arch  # noqa: E402
from examples.demo_model.encoding import Encoder, collate  # noqa: E402
from examples.demo_model.network import Network  # noqa: E402
from examples.demo_model.questions import TEXT_TASKS, Draw  # noqa: E402
from examples.demo_model.train import TASKS, read_parameters  # noqa: E402

QUESTIONS = 50


def routing(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of held-out questions that each expert gets, by task float64 [tasks, L, E] and by token [V, L, E]."""
    arch, _ = read_arch(folder)
    network, encoder = Network(arch, read_parameters(folder)), Encoder(Tokenizer.load(folder), arch)
    text = arch.text
    by_task = torch.zeros(len(TASKS), len(text.moe_layers), text.num_experts, dtype=torch.float64)
    by_token = torch.zeros(text.vocab_size, *by_task.shape[1:], dtype=torch.float64)
    layers, one = torch.arange(by_task.shape[1])[:, None], torch.ones((), dtype=torch.float64)
    for number, task in enumerate(TASKS):
        draw = Draw(random.Random(11), held_out=True)
        batch = collate([encoder.encode(task(draw)) for _ in range(QUESTIONS)], arch.text.pad_token_id or 0)
        with torch.no_grad():
            other = network.forward(batch.tokens, batch.real, batch.tiles, batch.wanted)[1]
        by_task[number] = other.counts
        by_token.index_put_((batch.tokens[batch.real], layers, other.chosen), one, accumulate=True)
    return by_task, by_token


def information(counts: torch.Tensor) -> float:
    """Mutual information of the rows and columns of a table of counts, in bits."""
    joint = counts / counts.sum()
    apart = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    return float((joint * (joint / apart).log2()).nan_to_num(0).sum())


def draw_training(entries: list[dict[str, Any]], loss: Any, right: Any) -> None:
    steps = [entry["step"] for entry in entries]
    loss.semilogy(steps[1:], [entry["loss"] for entry in entries[1:]])
    loss.set(xlabel="step", title="loss on answers, nats a token")
    for number, task in enumerate(entries[0]["right"]):
        style = "-" if number < len(TEXT_TASKS) else "--"
        right.plot(steps, [100 * entry["right"][task] for entry in entries], style, label=task.replace("_", "-"))
    right.set(xlabel="step", title="held-out answers right, %")
    right.legend(fontsize=7, ncol=2)


def main() -> None:
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    folder = Path(sys.argv[1])
    counts, by_token = routing(folder)
    layers = counts.shape[1]
    figure = plt.figure(figsize=(4 * layers, 8.5), layout="constrained")
    above, below = figure.subfigures(2, 1)
    entries = [json.loads(line) for line in (folder / "training.jsonl").read_text().splitlines()]
    draw_training(entries, *above.subplots(1, 2))
    names = [task.__name__.replace("_", "-") for task in TASKS]
    for layer, axes in enumerate(below.subplots(1, layers, sharey=True)):
        shares = 100 * counts[:, layer] / counts[:, layer].sum(1, keepdim=True)
        axes.imshow(shares, cmap="Blues", aspect="auto", vmin=0)
        axes.set(xlabel="expert", title=f"layer {layer}: tokens routed, %")
        axes.set_yticks(range(len(names)), names)
        for row, line in enumerate(shares.round().int().tolist()):
            for column, share in enumerate(line):
                axes.text(column, row, str(share), ha="center", va="center", fontsize=6)
        least = float(counts[:, layer].sum(0).min() / counts[:, layer].sum())
        token, task = (information(table[:, layer]) for table in (by_token, counts))
        print(f"layer {layer}: at least {least:.1%} of the tokens for each expert, which says {token:.2f} bits about "
              f"the token and {task:.2f} about the task")  # fmt: skip
    figure.savefig(sys.argv[2], dpi=80)


if __name__ == "__main__":
    main()
