#!/usr/bin/env bash
# The main job, end to end: make a small random checkpoint in the real layout and serve it from a local hub; then fetch
# it, quantize it, run a batch, show the answers.
# Needs l4tool on PATH (`make demo` takes care of that). Everything is written to demo-out/.
set -euo pipefail
cd "$(dirname "$0")/.."
out=demo-out
rm -rf "$out"

step() { printf '\n\033[1m$ %s\033[0m\n' "$*"; "$@"; }

# The hub server of the tests stands in for huggingface.co: the model is made up, and nothing leaves this machine.
serve() {
  python -m tests.hub.server --repo "$1=$2" --port-file "$out/hub-url" >/dev/null &
  trap "kill $! 2>/dev/null || true" EXIT
  until [ -s "$out/hub-url" ]; do
    kill -0 $! || exit 1
    sleep 0.1
  done
  export HF_ENDPOINT=$(cat "$out/hub-url")
}

step python examples/make_checkpoint.py "$out/hub/random-scout"
serve demo/Random-Scout "$out/hub/random-scout"
step l4tool fetch demo/Random-Scout -o "$out/random-scout"
step l4tool quantize "$out/random-scout" --int4 -o "$out/random-scout-int4"
step l4tool batch examples/requests.jsonl "$out/answers.jsonl" --model "$out/random-scout-int4" --max-tokens 24
printf '\nThe model has random weights, so its answers are gibberish. %s:\n' "$out/answers.jsonl"
cut -c1-240 "$out/answers.jsonl"
