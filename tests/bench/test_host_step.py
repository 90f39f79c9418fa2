"""bench/host_step.py runs the engine without a model, and puts back what it replaced."""

import sys
from pathlib import Path

from batch.engine import sampler

BENCH = Path(__file__).resolve().parents[2] / "bench"
sys.path.insert(0, str(BENCH))
import host_step  # noqa: E402

sys.path.remove(str(BENCH))


def test_steps_are_measured(scout_tiny):
    before = sampler._draw_rows
    seconds = host_step.step_seconds(scout_tiny, 3, 10, 12, with_stop=True)
    assert 5 < len(seconds) < 12 and all(0 < each < 1 for each in seconds) and sampler._draw_rows is before
