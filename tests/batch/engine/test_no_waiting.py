"""What the engine launches on a device makes no one wait and keeps host and device apart; see strict_device.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[3]


def run(folder, case):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "tests.batch.engine.strict_runs", str(folder), case]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", ["drawn", "rules", "slices", "graphs", "pictures"])
def test_launching_does_not_wait_and_tokens_are_those_of_the_cpu(case, scout_tiny):
    found = run(scout_tiny, case)
    assert found["ours"] == found["expected"] and all(len(output) == 4 for output, _ in found["ours"])
    # Rules need to know the tokens before.
    assert (found["launched_ahead"] > 0) == (case != "rules") and (found["replayed"] > 0) == (case == "graphs")


def test_scores_are_those_of_the_cpu(scout_tiny):
    found = run(scout_tiny, "scores")
    for (ours_error, ours), (error, expected) in zip(found["ours"], found["expected"], strict=True):
        assert ours_error is error is None and ours == [pytest.approx(nll, rel=1e-5) for nll in expected]


def test_waiting_is_noticed():
    """The device itself: what it lets through and what it refuses."""
    done = subprocess.run([sys.executable, "-c", WAITS], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["Waits"] * 8 + ["Mixed"] * 2


WAITS = """
import torch
from tests.strict_device import DEVICE, StrictMode

with StrictMode() as mode, torch.inference_mode():
    x, host = torch.ones(3, 4, device=DEVICE), torch.ones(3)
    there, locked = host.to(DEVICE), torch.empty(3, pin_memory=True)
    with mode.no_waiting():
        locked.copy_(there, non_blocking=True)
        there.copy_(locked, non_blocking=True)
        x[:, 1:2] = 3.0
        assert (x @ x.T).device == DEVICE
        for work in (
            lambda: there.tolist(), lambda: there.sum().item(), lambda: bool(there.any()), lambda: there.nonzero(),
            lambda: x[x > 0], lambda: host.to(DEVICE), lambda: host.to(DEVICE, non_blocking=True), lambda: there.cpu(),
            lambda: there + host, lambda: x[torch.tensor([1])],
        ):
            try:
                work()
            except AssertionError as error:
                print(type(error).__name__)
"""
