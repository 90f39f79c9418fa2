"""--shard I/N: the same line always in the same part, each part a job of its own."""

import hashlib
import json
import random
from collections import Counter

import pytest

from batch.job import BatchOptions, run_batch
from batch.journal import Kind, journal_path, read_journal
from batch.jsonl import RawLine
from batch.line_keys import LineKeys, Shard
from batch.state import StateOptions
from l4tool.core.errors import UsageError, WriteError
from tests.batch.job.test_resume import Job, many, no_backend


@pytest.fixture
def job(tmp_path, scout_tiny):
    return Job(tmp_path, scout_tiny)


def shards(count):
    return [Shard(index, count) for index in range(1, count + 1)]


def parts(lines, count):
    """For each line the shards that take it."""
    found = [[] for _ in lines]
    for shard in shards(count):
        keys = LineKeys(None, shard)
        for number, line in enumerate(lines):
            if keys.key(RawLine(number + 1, line)) is not None:
                found[number].append(shard.index)
    return found


def raw(count):
    return [b'{"id":%d,"prompt":"number %d"}' % (i, i) for i in range(count)]


@pytest.mark.parametrize("text", ["", "3", "0/4", "5/4", "1/0", "-1/4", "1/4/2", "a/b", "1.5/4", "²/4", "1/999999999"])
def test_what_is_no_shard(text):
    with pytest.raises(UsageError, match="--shard"):
        Shard.parse(text)


def test_parse():
    assert Shard.parse("3/8") == Shard(3, 8) and str(Shard.parse(" 1/1 ")) == "1/1"


def test_each_line_is_in_one_shard_and_they_are_about_equal():
    found = parts(raw(10_000), 8)
    assert all(len(each) == 1 for each in found)
    counts = Counter(each[0] for each in found)
    assert len(counts) == 8 and all(1100 < count < 1400 for count in counts.values()), counts


def test_a_line_keeps_its_shard_wherever_it_stands():
    lines = raw(500)
    before = dict(zip(lines, parts(lines, 5), strict=True))
    random.Random(1).shuffle(lines)
    lines = raw(3)[:1] + lines[100:]
    assert all(before[line] == part for line, part in zip(lines, parts(lines, 5), strict=True))


def test_releases_agree_on_the_split():
    lines = raw(50)
    digests = [hashlib.blake2b(line, digest_size=16).digest() for line in lines]
    assert parts(lines, 6) == [[int.from_bytes(digest[8:], "little") % 6 + 1] for digest in digests]


def test_equal_lines_are_in_one_shard():
    assert len({tuple(each) for each in parts([b'{"prompt":"same"}'] * 50, 7)}) == 1


def test_a_picture_does_not_decide(tmp_path):
    """Shards may run on machines where copies of a picture have different times."""
    line = [b'{"prompt":"what?","images":["p.png"]}']
    digests, found = set(), set()
    for content in (b"", b"x"):
        (tmp_path / "p.png").write_bytes(content)
        for shard in shards(3):
            keys = LineKeys(tmp_path, shard)
            if keys.key(RawLine(1, line[0])) is not None:
                found.add(shard)
            digests.add(keys.digest())
    assert len(found) == 1 and len(digests) == 1


def test_shards_are_jobs_of_their_own_and_make_the_whole(job):
    lines = [*many(60), b"broken", {"prompt": "same"}, {"prompt": "same"}, b""]
    job.write(lines)
    answered, numbers, ends = Counter(), [], set()
    for shard in shards(4):
        job.target = job.source.with_name(f"out.{shard.index}.jsonl")
        job.interrupt(after=3, shard=shard)
        done = len(job.lines)
        summary = job.run(shard=shard)
        assert done == 3 and summary.lines == len(job.lines) == done + sum(job.answered.values()) + summary.num_errors
        answered.update(line.get("id") for line in job.lines)
        records = read_journal(journal_path(job.target)).records
        numbers += records["line"][records["kind"] == Kind.RESULT].tolist()
        assert records[-1]["kind"] == Kind.END
        ends.add((int(records[-1]["line"]), records[-1]["key"].tobytes()))
        again = run_batch(BatchOptions(job.source, job.target, job.model, shard=shard), no_backend)
        assert again.is_complete and again.lines == summary.lines
    assert sorted(numbers) == list(range(1, 64))  # of the whole input
    assert all(answered[i] == 1 for i in range(60)) and len(ends) == 1 and ends.pop()[0] == 63


def test_an_output_belongs_to_its_shard(job):
    job.write(many(10))
    job.run(shard=Shard(1, 2))
    for other in (Shard(2, 2), Shard(1, 3), None):
        with pytest.raises(WriteError, match="shard was '1/2'"):
            run_batch(BatchOptions(job.source, job.target, job.model, shard=other), no_backend)


def test_a_shard_may_be_empty(job):
    job.write(many(1))
    for shard in shards(3):
        job.target = job.source.with_name(f"out.{shard.index}.jsonl")
        job.run(shard=shard)
    records = [read_journal(journal_path(job.source.with_name(f"out.{i}.jsonl"))).records for i in (1, 2, 3)]
    assert all(each[-1]["kind"] == Kind.END and each[-1]["line"] == 1 for each in records)


def test_repeated_ids_within_a_shard_are_errors(job):
    job.write([{"id": 1, "prompt": "same"}] * 3)
    counts = []
    for shard in shards(2):
        job.target = job.source.with_name(f"out.{shard.index}.jsonl")
        counts.append(dict(job.run(shard=shard).errors))
    assert sorted(counts, key=len) == [{}, {"duplicate_id": 2}]


class TestMovedLines:
    """The journal says where lines stand now, so that merge can put them in order."""

    def numbers(self, job):
        contents = read_journal(journal_path(job.target))
        results = contents.records[contents.records["kind"] == Kind.RESULT]
        raw = job.target.read_bytes()
        return {
            json.loads(raw[row["offset"] : row["offset"] + row["length"]])["id"]: int(row["line"]) for row in results
        }

    @pytest.mark.parametrize("new", [0, 2])
    def test_after_a_move(self, job, new):
        job.write(many(8))
        job.run()
        before = job.target.read_bytes()
        lines = many(8 + new)
        random.Random(3).shuffle(lines)
        job.write(lines)
        job.run()
        assert self.numbers(job) == {line["id"]: number for number, line in enumerate(lines, 1)}
        assert job.target.read_bytes().startswith(before) and len(job.answered) == new
        job.run()
        assert not job.answered

    def test_lines_that_left_have_no_number(self, job):
        job.write(many(5))
        job.run()
        job.write(many(3))
        job.run()
        assert self.numbers(job) == {0: 1, 1: 2, 2: 3, 3: 0, 4: 0}
        job.write(many(5))
        job.run()
        assert not job.answered and self.numbers(job)[4] == 5

    def test_order_may_be_asked_for_later(self, job):
        job.write(many(9))
        job.run()
        job.run(in_order=True)
        assert [line["id"] for line in job.lines] == list(range(9)) and not job.answered
        before = journal_path(job.target).read_bytes()
        job.run(in_order=True, state=StateOptions())
        assert journal_path(job.target).read_bytes() == before
