"""The console script: help, exit codes, one-line errors, and foreign modules in the working directory."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest

from l4tool import main as main_module
from l4tool.core import errors
from l4tool.core.signals import Terminated

SCRIPT = Path(sys.executable).with_name("l4tool")


def l4tool(*arguments, **options):
    return subprocess.run([SCRIPT, *arguments], capture_output=True, text=True, **options)


def test_help_lists_every_command_and_exit_code():
    text = l4tool("--help").stdout
    for name in main_module.COMMANDS:
        assert re.search(rf"^  {name} ", text, re.MULTILINE)
    codes = {value for name, value in vars(errors).items() if name.startswith("EXIT_")} - {errors.EXIT_INTERNAL}
    for code in codes:
        assert re.search(rf"\b{code}\b", text), code


@pytest.mark.parametrize("name", main_module.COMMANDS)
def test_command_help(name):
    done = l4tool(name, "--help")
    assert done.returncode == 0 and f"Usage: l4tool {name}" in done.stdout


def test_help_is_quick():
    """Not a benchmark: user CPU seconds, so that a busy machine does not matter."""
    before = os.times()
    for name in main_module.COMMANDS:
        l4tool(name, "--help")
    after = os.times()
    per_call_s = (after.children_user - before.children_user) / len(main_module.COMMANDS)
    assert per_call_s < 1.0  # 0.25 s is promised on a quiet machine; importing torch alone takes over 1 s of CPU


@pytest.mark.parametrize("arguments", [["nonsense"], ["--nonsense"], ["batch", "--nonsense"], ["quantize"]])
def test_usage_errors_are_64_without_traceback(arguments):
    done = l4tool(*arguments)
    assert done.returncode == errors.EXIT_USAGE
    assert "Traceback" not in done.stderr and done.stderr.count("Error:") == 1


def test_modules_of_the_same_name_in_the_working_directory_do_no_harm(tmp_path):
    for name in ("batch.py", "quant.py", "converters.py"):
        (tmp_path / name).write_text("raise SystemExit('shadowed')\n")
    (tmp_path / "l4tool").mkdir()
    done = l4tool("batch", "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (errors.WriteError("no room", hint="buy a disk"), 73, "l4tool: no room\n  hint: buy a disk\n"),
        (errors.CheckpointError("bad"), 65, "l4tool: bad\n"),
        (KeyboardInterrupt(), 130, "l4tool: interrupted\n"),
        (Terminated(), 143, "l4tool: terminated\n"),
        (ValueError("a bug"), 70, "l4tool: internal error: ValueError: a bug\n"),
    ],
)
def test_one_catch_point(monkeypatch, capsys, error, code, text):
    @click.command("boom")
    def boom():
        raise error

    monkeypatch.setattr(main_module.LazyGroup, "get_command", lambda self, ctx, name: boom)
    monkeypatch.delenv("L4TOOL_DEBUG", raising=False)
    assert main_module.main(["boom"]) == code
    err = capsys.readouterr().err
    assert err.lstrip("\n").startswith(text) and "Traceback" not in err


def test_sigterm_exits_143(tmp_path):
    code = (
        "import click, sys, time; from l4tool import main as m\n"
        "@click.command()\n"
        "def wait(): print('ready', flush=True); time.sleep(30)\n"
        "m.LazyGroup.get_command = lambda *a: wait\n"
        "sys.exit(m.main(['wait']))"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        time.sleep(0.05)
        process.terminate()
        assert process.wait(10) == 143
        assert b"Traceback" not in process.stderr.read()


DROPPED = """
import os, signal, sys, time
from l4tool import main

class Dropped:
    def __del__(self):
        os.kill(os.getpid(), signal.{name})
        time.sleep(0.05)

def command(**_):
    Dropped()
    {then}

main.cli.main = command
main.run()
"""
GRACEFUL = """
    from l4tool.core.signals import GracefulStop
    with GracefulStop(30):
        time.sleep(20)
"""


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
@pytest.mark.parametrize("then", ["time.sleep(20)", GRACEFUL])
def test_a_signal_that_python_drops_still_counts(name, code, then):
    """In a destructor an exception is only reported; here that is where the signal arrives."""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", DROPPED.format(name=name, then=then)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == code and "Traceback" not in done.stderr and "ignored" not in done.stderr, done.stderr
    assert time.monotonic() - began < 15
