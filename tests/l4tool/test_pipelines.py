"""docs/pipelines.md is run, not believed: its examples as they stand there, with this machine's paths in them."""

import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(sys.executable).with_name("l4tool")
PAGE = (Path(__file__).resolve().parents[2] / "docs" / "pipelines.md").read_text()
CRON = {"HOME": "/nonexistent", "LOGNAME": "nobody", "PATH": "/usr/bin:/bin", "SHELL": "/bin/sh"}


def block(heading: str, number: int = 0) -> str:
    """The `number`-th code block of a section."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"```\w*\n(.*?)```", section, re.DOTALL)[number]


def here(text: str, tmp_path: Path, model: Path) -> str:
    """An example with this machine's places."""
    text = text.replace("/opt/l4tool/bin/l4tool", str(SCRIPT)).replace("/models/Llama-4-Scout-INT4", str(model))
    return text.replace("/data/", f"{tmp_path}/")


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_requests(path: Path, count: int) -> None:
    path.write_text("".join(f'{{"id": {i}, "prompt": "number {i}", "max_tokens": 2}}\n' for i in range(count)))


def test_crontab(tmp_path, scout_tiny):
    """What cron does: its own variables, those of the table, and the line by /bin/sh."""
    table = here(block("cron"), tmp_path, scout_tiny).splitlines()
    settings = dict(line.split("=", 1) for line in table if re.match(r"\w+=", line))
    (job,) = [line for line in table if re.match(r"[*\d]", line)]
    shell = job.split(None, 5)[5]
    for name in ("inbox", "outbox", "errors"):
        (tmp_path / name).mkdir()
    write_requests(tmp_path / "inbox" / "a.jsonl", 5)

    def tick():
        return subprocess.run(["/bin/sh", "-c", shell], env=CRON | settings, cwd="/", capture_output=True, text=True)

    for _ in range(2):  # the second has nothing to do
        done = tick()
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert sorted(line["id"] for line in lines(tmp_path / "outbox" / "a.jsonl")) == list(range(5))
    write_requests(tmp_path / "inbox" / "b.jsonl", 2)
    assert tick().returncode == 0 and len(lines(tmp_path / "outbox" / "b.jsonl")) == 2


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_units(tmp_path, scout_tiny):
    for number, name in enumerate(("l4tool-batch.service", "l4tool-batch.timer")):
        text = here(block("systemd", number), tmp_path, scout_tiny).replace("User=l4tool", "User=root")
        (tmp_path / name).write_text(text)
    units = [tmp_path / "l4tool-batch.service", tmp_path / "l4tool-batch.timer"]
    done = subprocess.run(["systemd-analyze", "verify", *units], capture_output=True, text=True)
    ours = [line for line in (done.stdout + done.stderr).splitlines() if "l4tool" in line]
    assert not ours, ours


def test_systemd_command(tmp_path, scout_tiny):
    unit = here(block("systemd"), tmp_path, scout_tiny)
    settings = dict(re.findall(r"^Environment=(\w+)=(.*)$", unit, re.MULTILINE))
    command = re.search(r"^ExecStart=(.*)$", unit, re.MULTILINE).group(1)
    (tmp_path / "inbox").mkdir()
    write_requests(tmp_path / "inbox" / "a.jsonl", 2)
    done = subprocess.run(command.split(), env=CRON | settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["event"] for line in done.stderr.splitlines()][-1] == "summary"


def test_airflow_commands(tmp_path, scout_tiny):
    """No Airflow here: the file is read, and the commands in it run as its BashOperator would."""
    text = here(block("Airflow"), tmp_path, scout_tiny)
    calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call) and node.keywords]
    commands = {}
    for call in calls:
        values = {keyword.arg: keyword.value for keyword in call.keywords}
        if "bash_command" in values:
            env = ast.literal_eval(values["env"])
            commands[values["task_id"].value] = (ast.literal_eval(values["bash_command"]), env)
    assert set(commands) == {"check", "answer"}
    write_requests(tmp_path / "2025-01-01.jsonl", 3)
    with open(tmp_path / "2025-01-01.jsonl", "a") as file:
        file.write("not json\n")
    path = {"PATH": f"{SCRIPT.parent}:{CRON['PATH']}"}
    for command, env in commands.values():
        shell = command.replace("{{ ds }}", "2025-01-01")
        done = subprocess.run(["bash", "-c", shell], env=CRON | path | env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "2025-01-01.summary.json").read_text())["ok"] == 3
    assert len(lines(tmp_path / "2025-01-01.errors.jsonl")) == 1


def test_slurm_array(tmp_path, scout_tiny):
    """Each part as Slurm would start it; the first is told to stop when its time is nearly over, and queued again."""
    (tmp_path / "job.sh").write_text(block("Slurm"))
    write_requests(tmp_path / "in.jsonl", 60)
    env = CRON | {"PATH": f"{SCRIPT.parent}:{CRON['PATH']}", "MODEL": str(scout_tiny), "SLURM_ARRAY_TASK_COUNT": "3"}

    def start(part):
        return subprocess.Popen(["bash", "job.sh"], cwd=tmp_path, env=env | {"SLURM_ARRAY_TASK_ID": str(part)},
                                stderr=subprocess.PIPE, text=True)  # fmt: skip

    first = start(1)
    deadline_s = time.monotonic() + 60
    while time.monotonic() < deadline_s and not (tmp_path / "out.1.jsonl").exists():
        time.sleep(0.01)
    first.send_signal(signal.SIGTERM)
    text = first.communicate(timeout=60)[1]
    assert first.returncode in (0, 143), text
    for part in (1, 2, 3):
        process = start(part)
        text = process.communicate(timeout=120)[1]
        assert process.returncode == 0, text
    merge = block("Slurm", 1)
    done = subprocess.run(["bash", "-c", merge], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [line["id"] for line in lines(tmp_path / "out.jsonl")] == list(range(60))


def test_every_variable_on_the_page_is_an_option():
    from l4tool.commands.batch import command

    known = {f"L4TOOL_BATCH_{param.name}".upper() for param in command.params} | {"L4TOOL_LOG_FORMAT", "L4TOOL_QUIET"}
    assert set(re.findall(r"L4TOOL_\w+", PAGE)) <= known and os.path.exists(SCRIPT)
