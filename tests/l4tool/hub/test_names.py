import pytest

from l4tool.core.errors import UsageError
from l4tool.hub.names import MODELS, RepoSpec, is_repo, parse_repo


@pytest.mark.parametrize(
    ("text", "repo_id", "revision"),
    [
        ("scout", "meta-llama/Llama-4-Scout-17B-16E", None),
        ("Scout-Instruct@main", "meta-llama/Llama-4-Scout-17B-16E-Instruct", "main"),
        ("maverick-fp8", "meta-llama/Llama-4-Maverick-17B-128E-Instruct-FP8", None),
        ("org/name", "org/name", None),
        ("org/name@refs/pr/1", "org/name", "refs/pr/1"),
        ("o.r-g/na_me.v2@v1.0", "o.r-g/na_me.v2", "v1.0"),
    ],
)
def test_parse(text, repo_id, revision):
    assert parse_repo(text) == RepoSpec(repo_id, revision)


def test_meta_layout_has_its_own_repositories():
    assert parse_repo("scout", "meta").repo_id == "meta-llama/Llama-4-Scout-17B-16E-Original"
    assert parse_repo("org/name", "meta").repo_id == "org/name"


@pytest.mark.parametrize(
    "text",
    ["", "scuot", "name", "a/b/c", "/etc", "../x", "a/..", "org/name@", "org/name@../x", "org/na--me", "org/name.git",
     "org/nam e", "org/name@a b", "org/-x", "https://huggingface.co/org/name"],
)  # fmt: skip
def test_refused(text):
    with pytest.raises(UsageError):
        parse_repo(text)
    assert not is_repo(text)


def test_typo_is_guessed():
    with pytest.raises(UsageError) as error:
        parse_repo("scuot")
    assert "scout" in error.value.hint


def test_hub_accepts_every_name():
    from huggingface_hub.utils import validate_repo_id

    for model in MODELS:
        validate_repo_id(model.repo_id)
        validate_repo_id(model.meta_repo_id)


def test_a_folder_of_that_name_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_repo("org/name") and is_repo("scout")
    (tmp_path / "org/name").mkdir(parents=True)
    (tmp_path / "scout").mkdir()
    assert not is_repo("org/name") and not is_repo("scout")


@pytest.mark.parametrize(
    "address", ["foo", "ftp://hub", "http://", "http://[::1", "http://hub:port", "http://hub:99999"]
)
def test_endpoints_that_are_no_addresses(monkeypatch, address):
    monkeypatch.setenv("HF_ENDPOINT", address)
    with pytest.raises(UsageError, match="HF_ENDPOINT"):
        parse_repo("scout")
