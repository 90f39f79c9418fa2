#!/usr/bin/env python3
"""Write held-out questions as lines for `l4tool batch` and `l4tool eval`, with pictures and right answers.

  python examples/demo_model/held_out.py OUT --per-task 200      OUT/text.jsonl, OUT/pictures.jsonl, OUT/images/
  python examples/demo_model/held_out.py OUT --growth 2          about up to twice as many things as in training

No question is one that the demo model was trained on. The same seed gives the same files.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:  # run by its path, a script sees only its own folder
    sys.path.insert(0, str(ROOT))

from examples.demo_model.pictures import PICTURE_TASKS  # noqa: E402
from examples.demo_model.questions import TEXT_TASKS, Conversation, Draw, Task  # noqa: E402


def line_of(made: Conversation, name: str, folder: Path) -> dict[str, Any]:
    """The line that asks a conversation's last question; its pictures are written to `folder`/images."""
    images = []
    for number, picture in enumerate(made.pictures):
        images.append(f"images/{name}{f'-{number}' if number else ''}.png")
        (folder / "images").mkdir(exist_ok=True)
        picture.save(folder / images[-1], optimize=True)
    messages: list[dict[str, Any]] = []
    if made.system is not None:
        messages.append({"role": "system", "content": made.system})
    for number, (question, answer) in enumerate(made.turns):
        content: Any = question
        if number == 0 and images:
            content = [*({"type": "image", "image": path} for path in images), {"type": "text", "text": question}]
        messages.append({"role": "user", "content": content})
        messages.append({"role": "assistant", "content": answer})
    return {"id": name, "task": made.task, "messages": messages[:-1], "answer": made.turns[-1][1]}


def write_lines(path: Path, tasks: Sequence[Task], per_task: int, seed: int, growth: float = 1.0) -> None:
    """`per_task` lines of each task; each task has a random generator of its own."""
    with path.open("w") as file:
        for task in tasks:
            draw = Draw(random.Random(f"{seed} {task.__name__}"), held_out=True, growth=growth)
            for number in range(per_task):
                made = task(draw)
                file.write(json.dumps(line_of(made, f"{made.task}-{number}", path.parent)) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--per-task", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--growth", type=float, default=1.0, help="0 … 2; how long questions may be, 1: as in training")
    arguments = parser.parse_args()
    if not 0 <= arguments.growth <= 2:
        parser.error("--growth is 0 to 2: there are not enough names for more")
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, tasks in (("text", TEXT_TASKS), ("pictures", PICTURE_TASKS)):
        path = arguments.out / f"{name}.jsonl"
        write_lines(path, tasks, arguments.per_task, arguments.seed, arguments.growth)


if __name__ == "__main__":
    main()
