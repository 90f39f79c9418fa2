"""The table of exit codes, code by code, as a shell sees it. 77 is tested with the remote inputs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from batch.journal import Journal
from tests import checkpoints

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = """
import os, sys
import batch.job as job
from l4tool.main import main
from tests.batch.job.conftest import EchoBackend

class Failing(EchoBackend):
    def run(self, source):
        for count, result in enumerate(super().run(source)):
            if count == 2:
                raise ERROR
            yield result

ERROR = {
    "none": None, "device": RuntimeError("CUDA error: an illegal memory access\\nmore"), "memory": MemoryError(),
    "bug": NameError("ours"),
}[sys.argv[1]]
job.run_batch.__defaults__ = (Failing if ERROR else EchoBackend, *job.run_batch.__defaults__[1:])
sys.exit(main(["batch", *sys.argv[2:]]))
"""


def batch(*arguments, fails="none", **options):
    command = [sys.executable, "-c", SCRIPT, fails, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **options)
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture
def files(tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text("".join(f'{{"id": {i}, "prompt": "{i}"}}\n' for i in range(9)))
    return source, tmp_path / "out.jsonl"


def test_0_and_nothing_to_do(files, scout_tiny):
    assert batch(*files, "--model", scout_tiny).returncode == 0
    again = batch(*files, "--model", scout_tiny)
    assert again.returncode == 0 and "nothing to do: all 9 lines" in again.stderr


def test_3_also_when_there_is_nothing_to_do(files, scout_tiny):
    with open(files[0], "a") as file:
        file.write("not json\n")
    assert batch(*files, "--model", scout_tiny).returncode == 3
    again = batch(*files, "--model", scout_tiny)
    assert again.returncode == 3 and "nothing to do" in again.stderr
    early = batch(files[0], files[1].with_name("o2"), "--model", scout_tiny, "--max-errors", 0)
    assert early.returncode == 3 and "more than --max-errors allows" in early.stderr


def test_64(files, scout_tiny):
    assert batch(files[0], files[0], "--model", scout_tiny).returncode == 64
    assert batch(*files, "--model", scout_tiny, "--shard", "9/3").returncode == 64


def test_65(files, scout_tiny, tmp_path):
    model = checkpoints.copy(scout_tiny, tmp_path / "model")
    (model / "generation_config.json").write_text('{"temperature": "warm"}')
    assert batch(*files, "--model", model).returncode == 65


def test_66(files, scout_tiny, tmp_path):
    assert batch(tmp_path / "none.jsonl", files[1], "--model", scout_tiny).returncode == 66


@pytest.mark.parametrize(("kind", "words"), [("device", "illegal memory access"), ("memory", "out of memory")])
def test_69_when_the_device_goes_away_and_it_carries_on(files, scout_tiny, kind, words):
    done = batch(*files, "--model", scout_tiny, fails=kind)
    assert done.returncode == 69 and words in done.stderr and "more" not in done.stderr.splitlines()
    assert len(files[1].read_text().splitlines()) == 2
    assert batch(*files, "--model", scout_tiny).returncode == 0
    assert sorted(json.loads(line)["id"] for line in files[1].read_text().splitlines()) == list(range(9))


def test_70_is_kept_for_our_own_bugs(files, scout_tiny):
    assert batch(*files, "--model", scout_tiny, fails="bug").returncode == 70


def test_73(files, scout_tiny, tmp_path):
    assert batch(files[0], tmp_path / "no" / "out", "--model", scout_tiny).returncode == 73
    files[1].write_text("precious\n")
    assert batch(*files, "--model", scout_tiny).returncode == 73


def test_73_with_a_real_limit_and_it_carries_on(files, scout_tiny):
    """`ulimit -f`, which no wrapped call stands in for."""
    import resource

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    done = batch(*files, "--model", scout_tiny, preexec_fn=limited)
    assert done.returncode == 73 and "ulimit" in done.stderr
    assert batch(*files, "--model", scout_tiny).returncode == 0
    assert sorted(json.loads(line)["id"] for line in files[1].read_text().splitlines()) == list(range(9))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_73_on_a_full_device(files, scout_tiny):
    done = batch(files[0], "/dev/full", "--model", scout_tiny)
    assert done.returncode == 73 and "No space left" in done.stderr


def test_75(files, scout_tiny):
    held = Journal(Path(f"{files[1]}.journal"))
    try:
        assert batch(*files, "--model", scout_tiny).returncode == 75
    finally:
        held.close()
        os.unlink(held.path)


def test_a_file_that_changes_while_it_is_read(files, scout_tiny):
    """The first look and the second must see the same lines, or a line would be put on record under another's name."""
    from batch.first_look import InputChanged
    from batch.jsonl import LineReader
    from batch.line_keys import LineKeys
    from batch.state import RunState, StateOptions

    state = RunState(files[1], None, {}, StateOptions())
    keys = LineKeys(files[0].parent)
    try:
        with open(files[0], "rb") as file:
            assert state.meet(LineReader(file), keys) == 9
        files[0].write_text(files[0].read_text().replace('"prompt": "3"', '"prompt": "x"'))
        with open(files[0], "rb") as file, pytest.raises(InputChanged, match="line 4"):
            list(state.wanted(LineReader(file), keys))
    finally:
        state.close()
