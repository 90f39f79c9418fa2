#!/usr/bin/env python3
"""Draw a training's log: loss, right answers to held-out questions, and how the tokens are spread over the experts.

python examples/demo_model/plot.py examples/demo_model/notllama-3m/training.jsonl docs/demo-model.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main() -> None:
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    entries = [json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]
    steps = [entry["step"] for entry in entries]
    figure, (loss, right, experts) = plt.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    loss.semilogy(steps[1:], [entry["loss"] for entry in entries[1:]])
    loss.set(xlabel="step", title="loss on answers, nats a token")
    for number, task in enumerate(entries[0]["right"]):
        style = "-" if number < 7 else "--"
        right.plot(steps, [100 * entry["right"][task] for entry in entries], style, label=task.replace("_", "-"))
    right.set(xlabel="step", title="held-out answers right, %")
    right.legend(fontsize=7, ncol=2)
    shares = [[100 * share for share in layer] for layer in entries[-1]["routing"]]
    drawn = experts.imshow(shares, cmap="Blues", vmin=0, aspect="auto")
    for layer, row in enumerate(shares):
        for expert, share in enumerate(row):
            experts.text(expert, layer, f"{share:.0f}", ha="center", va="center", fontsize=8)
    experts.set(xlabel="expert", ylabel="layer", title="tokens routed at the end, %", yticks=range(len(shares)))
    figure.colorbar(drawn)
    figure.savefig(sys.argv[2], dpi=90)


if __name__ == "__main__":
    main()
