"""`l4tool merge`: what it makes is what one run in input order would have made, or it says what is missing."""

import json

import pytest

from batch.generation import SamplingOptions
from batch.job import BatchOptions, run_batch
from batch.journal import journal_path
from batch.line_keys import Shard
from batch.state import StateOptions
from l4tool.core.errors import DeviceError, LockHeld
from l4tool.main import main
from tests.batch.job.conftest import EchoBackend
from tests.batch.job.test_resume import encode, many

COUNT = 4
LINES = (*many(50), b"broken", {"prompt": "no id"}, b"", {"prompt": "no id"}, *many(10, start=50))


class Shards:
    def __init__(self, folder, model):
        self.folder, self.model, self.source = folder, model, folder / "in.jsonl"
        self.write(LINES)

    def write(self, lines):
        self.source.write_bytes(b"".join(encode(line) + b"\n" for line in lines))

    def out(self, index):
        return self.folder / f"out.{index}.jsonl"

    def run(self, index, backend=EchoBackend, count=COUNT, **options):
        run = BatchOptions(self.source, self.out(index), self.model, shard=Shard(index, count), **options)
        return run_batch(run, backend)

    def run_all(self, error_files=False, **options):
        for index in range(1, COUNT + 1):
            errors = self.folder / f"bad.{index}" if error_files else None
            self.run(index, errors=errors, **options)

    def whole(self, **options):
        """What one run makes."""
        path = self.folder / "whole.jsonl"
        run_batch(BatchOptions(self.source, path, self.model, in_order=True, **options), EchoBackend)
        return timeless(path)

    def merge(self, *more, outputs=None):
        outputs = [self.out(index) for index in range(1, COUNT + 1)] if outputs is None else outputs
        return main(["merge", *map(str, outputs), "-o", str(self.folder / "all.jsonl"), *map(str, more)])

    @property
    def merged(self):
        return self.folder / "all.jsonl"


def timeless(path):
    lines = [json.loads(line) for line in path.read_bytes().splitlines()]
    for line in lines:
        if line.get("response"):
            line["response"]["body"].pop("created", None)
    return lines


GONE = (RuntimeError, DeviceError)


class Dying(EchoBackend):
    def answer(self, request):
        if self.stats["steps"] > 5:
            raise RuntimeError("the device is gone")
        return super().answer(request)


@pytest.fixture
def shards(tmp_path, scout_tiny):
    return Shards(tmp_path, scout_tiny)


def test_the_whole_in_input_order(shards, capsys):
    shards.run_all()
    assert shards.merge() == 3  # there is an error line
    assert timeless(shards.merged) == shards.whole()
    told = capsys.readouterr()
    assert "63" in told.err.splitlines()[-1] and "4/4" in told.err and not told.out


def test_the_order_in_which_shards_are_named_does_not_matter(shards):
    shards.run_all()
    assert shards.merge(outputs=[shards.out(index) for index in (3, 1, 4, 2)]) == 3
    assert timeless(shards.merged) == shards.whole()


def test_no_error_lines_is_0(shards):
    shards.write(many(20))
    shards.run_all()
    assert shards.merge() == 0


@pytest.mark.parametrize("apart", ["by the runs", "by merge", "by both"])
def test_error_lines_apart(shards, tmp_path, apart):
    shards.run_all(error_files=apart != "by merge")
    options = [] if apart == "by the runs" else ["--errors", tmp_path / "errors.jsonl"]
    assert shards.merge(*options) == 3
    whole = shards.whole()
    if options:
        bad = [line for line in whole if "error" in line]
        assert timeless(tmp_path / "errors.jsonl") == bad and len(bad) == 1
        whole = [line for line in whole if "error" not in line]
    assert timeless(shards.merged) == whole


def test_an_output_that_was_not_sharded_is_put_in_order(shards):
    run_batch(BatchOptions(shards.source, shards.out(1), shards.model), EchoBackend)
    assert shards.merge(outputs=[shards.out(1)]) == 3 and timeless(shards.merged) == shards.whole()


def refused(shards, capsys, code, *texts, more=(), outputs=None):
    capsys.readouterr()
    assert shards.merge(*more, outputs=outputs) == code
    told = capsys.readouterr().err
    for text in texts:
        assert text in told, told
    assert "Traceback" not in told and not shards.merged.exists() and not list(shards.folder.glob("*.part"))


class TestRefusals:
    def test_a_shard_that_is_not_named(self, shards, capsys):
        shards.run_all()
        outputs = [shards.out(1), shards.out(4)]
        refused(shards, capsys, 66, "shard 2/4 is missing", "shard 3/4 is missing", "--partial", outputs=outputs)
        assert shards.merge("--partial", outputs=outputs) == 3 or not any("error" in x for x in timeless(shards.merged))
        whole = shards.whole()
        found = timeless(shards.merged)
        assert [line for line in whole if line in found] == found and 0 < len(found) < len(whole)

    def test_a_shard_without_its_journal(self, shards, capsys):
        shards.run_all()
        journal_path(shards.out(3)).unlink()
        refused(shards, capsys, 66, "out.3.jsonl.journal")
        shards.out(2).unlink()
        refused(shards, capsys, 66, "out.2.jsonl is missing", outputs=[shards.out(1), shards.out(2)])

    def test_a_shard_that_is_not_finished(self, shards, capsys):
        for index in (1, 3, 4):
            shards.run(index)
        with pytest.raises(GONE):
            shards.run(2, Dying)
        done = len(timeless(shards.out(2)))
        refused(shards, capsys, 65, "shard 2/4", f"has {done} of ", "run its command again")
        assert shards.merge("--partial") in (0, 3)
        partial = timeless(shards.merged)
        shards.merged.unlink()
        wanted = shards.run(2).lines
        shards.merge()
        assert timeless(shards.merged) == shards.whole()
        assert len(partial) == 63 - wanted + done

    def test_how_many_lines_it_should_have(self, shards, capsys):
        for index in (1, 3, 4):
            shards.run(index)
        with pytest.raises(GONE):
            shards.run(2, Dying)
        capsys.readouterr()
        shards.merge()
        told = capsys.readouterr().err
        assert f"of {shards.run(2).lines} lines" in told

    def test_a_shard_named_twice(self, shards, capsys):
        shards.run_all()
        refused(shards, capsys, 65, "there twice", outputs=[shards.out(1), shards.out(1)])

    def test_another_model_or_option(self, shards, capsys):
        shards.run(1)
        shards.run(2, sampling=SamplingOptions(temperature=0.1))
        refused(shards, capsys, 65, "temperature", outputs=[shards.out(1), shards.out(2)])

    def test_another_split(self, shards, capsys):
        shards.run(1)
        shards.run(2, count=3)
        refused(shards, capsys, 65, "not of one split", outputs=[shards.out(1), shards.out(2)])

    def test_another_input(self, shards, capsys):
        for index in (1, 2, 3):
            shards.run(index)
        shards.write([*LINES, {"id": "late", "prompt": "one more"}])
        shards.run(4)
        refused(shards, capsys, 65, "different inputs", "63", "64")
        shards.run_all()
        assert shards.merge() == 3 and timeless(shards.merged) == shards.whole()

    def test_an_id_in_two_shards(self, shards, capsys):
        shards.write([{"id": "twin", "prompt": f"text {i}"} for i in range(30)])
        shards.run_all()
        refused(shards, capsys, 65, "the id 'twin'", "(shard 1/4)", "in line")
        for index in range(1, COUNT + 1):
            shards.run(index, state=StateOptions(force=True, run_each=True))
        assert shards.merge() == 0 and len(timeless(shards.merged)) == 30

    def test_a_line_that_was_changed(self, shards, capsys):
        shards.run_all()
        raw = bytearray(shards.out(2).read_bytes())
        raw[40] ^= 1
        shards.out(2).write_bytes(raw)
        refused(shards, capsys, 76, "not what its journal says", "shard 2/4")
        refused(shards, capsys, 76, "not what its journal says", more=["--partial"])

    def test_a_file_that_exists(self, shards, capsys):
        shards.run_all()
        shards.merged.write_text("precious")
        assert shards.merge() == 73 and shards.merged.read_text() == "precious"
        assert shards.merge("--force") == 3 and timeless(shards.merged) == shards.whole()

    def test_writing_over_an_input(self, shards, capsys):
        shards.run_all()
        before = shards.out(1).read_bytes()
        assert main(["merge", str(shards.out(1)), str(shards.out(2)), "-o", str(shards.out(1)), "--force"]) == 64
        assert shards.out(1).read_bytes() == before

    def test_a_run_that_is_writing(self, shards, capsys):
        shards.run_all()

        class Merging(EchoBackend):
            def answer(self, request):
                assert shards.merge() == LockHeld.exit_code
                return super().answer(request)

        shards.write([*LINES, *many(30, start=100)])
        shards.run(1, Merging)
        assert "a run is writing" in capsys.readouterr().err


def test_a_killed_runs_last_line_is_left_out_of_a_partial_merge(shards):
    """Its record was written first; its line is torn."""
    with pytest.raises(GONE):
        shards.run(1, Dying)
    whole = timeless(shards.out(1))
    shards.out(1).write_bytes(shards.out(1).read_bytes()[:-5])
    assert shards.merge("--partial", outputs=[shards.out(1)]) in (0, 3)
    assert len(timeless(shards.merged)) == len(whole) - 1


def test_lines_that_left_the_input_stand_last(shards, capsys):
    shards.write(many(20))
    shards.run_all()
    shards.write(many(20)[5:])
    shards.run_all()
    assert shards.merge() == 0
    ids = [line["id"] for line in timeless(shards.merged)]
    assert ids[:15] == list(range(5, 20)) and sorted(ids[15:]) == list(range(5))
    assert "5 lines answer lines that the input does not have" in capsys.readouterr().err
