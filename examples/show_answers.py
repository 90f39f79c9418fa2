#!/usr/bin/env python3
"""Print questions, pictures and answers of a batch side by side, and whether they are right.

python examples/show_answers.py examples/requests.jsonl answers.jsonl
"""

from __future__ import annotations

import json
import re
import sys
import textwrap
from pathlib import Path
from typing import Any


def lines(path: str) -> dict[str, dict[str, Any]]:
    """The lines of a file by their id."""
    found = (json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip())
    return {str(line.get("custom_id") or line.get("id")): line for line in found}


def question(line: dict[str, Any]) -> tuple[str, list[str]]:
    """All that is said to the model, and the names of its pictures."""
    body = line.get("body", line)
    said, pictures = [], list(body.get("images") or [])
    if body.get("prompt"):
        said.append(" ".join(re.sub(r"<\|header_start\|>\w+<\|header_end\|>|<\|\w+\|>", " ", body["prompt"]).split()))
    for message in body.get("messages") or []:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        text = " ".join(part["text"] for part in parts if part["type"] == "text")
        pictures += [picture for part in parts if (picture := _picture(part))]
        said.append(text if message["role"] == "user" else f"[{message['role']}: {text}]")
    return " ".join(said), pictures


def _picture(part: dict[str, Any]) -> str | None:
    name = part.get("image") or part.get("image_url", {}).get("url")
    return "(in the line itself)" if name and name.startswith("data:") else name


def answers(line: dict[str, Any]) -> list[str]:
    """The texts of an output line, or its error."""
    response = line.get("response")
    if response and response.get("body", {}).get("choices"):
        line = response["body"]
    if line.get("choices"):
        return [choice["message"]["content"] if "message" in choice else choice["text"] for choice in line["choices"]]
    return [line["text"]] if isinstance(line.get("text"), str) else [f"error: {json.dumps(line.get('error'))}"]


def main() -> None:
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    try:
        asked, given = lines(sys.argv[1]), lines(sys.argv[2])
    except (OSError, ValueError) as error:
        raise SystemExit(f"show_answers.py: {error}") from None
    right = total = 0
    for name, line in asked.items():
        text, pictures = question(line)
        print(textwrap.fill(text, 100, subsequent_indent="  "))
        for picture in pictures:
            print(f"  picture {picture}")
        for answer in answers(given.get(name, {})):
            is_right = answer.strip() == line["answer"]
            right, total = right + is_right, total + 1
            print(f"  → {answer.strip()}    {'right' if is_right else 'wrong: ' + line['answer']}")
    print(f"{right} of {total} answers are right.")


if __name__ == "__main__":
    main()
