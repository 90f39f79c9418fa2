"""The comparison that bench/batch_cpu.py prints: whose seconds, against which peers."""

import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture(scope="module")
def tables():
    sys.path.insert(0, str(BENCH))
    import batch_tables

    yield batch_tables
    sys.path.remove(str(BENCH))


def runs_of(**seconds):
    """engine=[seconds of each round] → runs as batch_cpu.py collects them."""
    return [
        {"engine": engine.replace("_", "-"), "load_s": 1.0, "scenarios": {"B64": {"seconds": value}}}
        for engine, rounds in seconds.items()
        for value in rounds
    ]


def test_the_best_round_counts_and_the_worst_is_shown(tables):
    best = tables.best_rounds("B64", runs_of(ours_bf16=[9.0, 8.0, 10.0], vllm=[20.0]))
    assert (best["ours-bf16"]["seconds"], best["ours-bf16"]["worst_s"]) == (8.0, 10.0)


def test_bf16_is_compared_with_bf16_peers_and_int4_with_all(tables):
    runs = runs_of(ours_bf16=[12.0], ours_int4=[12.0], vllm=[20.0], llamacpp_bf16=[30.0], llamacpp_q4_0=[16.0])
    runs[-1]["engine"] = "llamacpp-q4_0"
    best = tables.best_rounds("B64", runs)
    assert tables.compared("ours-bf16", "B64", best) == (12 / 20, 0.7)
    assert tables.compared("ours-int4", "B64", best) == (12 / 16, 0.6)
    assert tables.compared("vllm", "B64", best) is None


def test_without_peers_nothing_is_compared(tables):
    assert tables.compared("ours-bf16", "B64", tables.best_rounds("B64", runs_of(ours_bf16=[1.0]))) is None
