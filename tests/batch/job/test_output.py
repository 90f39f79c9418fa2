"""The output file keeps whole lines when the disk does not."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from batch.output import OutputFile
from l4tool.core.errors import WriteError

ROOT = Path(__file__).resolve().parents[3]


def test_lines_are_in_the_file_at_once(tmp_path):
    output = OutputFile(tmp_path / "out")
    output.write(b"one\n")
    assert (tmp_path / "out").read_bytes() == b"one\n"
    output.write(b"two\n")
    output.close()
    output.close()
    assert (tmp_path / "out").read_bytes() == b"one\ntwo\n"


def test_a_full_disk_cuts_back_to_whole_lines(tmp_path):
    """RLIMIT_FSIZE stands for the full disk: the kernel writes part of a line, then fails."""
    path = tmp_path / "out"
    script = (
        "import sys; from batch.output import OutputFile; from l4tool.core.errors import WriteError\n"
        f"output = OutputFile(__import__('pathlib').Path({str(path)!r}))\n"
        "try:\n"
        "    while True: output.write(b'x' * 299 + b'\\n')\n"
        "except WriteError as error:\n"
        "    print(error.exit_code, error.message, error.hint)\n"
    )

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, preexec_fn=limit, capture_output=True, text=True)
    assert done.stdout.startswith("73 ") and "whole" in done.stdout and "ulimit" in done.stdout, done.stderr
    assert path.read_bytes() == (b"x" * 299 + b"\n") * 3


def test_no_space_left_is_a_write_error():
    output = OutputFile(Path("/dev/full"))
    with pytest.raises(WriteError, match="No space left"):
        output.write(b"x\n")


def test_a_signal_within_a_write_cuts_back(tmp_path, monkeypatch):
    import os

    output = OutputFile(tmp_path / "out")
    output.write(b"whole\n")
    real = os.write

    def half(fd, data):
        real(fd, bytes(data)[: len(data) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr("batch.output.os.write", half)
    with pytest.raises(KeyboardInterrupt):
        output.write(b"interrupted\n")
    monkeypatch.undo()
    assert (tmp_path / "out").read_bytes() == b"whole\n"
    output.write(b"next\n")
    assert (tmp_path / "out").read_bytes() == b"whole\nnext\n"


def test_start_keeps_what_it_is_told(tmp_path):
    path = tmp_path / "out"
    path.write_bytes(b"one\ntorn")
    output = OutputFile(path)
    assert output.found_bytes() == 8 and path.read_bytes() == b"one\ntorn"  # opening changes nothing
    output.start(4)
    output.write(b"two\n")
    assert output.read(4, 4) == b"two\n"
    output.close()
    assert path.read_bytes() == b"one\ntwo\n"


def test_discarding_only_what_this_run_made(tmp_path):
    OutputFile(tmp_path / "out").close(discard=True)
    assert not (tmp_path / "out").exists()
    (tmp_path / "old").write_bytes(b"")
    OutputFile(tmp_path / "old").close(discard=True)
    assert (tmp_path / "old").exists()


def test_no_permission(tmp_path):
    with pytest.raises(WriteError, match="cannot write"):
        OutputFile(tmp_path / "missing" / "out")
