#!/usr/bin/env bash
# The main job, end to end: make a small random checkpoint in the real layout, quantize it, run a batch, show the answers.
# Needs l4tool on PATH (`make demo` takes care of that). Everything is written to demo-out/.
set -euo pipefail
cd "$(dirname "$0")/.."
out=demo-out
rm -rf "$out"

step() { printf '\n\033[1m$ %s\033[0m\n' "$*"; "$@"; }

step python examples/make_checkpoint.py "$out/random-scout"
step l4tool quantize "$out/random-scout" --int4 -o "$out/random-scout-int4"
step l4tool batch examples/requests.jsonl "$out/answers.jsonl" --model "$out/random-scout-int4" --max-tokens 24
printf '\nThe model has random weights, so its answers are gibberish. %s:\n' "$out/answers.jsonl"
cut -c1-240 "$out/answers.jsonl"
