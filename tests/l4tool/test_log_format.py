"""What commands say to programs and to cron: JSON lines, quiet, environment variables."""

import json
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest

from l4tool import main as main_module
from l4tool.core import console, errors

SCRIPT = Path(sys.executable).with_name("l4tool")


def l4tool(*arguments, **variables):
    env = {"PATH": os.environ["PATH"], **variables}  # as empty as cron's
    return subprocess.run([SCRIPT, *map(str, arguments)], capture_output=True, text=True, env=env)


@pytest.fixture
def as_json():
    console.configure(is_json=True)
    yield
    console.configure(is_json=False, is_quiet=False)


def test_notes_progress_and_errors_are_one_object_per_line(as_json, capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: clock[0])
    console.note("two\nlines", "summary", lines=3)
    with console.Progress("batch", 100, unit="lines") as progress:
        for second in range(100):
            clock[0] = float(second)
            progress.advance(1, lambda: "in 5 tok/s")
    console.report_error("no such file", "look again", 66)
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line["event"] for line in lines] == ["summary", "progress", "progress", "progress", "error"]
    assert all(line["ts"].endswith("+00:00") and line["level"] in ("info", "error") for line in lines)
    assert lines[0]["message"] == "two\nlines" and lines[0]["lines"] == 3
    assert (lines[1]["done"], lines[1]["total"], lines[1]["unit"]) == (31, 100, "lines")
    assert lines[-1]["exit_code"] == 66 and lines[-1]["hint"] == "look again"


@pytest.mark.parametrize("arguments", [["batch", "x", "y", "--model", "/nowhere"], ["batch"], ["nonsense"]])
def test_errors_as_json(arguments):
    done = l4tool(*arguments, L4TOOL_LOG_FORMAT="json")
    (line,) = [json.loads(text) for text in done.stderr.splitlines()]
    assert line["event"] == "error" and line["exit_code"] == done.returncode != 0


def test_a_whole_run_as_json(tmp_path, scout_tiny):
    (tmp_path / "in.jsonl").write_text('{"id": 1, "prompt": "hi", "max_tokens": 1}\nbad\n')
    arguments = ["batch", tmp_path / "in.jsonl", tmp_path / "out.jsonl", "--model", scout_tiny, "--log-format", "json"]
    done = l4tool(*arguments)
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert done.returncode == 3 and lines[-1]["event"] == "summary" and lines[-1]["exit_code"] == 3
    assert lines[-1]["summary"]["ok"] == 1 and lines[-1]["summary"]["errors_by_code"] == {"invalid_json": 1}
    again = l4tool(*arguments, "--quiet")
    assert again.returncode == 3 and again.stderr == ""


def test_every_option_of_every_command_is_also_a_variable():
    for name in main_module.COMMANDS:
        text = " ".join(l4tool(name, "--help").stdout.split())
        command = main_module.cli.get_command(click.Context(main_module.cli), name)
        for param in command.params:
            if isinstance(param, click.Option):
                own = f"L4TOOL_{name}_{param.name}".upper()
                assert (param.envvar or own) in text.replace(" ", ""), (name, param.name)


def test_options_from_the_environment(tmp_path, scout_tiny):
    """A value, a flag and a repeatable option; the command line wins over the environment."""
    (tmp_path / "in.jsonl").write_text('{"id": 1, "prompt": "hi"}\n')
    (tmp_path / "out.jsonl").write_text("old")
    variables = {
        "L4TOOL_BATCH_MODEL": str(scout_tiny), "L4TOOL_BATCH_MAX_TOKENS": "2", "L4TOOL_BATCH_FORCE": "1",
        "L4TOOL_BATCH_STOP": "aaa bbb", "L4TOOL_BATCH_ERRORS": str(tmp_path / "errors.jsonl"),
    }  # fmt: skip
    done = l4tool("batch", tmp_path / "in.jsonl", tmp_path / "out.jsonl", "--temperature", 0, **variables)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out.jsonl").read_text())["usage"]["completion_tokens"] <= 2
    assert (tmp_path / "errors.jsonl").exists()
    del variables["L4TOOL_BATCH_FORCE"]
    changed = l4tool(
        "batch", tmp_path / "in.jsonl", tmp_path / "out.jsonl", "--temperature", 0, "--stop", "x", **variables
    )
    assert changed.returncode == errors.EXIT_CANT_WRITE and "stop was ['aaa', 'bbb'], is ['x']" in changed.stderr
    bad = l4tool("batch", "a", "b", **variables | {"L4TOOL_BATCH_MAX_TOKENS": "many"})
    assert bad.returncode == errors.EXIT_USAGE and "--max-tokens" in bad.stderr and "many" in bad.stderr
