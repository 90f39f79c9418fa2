"""The checker must find what it is there to find: faults planted in the files of a sound run."""

import json
import shutil
from collections import Counter

import pytest

from batch.job import BatchOptions, run_batch
from batch.journal import Kind, journal_path, read_journal
from tests.batch.job.conftest import EchoBackend
from tests.batch.soak.invariants import Expected, answered_too_often, problems


@pytest.fixture
def sound(tmp_path, scout_tiny):
    """(a complete job's files, what is expected of them): 30 answers, 5 error lines in a file of their own."""
    source = tmp_path / "in.jsonl"
    lines = [json.dumps({"id": i, "prompt": f"number {i}", "max_tokens": 3}) for i in range(30)]
    source.write_text("\n".join([*lines, *(f"broken {i}" for i in range(5))]))
    files = {}
    for name in ("job", "fresh"):
        (tmp_path / name).mkdir()
        files[name] = tmp_path / name / "out.jsonl", tmp_path / name / "errors.jsonl"
        run_batch(BatchOptions(source, files[name][0], scout_tiny, errors=files[name][1], in_order=True), EchoBackend)
    return files["job"], Expected(*files["fresh"], in_order=True)


def test_a_sound_job_has_no_problems(sound):
    files, expected = sound
    assert problems(*files, expected) == []


def lose(out, errors):
    out.write_bytes(b"".join(out.read_bytes().splitlines(True)[:-1]))


def lose_an_error(out, errors):
    errors.write_bytes(b"".join(errors.read_bytes().splitlines(True)[1:]))


def double(out, errors):
    lines = out.read_bytes().splitlines(True)
    out.write_bytes(b"".join([*lines, lines[7]]))


def replace_by_another(out, errors):
    lines = out.read_bytes().splitlines(True)
    out.write_bytes(b"".join([*lines[:4], lines[3], *lines[5:]]))


def alter(out, errors):
    out.write_bytes(out.read_bytes().replace(b"length", b"lenght", 1))


def tear(out, errors):
    out.write_bytes(out.read_bytes() + b'{"id": 31, "te')


def cut(out, errors):
    out.write_bytes(out.read_bytes()[:-1])


def reorder(out, errors):
    first, second, *others = out.read_bytes().splitlines(True)
    out.write_bytes(b"".join([second, first, *others]))


def swap(out, errors):
    shutil.move(out, out.with_name("x"))
    shutil.move(errors, out)
    shutil.move(out.with_name("x"), errors)


def no_end(out, errors):
    path = journal_path(out)
    path.write_bytes(path.read_bytes()[:-96])


def torn_journal(out, errors):
    path = journal_path(out)
    path.write_bytes(path.read_bytes() + b"x" * 20)


def no_journal(out, errors):
    journal_path(out).unlink()


def other_journal(out, errors):
    contents = read_journal(journal_path(out))
    records = contents.records[::-1].copy()
    assert records[0]["kind"] == Kind.END
    raw = journal_path(out).read_bytes()
    journal_path(out).write_bytes(raw[: contents.start] + records.tobytes())


def leave_part(out, errors):
    out.with_name("out.jsonl.part").write_bytes(b"")


FAULTS = [
    (lose, "missing"), (lose_an_error, "missing"), (double, "too many"), (replace_by_another, "missing"),
    (alter, "altered"), (tear, "torn"), (cut, "torn"), (reorder, "order"), (swap, "missing"),
    (no_end, "does not say"), (torn_journal, "torn end"), (no_journal, "no journal"), (other_journal, "differ"),
    (leave_part, "left behind"),
]  # fmt: skip


@pytest.mark.parametrize(("plant", "words"), FAULTS, ids=[plant.__name__ for plant, _ in FAULTS])
def test_planted_faults_are_found(sound, plant, words):
    files, expected = sound
    plant(*files)
    assert words in "\n".join(problems(*files, expected))


def test_what_differs_between_any_two_runs_is_no_problem(sound):
    """The time in `created` differs; where lines moved, also their numbers."""
    (out, errors), expected = sound
    text = errors.read_text()
    errors.write_text(text.replace('"line":31', '"line":91'))
    assert "missing" in "\n".join(problems(out, errors, expected))
    moved = Expected(expected.output, expected.errors, in_order=True, moved=True)
    assert not [found for found in problems(out, errors, moved) if "missing" in found or "altered" in found]


def test_answers_that_were_generated_again_are_counted(tmp_path):
    log = tmp_path / "log"
    log.write_text("a\nb\nb\nc\nc\n")
    needed = Counter("abcc")
    assert answered_too_often(log, needed, 1) == []
    assert "1 answers were generated again; at most 0" in answered_too_often(log, needed, 0)[0]
    assert "nobody generated" in answered_too_often(log, Counter("abccd"), 5)[0]
