"""transformers' script that converts Meta's files, up to the saved checkpoint.

job["script"]: its `convert_llama4_weights_to_hf.py`; job["source"], job["out"]. Changed before it runs: the size of the
vocabulary, a constant in it, comes from params.json; what it does after saving (loading the result again and
generating with it) is left out.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


class Saved(Exception):
    """The checkpoint is written."""


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    text = Path(job["script"]).read_text()
    assert "vocab_size = 202048" in text
    text = text.replace("vocab_size = 202048", 'vocab_size = params["vocab_size"]')
    text = text.replace("rope_theta=rope_theta,", "")  # this version's config takes it inside rope_parameters only
    space: dict[str, object] = {"__name__": "script"}
    exec(compile(text, job["script"], "exec"), space)
    model = space["Llama4ForConditionalGeneration"]

    def loaded_again(*args: object, **kwargs: object) -> None:
        raise Saved

    model.from_pretrained = loaded_again  # type: ignore[attr-defined]
    try:
        space["write_model"](job["out"], job["source"], 8, True, instruct=True)  # type: ignore[operator]
    except Saved:
        return
    raise SystemExit("the script ended without loading what it wrote")


if __name__ == "__main__":
    main()
