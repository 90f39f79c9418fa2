import hashlib
import json
import os

import pytest

from l4tool.core.errors import CheckpointError, ChecksumError, InputMissing
from l4tool.hub.manifest import (
    MANIFEST,
    Entry,
    Manifest,
    check_file,
    entry_of,
    is_unchanged,
    read_manifest,
    write_manifest,
)

DATA = b"some bytes"
SHA256 = hashlib.sha256(DATA).hexdigest()
GIT = hashlib.sha1(b"blob 10\0" + DATA).hexdigest()


def test_round_trip(tmp_path):
    files = {"a/b": Entry(3, sha256="a" * 64, mtime_ns=5), "c": Entry(0, git_oid="b" * 40)}
    manifest = Manifest("org/name", "c" * 40, "http://x", files, "main", {"layout": "hf"})
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest
    data = json.loads((tmp_path / MANIFEST).read_bytes())
    assert data["repo"] == "org/name" and data["commit"] == "c" * 40 and data["files"]["a/b"]["sha256"] == "a" * 64


def test_no_manifest(tmp_path):
    assert read_manifest(tmp_path) is None


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"repo": "a", "commit": "b", "endpoint": "c", "files": {"a": {}}}',
     '{"repo": "a", "commit": "b", "endpoint": "c", "files": {"a": {"size": 1}}}',
     '{"repo": "a", "commit": "b", "endpoint": "c", "files": {"../a": {"size": 1, "sha256": "x"}}}'],
)  # fmt: skip
def test_unusable_manifest(tmp_path, text):
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(CheckpointError):
        read_manifest(tmp_path)


@pytest.mark.parametrize("entry", [Entry(10, sha256=SHA256), Entry(10, git_oid=GIT)])
def test_check_file(tmp_path, entry):
    path = tmp_path / "f"
    path.write_bytes(DATA)
    check_file(path, entry)
    path.write_bytes(b"Some bytes")
    with pytest.raises(ChecksumError) as error:
        check_file(path, entry)
    assert entry.digest in error.value.message and str(path) in error.value.message
    path.write_bytes(DATA + b"x")
    with pytest.raises(CheckpointError):
        check_file(path, entry)
    path.unlink()
    with pytest.raises(InputMissing):
        check_file(path, entry)
    path.mkdir()
    with pytest.raises((InputMissing, CheckpointError)):
        check_file(path, entry)


def test_change_is_seen_by_mtime(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(DATA)
    entry = entry_of(Entry(10, sha256=SHA256), path)
    assert is_unchanged(path, entry)
    os.utime(path, ns=(1, 1))
    assert not is_unchanged(path, entry) and not is_unchanged(tmp_path / "none", entry)
