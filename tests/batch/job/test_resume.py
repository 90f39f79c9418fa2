"""Carrying on: nothing lost, nothing twice, nothing generated again that was paid for."""

import json
import os
import random
from collections import Counter

import pytest

from batch.generation import SamplingOptions
from batch.job import BatchOptions, run_batch
from batch.journal import journal_path, read_journal
from batch.requests import GenerationResult
from batch.state import StateOptions
from batch.summary import MaxErrors, TooManyErrors
from l4tool.core.errors import DeviceError, WriteError
from tests.batch.job.conftest import FORCE, EchoBackend, encode


class Worker(EchoBackend):
    """Counts what it answers; stops with an error after `fail_after` answers."""

    answered: Counter
    fail_after = None

    def run(self, source):
        for result in super().run(source):
            if self.fail_after is not None and sum(self.answered.values()) >= self.fail_after:
                raise RuntimeError("the device is gone")
            self.answered[result.key] += 1
            yield result


class Job:
    """One output, run again and again over inputs that may change."""

    def __init__(self, folder, model):
        self.source, self.target, self.model = folder / "in.jsonl", folder / "out.jsonl", model
        self.answered = Counter()

    def write(self, lines):
        self.source.write_bytes(b"".join(encode(line) + b"\n" for line in lines))

    def run(self, fail_after=None, **options):
        """Run; `self.answered` then says which input lines the backend answered in this run."""
        self.answered = Counter()
        backend = type("Once", (Worker,), {"answered": self.answered, "fail_after": fail_after})
        return run_batch(BatchOptions(self.source, self.target, self.model, **options), backend)

    def interrupt(self, after, **options):
        with pytest.raises(DeviceError, match="device is gone"):
            self.run(fail_after=after, **options)

    @property
    def lines(self):
        return [json.loads(line) for line in self.target.read_bytes().splitlines()]


def without_time(lines):
    for line in lines:
        if line.get("response"):
            line["response"]["body"].pop("created", None)
    return sorted(json.dumps(line, sort_keys=True) for line in lines)


def many(count, start=0):
    return [{"id": i, "prompt": f"number {i}"} for i in range(start, start + count)]


@pytest.fixture
def job(tmp_path, scout_tiny):
    return Job(tmp_path, scout_tiny)


def no_backend(options, front):
    raise AssertionError("the model is not needed")


def test_an_interrupted_run_carries_on_and_answers_nothing_twice(job):
    job.write(many(50))
    job.interrupt(after=20)
    assert len(job.lines) == 20
    first = {line["id"] for line in job.lines}
    summary = job.run()
    assert sum(job.answered.values()) == 30 and len(job.lines) == 50
    assert {job.lines[i]["id"] for i in range(20)} == first  # what was there stays where it was
    assert (summary.ok, summary.lines, summary.new("lines_done")) == (50, 50, 30)
    resumed = without_time(job.lines)
    job.run(state=FORCE)
    assert without_time(job.lines) == resumed


def test_a_complete_job_needs_no_model(job, capsys):
    job.write(many(5))
    job.run()
    before = job.target.read_bytes(), journal_path(job.target).read_bytes()
    summary = run_batch(BatchOptions(job.source, job.target, job.model), no_backend)
    assert summary.ok == 5 and summary.is_complete and "all 5 lines" in capsys.readouterr().err
    assert before == (job.target.read_bytes(), journal_path(job.target).read_bytes())


def test_input_may_grow_move_and_change_between_runs(job, capsys):
    job.write(many(10))
    job.run()
    lines = many(12)
    lines[3] = {"id": 3, "prompt": "another question"}
    random.Random(0).shuffle(lines)
    job.write(lines)
    summary = job.run(in_order=True)
    assert sorted(job.answered) == sorted(lines.index(line) + 1 for line in lines if line["id"] in (3, 10, 11))
    assert [line["id"] for line in job.lines] == [line["id"] for line in lines]
    assert summary.ok == 12
    changed = without_time(job.lines)
    job.run(state=FORCE, in_order=True)
    assert without_time(job.lines) == changed


def test_lines_that_left_the_input_keep_their_answers(job, capsys):
    job.write(many(6))
    job.run()
    job.write(many(3))
    job.run()
    assert len(job.lines) == 6 and not job.answered
    assert "3 lines" in capsys.readouterr().err


def test_a_picture_that_changed_is_looked_at_again(job, tmp_path):
    from PIL import Image

    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "b.png")
    job.write([{"id": name, "prompt": "what?", "images": [f"{name}.png"]} for name in "ab"])
    job.run()
    before = {line["id"]: line for line in job.lines}
    Image.new("RGB", (8, 9), "green").save(tmp_path / "a.png")
    job.run()
    after = {line["id"]: line for line in job.lines}
    assert list(job.answered) == [1] and before["b"] == after["b"] and before["a"] != after["a"]


class TestDuplicates:
    lines = tuple({"id": i, "prompt": text} for i, text in ((1, "a"), (2, "b"), (1, "c"), (1, "a")))

    def test_are_errors(self, job):
        job.write(self.lines)
        summary = job.run()
        assert dict(summary.errors) == {"duplicate_id": 2} and summary.ok == 2
        assert {line["line"] for line in job.lines if "error" in line} == {3, 4}
        job.run()
        assert not job.answered and len(job.lines) == 4

    def test_may_run_each(self, job):
        job.write(self.lines)
        summary = job.run(state=StateOptions(run_each=True))
        assert summary.ok == 4 and Counter(line["id"] for line in job.lines) == {1: 3, 2: 1}

    def test_one_and_its_name_are_different_ids(self, job):
        job.write([{"id": 1, "prompt": "a"}, {"id": "1", "prompt": "a"}])
        assert job.run().ok == 2

    def test_lines_without_ids_may_repeat(self, job):
        job.write([{"prompt": "same"}] * 5 + [{"prompt": "other"}])
        job.interrupt(after=2)
        job.run()
        assert sum(job.answered.values()) == 4 and len(job.lines) == 6

    def test_across_runs(self, job):
        """A new line with the id of an answered one that is still there is a duplicate, wherever it stands."""
        job.write([{"id": 1, "prompt": "a"}])
        job.run()
        job.write([{"id": 1, "prompt": "new"}, {"id": 1, "prompt": "a"}])
        summary = job.run()
        assert dict(summary.errors) == {"duplicate_id": 1} and not job.answered


def test_errors_can_be_tried_again(job):
    class Moody(EchoBackend):
        def answer(self, request):
            if request.key % 2:
                return GenerationResult(request.key, [], 1, "out_of_memory", "no room today")
            return super().answer(request)

    job.write(many(10))
    options = BatchOptions(job.source, job.target, job.model)
    assert dict(run_batch(options, Moody).errors) == {"out_of_memory": 5}
    assert job.run().num_errors == 5 and not job.answered  # not asked for
    summary = job.run(state=StateOptions(retry_errors=True))
    assert len(job.answered) == 5 and summary.ok == 10 and not summary.num_errors
    assert sorted(line["id"] for line in job.lines) == list(range(10)) and not any("error" in x for x in job.lines)


@pytest.mark.parametrize("retry", [False, True])
def test_error_lines_have_a_file_of_their_own(job, tmp_path, retry):
    errors = tmp_path / "errors.jsonl"
    job.write([line for i in range(20) for line in (b"broken %d" % i, {"id": i, "prompt": f"n {i}"})])
    job.interrupt(after=7, errors=errors)
    summary = job.run(errors=errors, in_order=True, state=StateOptions(retry_errors=retry))
    assert [line["id"] for line in job.lines] == list(range(20))
    bad = [json.loads(line) for line in errors.read_bytes().splitlines()]
    assert [line["line"] for line in bad] == list(range(1, 40, 2)) and summary.num_errors == 20


def test_input_order(job):
    job.write(many(40))
    job.run(in_order=True)
    assert [line["id"] for line in job.lines] == list(range(40))
    job.write(many(45))
    job.run(in_order=True)
    assert [line["id"] for line in job.lines] == list(range(45)) and len(job.answered) == 5


class TestRefusals:
    def test_other_defaults(self, job):
        job.write(many(3))
        job.run()
        with pytest.raises(WriteError, match=r"temperature was 0.6, is 0.5") as caught:
            run_batch(BatchOptions(job.source, job.target, job.model, SamplingOptions(temperature=0.5)), no_backend)
        assert "--force" in caught.value.hint and len(job.lines) == 3

    @pytest.mark.parametrize("change", ["missing", "shorter", "longer"])
    def test_an_output_that_somebody_changed(self, job, change):
        job.write(many(3))
        job.run()
        raw = job.target.read_bytes()
        if change == "missing":
            job.target.unlink()
        else:
            job.target.write_bytes(raw[:-30] if change == "shorter" else raw + b'{"id": "mine"}\n')
        found = job.target.read_bytes() if change != "missing" else None
        with pytest.raises(WriteError):
            run_batch(BatchOptions(job.source, job.target, job.model), no_backend)
        assert found is None or job.target.read_bytes() == found

    def test_an_output_without_a_journal(self, job):
        job.write(many(3))
        job.target.write_text("precious\n")
        with pytest.raises(WriteError, match="no journal"):
            run_batch(BatchOptions(job.source, job.target, job.model), no_backend)
        assert job.target.read_text() == "precious\n"
        assert not journal_path(job.target).exists()

    def test_a_journal_that_is_something_else(self, job):
        job.write(many(3))
        journal_path(job.target).write_text("my diary")
        with pytest.raises(WriteError, match="not a journal"):
            run_batch(BatchOptions(job.source, job.target, job.model), no_backend)
        assert journal_path(job.target).read_text() == "my diary"


def test_too_many_errors_end_a_run_and_it_can_go_on(job):
    job.write([b"bad %d" % i for i in range(50)] + many(50))
    with pytest.raises(TooManyErrors) as caught:
        job.run(max_errors=MaxErrors.parse("10"))
    assert caught.value.exit_code == 3 and len(job.lines) == 11
    assert job.run(max_errors=MaxErrors.parse("50%")).lines == 100


@pytest.mark.parametrize("text", ["", "x", "-1", "101%", "1.5", "nan%", "%"])
def test_max_errors_is_a_count_or_a_share(text):
    from l4tool.core.errors import UsageError

    with pytest.raises(UsageError):
        MaxErrors.parse(text)


class TestRepair:
    """What a kill or a power cut can leave behind."""

    def prepare(self, job, after=20):
        job.write(many(40))
        job.interrupt(after=after, state=StateOptions(sync_lines=5))
        # the interrupted run synced at its end: take the last marker away, as if it had been killed
        path = journal_path(job.target)
        contents = read_journal(path)
        path.write_bytes(path.read_bytes()[: contents.num_bytes - contents.records.itemsize])

    def finish(self, job, done):
        job.run()
        assert sum(job.answered.values()) == 40 - done
        assert sorted(line["id"] for line in job.lines) == list(range(40))

    @pytest.mark.parametrize("tail", [b"{", b'{"id":99,"text":"never finished', b"\0" * 5000])
    def test_torn_line(self, job, tail):
        self.prepare(job, after=18)
        with open(job.target, "ab") as file:
            file.write(tail)
        self.finish(job, 18)

    @pytest.mark.parametrize("cut", [1, 10, 200])
    def test_lines_that_never_reached_the_disk(self, job, cut):
        self.prepare(job, after=18)
        raw = job.target.read_bytes()
        os.truncate(job.target, len(raw) - cut)
        self.finish(job, raw[: len(raw) - cut].count(b"\n"))

    @pytest.mark.parametrize("cut", [1, 50, 95])
    def test_torn_record(self, job, cut):
        self.prepare(job, after=18)
        path = journal_path(job.target)
        os.truncate(path, path.stat().st_size - cut)
        self.finish(job, 17)

    def test_a_page_of_zeros(self, job):
        self.prepare(job, after=18)
        raw = bytearray(job.target.read_bytes())
        at = raw.rindex(b"\n", 0, len(raw) - 1) + 1
        raw[at:] = bytes(len(raw) - at)
        job.target.write_bytes(raw)
        self.finish(job, 17)

    def test_header_never_written(self, job):
        job.write(many(40))
        journal_path(job.target).write_bytes(b"l4tool batch")
        job.run()
        assert len(job.lines) == 40

    @pytest.mark.parametrize("seed", range(20))
    def test_dropped_writes(self, job, seed, monkeypatch):
        """A power cut: of what was not synced any part may be missing, in any file."""
        draw = random.Random(seed)
        synced = {}
        real = os.fdatasync

        def fdatasync(fd):
            real(fd)
            synced[os.readlink(f"/proc/self/fd/{fd}")] = os.fstat(fd).st_size

        monkeypatch.setattr("os.fdatasync", fdatasync)
        job.write(many(40))
        at_cut = {}

        class Cut(Worker):
            def run(self, source):
                try:
                    yield from super().run(source)
                except RuntimeError:
                    at_cut.update(synced)
                    raise

        Cut.answered, Cut.fail_after = Counter(), draw.randrange(1, 40)
        with pytest.raises(DeviceError):
            run_batch(BatchOptions(job.source, job.target, job.model, state=StateOptions(sync_lines=7)), Cut)
        done = len(job.lines)
        for path in (job.target, journal_path(job.target)):
            raw = bytearray(path.read_bytes())
            safe = at_cut.get(str(path), 0 if path == job.target else read_journal(path).start)
            keep = draw.randrange(safe, len(raw) + 1)
            raw = raw[:keep]
            for _ in range(draw.randrange(3)):
                if keep > safe:
                    hole = draw.randrange(safe, keep)
                    raw[hole : hole + 64] = bytes(len(raw[hole : hole + 64]))
            path.write_bytes(raw)
        job.run()
        assert sum(job.answered.values()) <= 40 - done + 7
        assert sorted(line["id"] for line in job.lines) == list(range(40))


@pytest.mark.parametrize("step", range(10))
def test_a_crash_while_the_output_is_put_in_order(job, step, monkeypatch):
    job.write([*many(30), b"bad"])
    calls = []
    real_replace, real_fsync = os.replace, os.fsync

    def crash_at(real):
        def call(*args):
            if any(job.target.parent.glob("*.part")):
                calls.append(args)
            if len(calls) == step + 1:
                raise KeyboardInterrupt
            return real(*args)

        return call

    options = BatchOptions(job.source, job.target, job.model, in_order=True, errors=job.target.with_name("errors"))
    monkeypatch.setattr("batch.rewrite.os.replace", crash_at(real_replace))
    monkeypatch.setattr("batch.rewrite.os.fsync", crash_at(real_fsync))
    try:
        run_batch(options, EchoBackend)
    except KeyboardInterrupt:
        pass
    else:
        assert step == 9  # three files are synced, then their names, then each takes its place
    monkeypatch.undo()
    summary = run_batch(options, no_backend)
    assert summary.ok == 30 and [line["id"] for line in job.lines] == list(range(30))
    assert not list(job.target.parent.glob("*.part"))


def test_what_a_killed_run_left_is_synced_by_the_next_one(job, monkeypatch):
    """Its marker covers the error file too, though this run writes only answers."""
    errors = job.target.with_name("errors")
    job.write([*(b"bad %d" % i for i in range(5)), *many(10)])
    job.interrupt(after=2, errors=errors)
    synced = set()
    real = os.fdatasync
    monkeypatch.setattr("os.fdatasync", lambda fd: (synced.add(os.readlink(f"/proc/self/fd/{fd}")), real(fd)))
    assert job.run(errors=errors).ok == 10
    assert {str(errors), str(job.target), str(journal_path(job.target))} <= synced
