"""The job's shape on llama.cpp: llama-batched-bench with the same number of prompts, all of the mean length.

llama.cpp has no offline runner for a list of prompts of mixed lengths; equal prompts are a little easier.
"""

from __future__ import annotations

import json
import subprocess

from measure import Timed, peak_rss_bytes, read_job, write_result


def main() -> None:
    job = read_job()
    count, new_tokens = len(job["prompts"]), job["new_tokens"]
    mean = round(sum(map(len, job["prompts"])) / count)
    command = [
        job["program"], "-m", job["gguf"], "-c", str(count * (mean + new_tokens)), "-b", "2048", "-ub", "512",
        "-t", str(job["threads"]), "-npp", str(mean), "-ntg", str(new_tokens), "-npl", str(count),
        "--output-format", "jsonl",
    ]  # fmt: skip
    with Timed() as timed:
        out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    figures = json.loads(next(line for line in reversed(out.splitlines()) if line.startswith("{")))
    write_result({
        "seconds": figures["t"], "cpu_s": timed.cpu_s, "peak_rss_bytes": peak_rss_bytes(),
        "prompt_tokens_s": figures["speed_pp"], "decode_tokens_s": figures["speed_tg"],
    })  # fmt: skip


if __name__ == "__main__":
    main()
