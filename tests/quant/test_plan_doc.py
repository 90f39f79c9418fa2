"""The examples in docs/plan.md are what the command prints."""

import re
from pathlib import Path

import pytest

from l4tool.main import main
from tests.converters import published
from tests.quant.test_outlook import sparse

DOC = (Path(__file__).resolve().parents[2] / "docs" / "plan.md").read_text()
EXAMPLES = re.findall(r"```\n\$ l4tool (plan [^\n]*)\n(.*?)```", DOC, re.DOTALL)
CONFIGS = {"Llama-4-Scout-17B-16E": published.scout, "Llama-4-Maverick-17B-128E": published.maverick}


def test_there_are_examples():
    assert len(EXAMPLES) == 3


@pytest.mark.parametrize(("line", "shown"), EXAMPLES, ids=[line for line, _ in EXAMPLES])
def test_an_example(line, shown, tmp_path, monkeypatch, capsys):
    name = line.split()[1]
    sparse(tmp_path / name, CONFIGS[name]())
    monkeypatch.chdir(tmp_path)
    assert main(line.split()) == 0
    assert capsys.readouterr().out == shown
