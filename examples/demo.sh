#!/usr/bin/env bash
# The main job, end to end, with the demo model, a small Llama 4 that answers simple questions: serve it from a local hub;
# then fetch it, quantize it, ask it about texts and pictures, show its answers, and measure what quantizing cost.
# Needs l4tool on PATH (`make demo` takes care of that). Everything is written to demo-out/.
set -euo pipefail
cd "$(dirname "$0")/.."
out=demo-out
rm -rf "$out"
mkdir "$out"

step() { printf '\n\033[1m$ %s\033[0m\n' "$*"; "$@"; }

# The hub server of the tests stands in for huggingface.co; nothing leaves this machine.
serve() {
  python -m tests.hub.server --repo "$1=$2" --port-file "$out/hub-url" >/dev/null &
  trap "kill $! 2>/dev/null || true" EXIT
  until [ -s "$out/hub-url" ]; do
    kill -0 $! || exit 1
    sleep 0.1
  done
  export HF_ENDPOINT=$(cat "$out/hub-url")
}

serve demo/NotLlama-3M examples/demo_model/notllama-3m
step l4tool fetch demo/NotLlama-3M -o "$out/notllama"
step l4tool quantize "$out/notllama" --int4 -o "$out/notllama-int4"
step l4tool batch examples/requests.jsonl "$out/answers.jsonl" --model "$out/notllama-int4" --max-tokens 64
step python examples/show_answers.py examples/requests.jsonl "$out/answers.jsonl"
python examples/demo_model/held_out.py "$out/held-out" --per-task 20
step l4tool eval "$out/notllama-int4" --data "$out/held-out/text.jsonl" --against "$out/notllama"
step l4tool eval "$out/notllama-int4" --data "$out/held-out/pictures.jsonl" --against "$out/notllama"
