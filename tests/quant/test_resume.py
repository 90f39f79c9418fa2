"""Killed at any moment, the same command carries on, and the result is byte for byte that of an undisturbed run."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from converters.detect import open_checkpoint
from l4tool.core.errors import LockHeld, WriteError
from quant import journal, pipeline
from quant.schemes import make_recipe
from tests import checkpoints

ROOT = Path(__file__).resolve().parents[2]
SHARD_BYTES = 1_500_000


def run(source, out, *stops):
    """Children of tests/quant/interrupted.py writing `out`: their results, steps of those that ended, stderr."""
    return run_all(source, out.parent, [f"{out.name}/{stop}" for stop in stops])


def run_all(source, parent, stops):
    command = [sys.executable, "-m", "tests.quant.interrupted", str(source), str(parent), str(SHARD_BYTES), *stops]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    results = [line for line in lines if "stop" in line]
    assert len(results) == len(stops), done.stderr
    steps = [line["steps"] for line in lines if "steps" in line]
    return results, steps, done.stderr


def contents(folder):
    """Every file's bytes; the report without what it says about the run itself."""
    files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    report = json.loads(files[journal.REPORT])
    del report["run"]
    files[journal.REPORT] = report
    return files


def quantize(source, out, **options):
    reader = open_checkpoint(source)
    settings = {"jobs": 2, "max_shard_bytes": SHARD_BYTES} | options
    return pipeline.quantize(reader, out, make_recipe("int4"), pipeline.Options(**settings))


@pytest.fixture(scope="module")
def undisturbed(scout_tiny, tmp_path_factory):
    """(files, steps) of a run without interruption."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    results, steps, _ = run(scout_tiny, out, "run")
    assert results[0]["code"] == 0
    assert len(list(out.glob("*.safetensors"))) >= 5
    return contents(out), steps[0]


def test_killed_at_many_points(scout_tiny, undisturbed, tmp_path):
    """24 outputs killed at as many points all over a run, and near its end: side files, index, config.json, journal."""
    expected, total = undisturbed
    assert total > 300
    points = [1 + n * total // 18 for n in range(18)] + [total - back for back in (0, 1, 2, 4, 6, 9)]
    kinds = ["torn" if n % 3 == 0 else "kill" for n in range(len(points))]
    stops = [f"{n}/{kind}:{point}" for n, (kind, point) in enumerate(zip(kinds, points, strict=True))]
    results, _, _ = run_all(
        scout_tiny, tmp_path, [stop for n, first in enumerate(stops) for stop in (first, f"{n}/run")]
    )
    assert [result["code"] for result in results[0::2]] == [-signal.SIGKILL] * len(points)
    assert [result["code"] for result in results[1::2]] == [0] * len(points)
    for result in results[0::2]:
        assert "config.json" not in result["names"] or "model.safetensors.index.json" in result["names"]
    for n in range(len(points)):
        assert contents(tmp_path / str(n)) == expected, points[n]


def test_killed_again_and_again(scout_tiny, undisturbed, tmp_path):
    """One output: every run gets a little further."""
    stops = [f"kill:{step}" for step in (20, 60, 70, 80, 40, 90)]
    results, _, _ = run(scout_tiny, tmp_path / "out", *stops, "run")
    assert [result["code"] for result in results] == [-signal.SIGKILL] * len(stops) + [0]
    assert contents(tmp_path / "out") == undisturbed[0]


def test_finished_shards_are_kept(scout_tiny, undisturbed, tmp_path):
    expected, total = undisturbed
    results, _, _ = run(scout_tiny, tmp_path / "out", f"kill:{total * 2 // 3}")
    finished = journal.read_journal(tmp_path / "out")[1]  # a shard renamed but not yet journaled is made again
    shards = {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in finished}
    assert len(shards) >= 3
    assert "config.json" not in results[0]["names"]
    _, steps, errors = run(scout_tiny, tmp_path / "out", "run")
    assert f"carrying on: {len(shards)} of" in errors
    assert steps[0] < total * 2 / 3
    assert all((tmp_path / "out" / name).stat().st_mtime_ns == mtime for name, mtime in shards.items())
    assert contents(tmp_path / "out") == expected


@pytest.mark.parametrize(("stop", "code"), [("term", 143), ("int", 130), ("full", 73)])
def test_stopped_in_good_order(stop, code, scout_tiny, undisturbed, tmp_path):
    expected, total = undisturbed
    results, _, errors = run(scout_tiny, tmp_path / "out", f"{stop}:{total // 2}", "run")
    assert [result["code"] for result in results] == [code, 0]
    assert "config.json" not in results[0]["names"]
    if stop == "full":
        assert "No space left on device" in errors and "carries on where it stopped" in errors
    assert contents(tmp_path / "out") == expected


def test_file_size_limit(scout_tiny, undisturbed, tmp_path):
    results, _, errors = run(scout_tiny, tmp_path / "out", f"limit:{SHARD_BYTES // 2}", "run")
    assert [result["code"] for result in results] == [73, 0]
    assert "ulimit" in errors
    assert contents(tmp_path / "out") == undisturbed[0]


def test_result_does_not_depend_on_memory_or_jobs(scout_tiny, undisturbed, tmp_path):
    """Small memory: several units for every tensor."""
    from quant import plan

    quantize(scout_tiny, tmp_path / "one", jobs=1)
    assert contents(tmp_path / "one") == undisturbed[0]
    quantize(scout_tiny, tmp_path / "small", jobs=3, memory_bytes=plan.BASE_BYTES + 240_000)
    assert contents(tmp_path / "small") == undisturbed[0]


def test_finished_run_again(scout_tiny, tmp_path, capsys):
    out = tmp_path / "out"
    first = quantize(scout_tiny, out)
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert quantize(scout_tiny, out) == first
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    assert "already complete" in capsys.readouterr().err


def test_another_job_is_refused(scout_tiny, tmp_path):
    """A changed source, recipe or version; finished or not; --force starts afresh."""
    source, out = checkpoints.copy(scout_tiny, tmp_path / "source"), tmp_path / "out"
    quantize(source, out)
    with pytest.raises(WriteError, match="options") as error:
        pipeline.quantize(open_checkpoint(source), out, make_recipe("fp8"), pipeline.Options())
    assert "--force" in (error.value.hint or "")
    shard = checkpoints.shards(source)[0]
    data = bytearray(shard.read_bytes())
    stat = shard.stat()
    data[-30:] = bytes(30)
    shard.write_bytes(data)
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # same size, same time: the sample tells
    with pytest.raises(WriteError, match=f"source has changed.*{shard.name}"):
        quantize(source, out)
    checkpoints.edit_config(source, lambda config: config.update(note=1))
    with pytest.raises(WriteError, match=r"config\.json"):
        quantize(source, out)
    before = contents(out)
    quantize(source, out, force=True)
    assert contents(out) != before
    assert json.loads((out / "config.json").read_text())["note"] == 1


def test_version_change_is_refused(scout_tiny, undisturbed, tmp_path, monkeypatch):
    out = tmp_path / "out"
    run(scout_tiny, out, f"kill:{undisturbed[1] // 2}")
    monkeypatch.setattr(journal, "__version__", "99.0")
    with pytest.raises(WriteError, match=r"unfinished run: it was begun by version"):
        quantize(scout_tiny, out)
    quantize(scout_tiny, out, force=True)
    assert not list(out.glob("*.part"))


def test_damaged_shard_is_made_again(scout_tiny, undisturbed, tmp_path):
    """A journaled shard that somebody touched: hashed, found different, written again."""
    out = tmp_path / "out"
    run(scout_tiny, out, f"kill:{undisturbed[1] * 2 // 3}")
    shard = min(out.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    quantize(scout_tiny, out)
    assert contents(out) == undisturbed[0]


def test_foreign_folder_is_left_alone(scout_tiny, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    for force in (False, True):
        with pytest.raises(WriteError, match="is not empty"):
            quantize(scout_tiny, out, force=force)
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(WriteError, match="is a file"):
        quantize(scout_tiny, tmp_path / "file")


def test_force_deletes_only_what_a_run_wrote(scout_tiny, tmp_path):
    out = tmp_path / "out"
    quantize(scout_tiny, out)
    (out / "notes.txt").write_text("mine")
    pipeline.quantize(open_checkpoint(scout_tiny), out, make_recipe("fp8"), pipeline.Options(force=True))
    assert (out / "notes.txt").read_text() == "mine"
    assert len(list(out.glob("*.safetensors"))) == 1  # the default shard size


def test_second_run_is_locked_out(scout_tiny, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with journal.output_lock(out), pytest.raises(LockHeld) as error:
        quantize(scout_tiny, out)
    assert error.value.exit_code == 75
    quantize(scout_tiny, out)
    assert not (out / journal.LOCK).exists()


def test_torn_journal_line_is_dropped(scout_tiny, undisturbed, tmp_path):
    run(scout_tiny, tmp_path / "killed", f"kill:{undisturbed[1] * 2 // 3}")
    for number, tail in enumerate([b'{"shard":"model-0', b"\x00\x00\xff", b'{"shard": 1}']):
        out = checkpoints.copy(tmp_path / "killed", tmp_path / str(number))
        with open(out / journal.JOURNAL, "ab") as file:
            file.write(tail)
        quantize(scout_tiny, out)
        assert contents(out) == undisturbed[0]
