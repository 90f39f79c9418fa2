"""Who is under the Llama 4 licence, and how it is accepted: at a terminal, by flag, by environment, once."""

import json
import os
import pty
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from l4tool.core import licence
from l4tool.core.errors import AccessDenied

ROOT = Path(__file__).resolve().parents[2]
REPO = "meta-llama/Llama-4-Scout-17B-16E-Instruct"
META_CARD = {"license": "other", "license_name": "llama4", "base_model": ["meta-llama/Llama-4-Scout-17B-16E"]}
LICENCE_TITLE = "LLAMA 4 COMMUNITY LICENSE AGREEMENT\n\nLlama 4 Version Effective Date: April 5, 2025\n"


def test_the_notice_word_for_word():
    assert licence.NOTICE == (
        "Llama 4 is licensed under the Llama 4 Community License, Copyright © Meta Platforms, Inc. All Rights Reserved."
    )


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"card": META_CARD}, True),
        ({"card": {"license": "llama4"}}, True),
        ({"card": {"license": ["llama4"]}}, True),
        ({"card": {"license": "Other", "license_name": "Llama-4-Community"}}, True),
        ({"card": {"license": "apache-2.0"}, "llama_architecture": True}, False),
        ({"card": {"license": "other", "license_name": "our-own"}, "llama_architecture": True}, False),
        ({"card": {"license": "llama3.1"}, "repo_id": "meta-llama/Llama-3.1-8B"}, False),
        ({"card": {"license": "other", "license_name": "llama40"}}, False),
        # relabelled derivatives
        ({"card": {"license": "apache-2.0", "base_model": REPO}}, True),
        ({"card": {"license": "mit", "base_model": ["org/else", REPO]}}, True),
        ({"card": {"license": "mit"}, "repo_id": REPO}, True),
        ({"card": {"license": "mit"}, "licence_text": LICENCE_TITLE}, True),
        ({"card": {"license": "mit", "base_model": "org/model"}}, False),
        # nothing in the card
        ({"card": {}, "licence_text": LICENCE_TITLE}, True),
        ({"card": {}, "licence_text": "Apache License 2.0", "llama_architecture": True}, False),
        ({"card": {}, "llama_architecture": True}, True),
        ({"card": {"license": "unknown"}, "llama_architecture": True}, True),
        ({"card": {}, "repo_id": "meta-llama/Something-New"}, True),
        ({"card": {}, "repo_id": "someone/My-Llama-4-tune"}, True),
        ({"card": {}, "repo_id": "someone/else"}, False),
        ({"card": {"license": None, "base_model": None, "license_name": 4}}, False),
    ],
)
def test_is_llama(said, expected):
    assert licence.is_llama(**said) is expected


@pytest.mark.parametrize(
    "block",
    ["license: other\nlicense_name: llama4\nlanguage:\n- en\n- de\n", "license: apache-2.0\n", "tags: [a, 'b: c']\n"],
)
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_front_matter_is_read_as_the_hub_reads_it(block, newline):
    text = f"---\n{block}---\n# Title\n\n---\nnot: this\n---\n".replace("\n", newline)
    assert licence.front_matter(text) == ModelCard(text).data.to_dict()


@pytest.mark.parametrize(
    "text",
    [
        "", "# no front matter\n", "---\n", "---\nlicense: [\n---\n", "---\n- a list\n---\n", "---\nplain text\n---\n",
        "---\na: 2025-13-45\n---\n", "---\nx: !!python/object:os.system {}\n---\n", "---\n\x00\n---\n", "---\n---\n",
        "---\na: " + "[" * 5000 + "\n---\n",
    ],
)  # fmt: skip
def test_broken_front_matter_says_nothing(text):
    assert licence.front_matter(text) == {}


def test_gate_says_what_matters():
    text = licence.gate_text(REPO)
    for words in (REPO, licence.NAME, "Meta Platforms", licence.LICENCE_URL, "European Union", "700 million"):
        assert words in text
    assert licence.POLICY_URL in text and licence.BUILT_WITH in text


@pytest.fixture
def config(tmp_path, monkeypatch):
    """An empty config directory, no answer in the environment, and nobody at a terminal."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv(licence.ACCEPT_ENV, raising=False)
    monkeypatch.setattr("sys.stdin", open(os.devnull))
    return tmp_path / "config" / "l4tool" / licence.ACCEPTED_FILE


def test_nobody_to_ask(config, capsys):
    with pytest.raises(AccessDenied) as error:
        licence.accept(REPO, asked=False)
    assert error.value.exit_code == 77 and "--accept-license" in error.value.hint
    captured = capsys.readouterr()
    assert "European Union" in captured.err and captured.out == "" and not config.exists()


def test_accepted_once_and_for_all_repositories(config, capsys):
    licence.accept(REPO, asked=True)
    assert capsys.readouterr().err.count("European Union") == 1
    assert json.loads(config.read_text())["llama4"]["repo"] == REPO
    licence.accept("meta-llama/Llama-4-Maverick-17B-128E", asked=False)
    assert capsys.readouterr().err == ""


def test_accepted_by_environment(config, capsys, monkeypatch):
    for value in ("0", "", "no"):
        monkeypatch.setenv(licence.ACCEPT_ENV, value)
        with pytest.raises(AccessDenied):
            licence.accept(REPO, asked=False)
    monkeypatch.setenv(licence.ACCEPT_ENV, "1")
    licence.accept(REPO, asked=False)
    assert config.exists() and f"accepted by {licence.ACCEPT_ENV}" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"not json", b"[]", b'{"llama3": {}}', b"\xff\xfe"])
def test_unreadable_memory_asks_again(config, content):
    config.parent.mkdir(parents=True)
    config.write_bytes(content)
    with pytest.raises(AccessDenied):
        licence.accept(REPO, asked=False)
    licence.accept(REPO, asked=True)
    licence.accept(REPO, asked=False)
    assert ("llama3" in json.loads(config.read_text())) == (b"llama3" in content)


def test_a_home_that_cannot_be_written(tmp_path, config, capsys, monkeypatch):
    """A file where the folder should be: root could write into any read-only folder."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "file"))
    licence.accept(REPO, asked=True)
    assert "cannot be remembered" in capsys.readouterr().err
    with pytest.raises(AccessDenied):
        licence.accept(REPO, asked=False)


def test_relative_config_home_is_ignored(tmp_path, config, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    licence.accept(REPO, asked=True)
    assert (tmp_path / ".config" / "l4tool" / licence.ACCEPTED_FILE).is_file()


def test_no_home_at_all(config, capsys, monkeypatch):
    monkeypatch.delenv("XDG_CONFIG_HOME")

    def home():
        raise RuntimeError("no home")

    monkeypatch.setattr(Path, "home", home)
    licence.accept(REPO, asked=True)
    assert "cannot be remembered" in capsys.readouterr().err


def test_many_at_once(config):
    threads = [threading.Thread(target=licence.accept, args=(REPO, True)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert json.loads(config.read_text()).keys() == {"llama4"}
    assert [path.name for path in config.parent.iterdir()] == [licence.ACCEPTED_FILE]


CODE = """
import sys
from l4tool.core import licence
from l4tool.core.errors import L4Error
try:
    licence.accept(sys.argv[1], False)
except L4Error as error:
    print(error.message)
    sys.exit(error.exit_code)
"""


@pytest.mark.parametrize(
    ("answer", "code"), [(b"y\n", 0), (b"YES\n", 0), (b"n\n", 77), (b"\n", 77), (b"what?\n", 77), (b"\x04", 77)]
)
def test_asked_at_a_terminal(config, answer, code):
    """A real pseudo-terminal; stdout is a pipe and stays free of the question."""
    master, slave = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-c", CODE, REPO], stdin=slave, stderr=slave, stdout=subprocess.PIPE, cwd=ROOT
    )
    os.close(slave)
    shown = b""
    while b"[y/N]" not in shown:
        shown += os.read(master, 4096)
    os.write(master, answer)
    out, _ = child.communicate(timeout=60)
    os.close(master)
    assert child.returncode == code
    assert b"European Union" in shown
    assert (b"was not accepted" in out) == (code == 77) and b"[y/N]" not in out
    assert config.exists() == (code == 0)
