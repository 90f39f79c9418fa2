import pytest

from l4tool.core.errors import CheckpointError, InputMissing, UsageError
from l4tool.hub.client import RemoteFile, Snapshot
from l4tool.hub.selection import check_paths, wanted_files


def snapshot(*paths):
    files = tuple(RemoteFile(path, 1, "a" * 64 if path.endswith("s") else None, "b" * 40) for path in paths)
    return Snapshot("org/name", "c" * 40, files, False, {})


def paths(snap, *args, **kwargs):
    return {file.path for file in wanted_files(snap, *args, **kwargs)}


HF = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "chat_template.jinja",
    "LICENSE",
    "USE_POLICY.md",
    "README.md",
)
META = ("original/consolidated.00.pth", "original/params.json", "original/tokenizer.model")
REST = (".gitattributes", "pytorch_model.bin", "model.gguf", "onnx/model.onnx", "a.png", "l4tool-manifest.json")


def test_layouts_are_told_apart():
    repo = snapshot(*HF, *META, *REST)
    assert paths(repo) == set(HF)
    assert paths(repo, "meta") == {*META, "LICENSE", "USE_POLICY.md", "README.md"}


def test_meta_repository_without_a_folder():
    repo = snapshot(
        "consolidated.00.pth", "fp8_scales_0.pt", "params.json", "tokenizer.model", "checklist.chk", "LICENSE"
    )
    assert paths(repo, "meta") == {file.path for file in repo.files}
    with pytest.raises(InputMissing) as error:
        wanted_files(snapshot("consolidated.00.pth"), "hf")
    assert "--layout meta" in error.value.hint


def test_patterns():
    repo = snapshot(*HF, *META)
    assert paths(repo, include=["config.json"]) == {"config.json", "LICENSE", "USE_POLICY.md", "README.md"}
    assert paths(repo, include=["original/"], exclude=["LICENSE", "*.md"]) == set(META)
    assert paths(repo, exclude=["*.safetensors"]) == set(HF) - {"model.safetensors"}
    with pytest.raises(InputMissing):
        wanted_files(repo, include=["nothing*"])
    with pytest.raises(UsageError):
        wanted_files(repo, "gguf")


def test_weights_come_last():
    assert [file.path for file in wanted_files(snapshot("model.safetensors", "z.json"))] == [
        "z.json",
        "model.safetensors",
    ]


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", "../x", "a/../../x", "a//b", "", ".", "a\\..\\b", "a\0b", "a\nb", ".l4tool-fetch/done.jsonl",
     ".l4tool.lock", ".L4Tool.lock", "x.part", "x.PART", "x.part.ledger", "x" * 300, "\udc80"],
)  # fmt: skip
def test_unsafe_paths_are_refused(path):
    with pytest.raises(CheckpointError) as error:
        check_paths(["fine", path])
    assert "--exclude" in error.value.hint


@pytest.mark.parametrize("pair", [("a.json", "A.json"), ("\u00e9", "e\u0301"), ("a", "a/b"), ("A", "a/b/c")])
def test_names_that_collide(pair):
    with pytest.raises(CheckpointError):
        check_paths(pair)


def test_exclude_gets_past_an_unsafe_path():
    assert paths(snapshot("config.json", "x.part"), exclude=["*.part"]) == {"config.json"}
