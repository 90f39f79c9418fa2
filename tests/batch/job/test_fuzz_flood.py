"""Hostile lines and pictures by the thousand through whole runs: one answer each, and good lines never notice."""

import json
import time
from collections import Counter

import pytest

from batch.images import TileSpec, load_tiles
from batch.job import BatchOptions, run_batch
from batch.prepare import LinePreparer
from batch.schema import LineError
from batch.state import StateOptions
from tests.batch.job.conftest import EchoBackend
from tests.batch.job.mutations import (
    as_line,
    base_pictures,
    damaged_line,
    damaged_picture,
    generator,
    good_line,
    picture,
    type_changes,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of Pillow, about broken TIFF tags
SLOWEST_LINE_S = 5.0  # CPU time; the machine may be busy with other things
GOOD_EVERY = 10


class Timed:
    """The slowest lines of a run, by the CPU time of the thread that prepared them."""

    def __init__(self, monkeypatch):
        self.slowest = []
        real = LinePreparer.prepare

        def prepare(preparer, raw, *rest):
            started_s = time.thread_time()
            prepared = real(preparer, raw, *rest)
            self.slowest = sorted([*self.slowest, (time.thread_time() - started_s, raw.data[:300])], reverse=True)[:3]
            return prepared

        monkeypatch.setattr(LinePreparer, "prepare", prepare)


def answers(folder, checkpoint, lines, name):
    """Run the lines; returns the summary and the output lines."""
    source, target = folder / f"{name}.jsonl", folder / f"{name}.out"
    source.write_bytes(b"\n".join(lines))
    options = BatchOptions(source, target, checkpoint, state=StateOptions(force=True, run_each=True))
    summary = run_batch(options, EchoBackend)
    with open(target, "rb") as file:
        return summary, [json.loads(line) for line in file]


def flood(folder, checkpoint, bad, monkeypatch):
    """Good lines among bad ones: every line is answered once, the good ones as if they were alone."""
    (folder / "sub").mkdir()
    picture().save(folder / "a.png")
    picture("L").save(folder / "sub/b.png")
    lines, good = [], []
    for number, line in enumerate(bad):
        lines.append(line)
        if number % GOOD_EVERY == 0:
            good.append(good_line(number))
            lines.append(good[-1])
    timed = Timed(monkeypatch)
    _, alone = answers(folder, checkpoint, good, "good")
    summary, found = answers(folder, checkpoint, lines, "all")
    assert len(found) == sum(bool(line.strip(b" \t\r")) for line in lines) == summary.ok + summary.num_errors
    codes = Counter(dict(summary.errors))
    assert not codes["internal_error"], [line for line in found if "internal_error" in json.dumps(line)][:3]
    good_ids = {json.loads(line)["id"] for line in good}
    among = {line["id"]: line for line in found if isinstance(line.get("id"), str) and line["id"] in good_ids}
    expected = {line["id"]: line for line in alone}
    assert len(expected) == len(good) and among == expected and all("text" in line for line in alone)
    for line in found:
        if "custom_id" in line:
            assert set(line) == {"id", "custom_id", "response", "error"}
        else:
            assert ("text" in line) != ("error" in line)
    assert timed.slowest[0][0] < SLOWEST_LINE_S, timed.slowest
    return summary, timed.slowest


def report(summary, slowest):
    print(f"{summary.ok} answers, errors {dict(summary.errors)}; slowest {slowest[0][0]:.3f} s: {slowest[0][1]!r}")


def test_some_damaged_lines(scout_tiny, tmp_path, monkeypatch):
    dice = generator(1)
    changes = list(type_changes())
    bad = [damaged_line(dice) for _ in range(1500)] + dice.sample(changes, 800)
    report(*flood(tmp_path, scout_tiny, bad, monkeypatch))


@pytest.mark.slow
def test_a_hundred_thousand_damaged_lines(scout_tiny, tmp_path, monkeypatch):
    dice = generator(2)
    changes = list(type_changes())
    bad = [*changes, *(damaged_line(dice) for _ in range(100_000 - len(changes)))]
    assert len(bad) >= 100_000
    dice.shuffle(bad)
    report(*flood(tmp_path, scout_tiny, bad, monkeypatch))


def test_some_damaged_pictures_in_lines(scout_tiny, tmp_path, monkeypatch):
    dice, bases = generator(3), base_pictures()
    report(*flood(tmp_path, scout_tiny, [as_line(damaged_picture(dice, bases)) for _ in range(300)], monkeypatch))


def load_all(seed, count):
    dice, bases = generator(seed), base_pictures()
    slowest, seen = (0.0, b""), Counter()
    for _ in range(count):
        data = damaged_picture(dice, bases)
        started_s = time.thread_time()
        try:
            seen[load_tiles(data, TileSpec(56)).pixels.shape[1:]] += 1
        except LineError as error:
            assert error.code in ("invalid_image", "image_too_large") and len(error.message) < 400
            seen[error.code] += 1
        slowest = max(slowest, (time.thread_time() - started_s, data[:60]))
    print(dict(seen), f"slowest {slowest[0]:.3f} s: {slowest[1]!r}")
    assert slowest[0] < SLOWEST_LINE_S, slowest
    assert sum(seen.values()) == count and seen[(3, 56, 56)] > count / 20 and seen["invalid_image"] > count / 20


def test_some_damaged_pictures():
    load_all(4, 500)


@pytest.mark.slow
def test_ten_thousand_damaged_pictures():
    load_all(5, 10_000)


def test_base_pictures_are_good():
    for data in base_pictures():
        assert load_tiles(data, TileSpec(56)).grid
