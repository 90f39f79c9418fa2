"""Jobs that are killed at random moments until they are complete: every line once, as in an undisturbed run."""

import pytest

from tests.batch.soak.campaign import campaign


def check(figures, kills):
    assert figures.kills >= kills and figures.jobs > kills / 50
    assert min(figures.ends[name] for name in ("killed", "power cut", "cannot write", "signal")) >= kills / 50
    assert figures.lost_answers <= figures.allowed_answers


@pytest.mark.parametrize("first_seed", [1, 10_001])  # in two, for two workers
def test_kills(scout_tiny, tmp_path, first_seed):
    check(campaign(scout_tiny, 150, first_seed, tmp_path), 150)


@pytest.mark.slow
@pytest.mark.parametrize("first_seed", [100_001, 110_001, 120_001, 130_001])
def test_a_thousand_kills(scout_tiny, tmp_path, first_seed):
    check(campaign(scout_tiny, 250, first_seed, tmp_path), 250)
