"""Killed at any moment, the same command carries on, and the result is byte for byte that of an undisturbed run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from converters.detect import open_checkpoint
from converters.writing import journal, stream
from l4tool.core.errors import CheckpointError, LockHeld, WriteError
from l4tool.core.lock import LOCK, output_lock
from quant import pipeline
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
    ended = [line for line in lines if "steps" in line]
    return results, ended, done.stderr


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
    results, ended, _ = run(scout_tiny, out, "run")
    assert results[0]["code"] == 0
    assert len(list(out.glob("*.safetensors"))) >= 5
    return contents(out), ended[0]["steps"]


def test_killed_at_many_points(scout_tiny, undisturbed, tmp_path):
    """24 outputs killed at as many points all over a run, and near its end: side files, index, config.json, journal."""
    expected, total = undisturbed
    assert total > 300
    points = [1 + n * total // 18 for n in range(18)] + [total - back for back in (16, 12, 9, 6, 4, 2, 1, 0)]
    kinds = ["torn" if n % 3 == 0 else "kill" for n in range(len(points))]
    stops = [f"{n}/{kind}:{point}" for n, (kind, point) in enumerate(zip(kinds, points, strict=True))]
    results, _, _ = run_all(
        scout_tiny, tmp_path, [stop for n, first in enumerate(stops) for stop in (first, f"{n}/run")]
    )
    codes = [result["code"] for result in results[0::2]]  # how many checkpoints a run makes varies by a few steps
    assert codes[:-4] == [-signal.SIGKILL] * (len(points) - 4) and set(codes) <= {-signal.SIGKILL, 0}
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


def test_only_unfinished_tensors_are_done_again(scout_tiny, undisturbed, tmp_path):
    """What the journal names is kept, in finished shards and in open ones; nothing else is skipped."""
    expected, total = undisturbed
    out, every = tmp_path / "out", set(open_checkpoint(scout_tiny).tensors())
    in_open_shards = 0
    for part in (3, 2):
        results, _, _ = run(scout_tiny, out, f"kill:{total // part}")
        assert results[0]["code"] == -signal.SIGKILL and "config.json" not in results[0]["names"]
        before = journal.read_journal(out)
        mtimes = {name: (out / name).stat().st_mtime_ns for name in before.shards}
        finished = {name for entries in before.tensors.values() for name in entries}
        in_open_shards += sum(len(before.tensors[name]) for name in before.tensors.keys() - before.shards.keys())
        assert 0 < len(finished) < len(every)
        again = checkpoints.copy(out, tmp_path / f"again{part}")
        _, ended, errors = run(scout_tiny, again, "run")
        assert ended[0]["tensors"] == sorted(every - finished)
        assert f"carrying on: {len(finished)} of {len(every)} tensors" in errors
        assert contents(again) == expected
    assert mtimes and in_open_shards
    run(scout_tiny, out, "run")
    assert all((out / name).stat().st_mtime_ns == mtime for name, mtime in mtimes.items())
    assert contents(out) == expected


@pytest.mark.parametrize("setting", [{"CHECKPOINT_BYTES": 100_000}, {"CHECKPOINT_S": 0.0}])
def test_checkpoints_inside_a_source_file(setting, scout_tiny, tmp_path, monkeypatch):
    """By bytes and by time: one big source file does not make a kill cost all of it."""
    source, out = checkpoints.copy(scout_tiny, tmp_path / "source"), tmp_path / "out"
    checkpoints.save(source, checkpoints.load(source))
    assert len(checkpoints.shards(source)) == 1
    for name, value in setting.items():
        monkeypatch.setattr(stream, name, value)
    real, calls = stream.Stream._work, []

    def work(self, shard, unit):
        calls.append(unit)
        if len(calls) > 100:
            wait_until(lambda: journal.read_journal(out).tensors)
            raise CheckpointError("stopped here")
        return real(self, shard, unit)

    monkeypatch.setattr(stream.Stream, "_work", work)
    with pytest.raises(CheckpointError):
        quantize(source, out, max_shard_bytes=10**9)
    before = journal.read_journal(out)
    assert not before.shards
    finished = {name for entries in before.tensors.values() for name in entries}
    monkeypatch.setattr(stream.Stream, "_work", real)
    calls.clear()
    monkeypatch.setattr(stream.Stream, "_shard", counted(stream.Stream._shard, calls))
    quantize(source, out, max_shard_bytes=10**9)
    assert len(calls) == len(open_checkpoint(source).tensors()) - len(finished)
    expected = quantize(source, tmp_path / "whole", max_shard_bytes=10**9)["output"]
    assert json.loads((out / journal.REPORT).read_text())["output"] == expected


def counted(function, calls):
    def call(*arguments):
        calls.append(arguments)
        return function(*arguments)

    return call


def wait_until(condition, timeout_s=60):
    deadline_s = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert condition()


def test_rename_without_journal_line(scout_tiny, undisturbed, tmp_path):
    """Killed between the rename of a shard and its line in the journal: its tensors are not done again."""
    out = tmp_path / "out"
    run(scout_tiny, out, f"kill:{undisturbed[1] * 2 // 3}")
    lines = (out / journal.JOURNAL).read_bytes().splitlines(keepends=True)
    sealed = max(n for n, line in enumerate(lines) if b'"shard"' in line)
    name = json.loads(lines[sealed])["shard"]
    (out / journal.JOURNAL).write_bytes(b"".join(lines[:sealed]))
    kept = journal.read_journal(out).tensors[name].keys()
    _, ended, _ = run(scout_tiny, out, "run")
    assert kept and not kept & set(ended[0]["tensors"])
    assert contents(out) == undisturbed[0]


def test_journal_of_the_earlier_form(scout_tiny, undisturbed, tmp_path):
    """It knew whole shards only, and kept their tensors' sums elsewhere."""
    out = tmp_path / "out"
    run(scout_tiny, out, f"kill:{undisturbed[1] // 2}")
    lines = [json.loads(line) for line in (out / journal.JOURNAL).read_text().splitlines()]
    del lines[0]["form"]
    (out / journal.JOURNAL).write_text(json.dumps(lines[0]) + "\n")
    with pytest.raises(WriteError, match="begun by an earlier version"):
        quantize(scout_tiny, out)
    quantize(scout_tiny, out, force=True)
    assert contents(out) == undisturbed[0]


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
    from converters.writing.plan import BASE_BYTES

    quantize(scout_tiny, tmp_path / "one", jobs=1)
    assert contents(tmp_path / "one") == undisturbed[0]
    quantize(scout_tiny, tmp_path / "small", jobs=3, memory_bytes=BASE_BYTES + 240_000)
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


def test_damaged_tensors_are_made_again(scout_tiny, undisturbed, tmp_path):
    """Finished and open shards that somebody touched: hashed, and only what is different is done again."""
    for out, step in ((tmp_path / f"out{step}", step) for step in range(undisturbed[1] // 2, undisturbed[1])):
        run(scout_tiny, out, f"kill:{step}")
        before = journal.read_journal(out)
        finished = {name for entries in before.tensors.values() for name in entries}
        if before.shards and (open_shards := sorted(before.tensors.keys() - before.shards.keys())):
            break
    part = out / f"{open_shards[0]}.part"
    damaged = {flip(min(out.glob("*.safetensors")), finished), flip(part, before.tensors[open_shards[0]])}
    _, ended, _ = run(scout_tiny, out, "run")
    assert len(damaged) == 2 and set(ended[0]["tensors"]) & finished == damaged
    assert contents(out) == undisturbed[0]


def flip(path, among):
    """Change the last byte of the last tensor that is the weight of one of these; returns its canonical name."""
    raw = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    ends = {key.removesuffix("_packed"): entry for key, entry in json.loads(raw[8:start]).items()}
    name = [key for key in ends if key in among][-1]
    raw[start + ends[name]["data_offsets"][1] - 1] ^= 1
    path.write_bytes(raw)
    return name


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
    with output_lock(out), pytest.raises(LockHeld) as error:
        quantize(scout_tiny, out)
    assert error.value.exit_code == 75
    quantize(scout_tiny, out)
    assert not (out / LOCK).exists()


def test_torn_journal_line_is_dropped(scout_tiny, undisturbed, tmp_path):
    run(scout_tiny, tmp_path / "killed", f"kill:{undisturbed[1] * 2 // 3}")
    for number, tail in enumerate([b'{"shard":"model-0', b"\x00\x00\xff", b'{"shard": 1}']):
        out = checkpoints.copy(tmp_path / "killed", tmp_path / str(number))
        with open(out / journal.JOURNAL, "ab") as file:
            file.write(tail)
        quantize(scout_tiny, out)
        assert contents(out) == undisturbed[0]
