"""Sizes, atomic files, tables."""

import os
import resource
import subprocess
import sys

import pytest

from l4tool.core import atomic, console
from l4tool.core.errors import UsageError, WriteError
from l4tool.core.sizes import format_bytes, format_duration, parse_bytes


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("8GiB", 8 << 30),
        ("500MB", 500_000_000),
        ("4G", 4 << 30),
        ("123", 123),
        ("1.5 kib", 1536),
        (" 2TB ", 2 * 10**12),
    ],
)
def test_parse_bytes(text, num_bytes):
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize("text", ["", "GiB", "8 Gibi", "-1", "1e9", "8GiB8", "nan"])
def test_parse_bytes_refuses(text):
    with pytest.raises(UsageError) as caught:
        parse_bytes(text)
    assert "8GiB" in caught.value.hint


def test_format():
    assert format_bytes(60.4 * 2**30) == "60.4 GiB"
    assert format_bytes(12) == "12 B"
    assert format_duration(4.21) == "4.2 s"
    assert format_duration(185) == "3 min 05 s"
    assert format_duration(7620) == "2 h 07 min"


def test_write_file_replaces_whole(tmp_path):
    path = tmp_path / "a.json"
    atomic.write_file(path, "one")
    atomic.write_file(path, b"two")
    assert path.read_bytes() == b"two"
    assert os.listdir(tmp_path) == ["a.json"]


def test_write_file_mode_follows_umask(tmp_path):
    old = os.umask(0o027)
    try:
        atomic.write_file(tmp_path / "a", "x")
    finally:
        os.umask(old)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_write_file_keeps_the_old_one_when_the_disk_is_full(tmp_path):
    path = tmp_path / "a"
    atomic.write_file(path, "old")
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000));"
        "from pathlib import Path; from l4tool.core.atomic import write_file\n"
        "from l4tool.core.errors import WriteError\n"
        "try: write_file(Path(sys.argv[1]), b'x' * 5000)\n"
        "except WriteError as e: print(e.exit_code, e.hint)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert done.stdout.startswith("73 ") and "ulimit -f" in done.stdout, done.stderr
    assert path.read_text() == "old"
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_write_file_into_nowhere(tmp_path):
    with pytest.raises(WriteError, match="cannot write"):
        atomic.write_file(tmp_path / "no" / "such" / "file", "x")


def test_table_aligns():
    text = console.table([["a", 1], ["long name", 1000]], header=["what", "n"])
    assert text.splitlines() == ["what          n", "---------  ----", "a             1", "long name  1000"]


def test_progress_off_terminal_logs_one_line_per_interval(capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: clock[0])
    with console.Progress("quantize", total=4 << 30) as progress:
        for second in range(1, 100):  # the second interval is twice the first
            clock[0] = float(second)
            progress.advance(1 << 25)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0] == "quantize: 960 MiB of 4 GiB (23 %), 32 MiB/s, ETA 1 min 38 s"
