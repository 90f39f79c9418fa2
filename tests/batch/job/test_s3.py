"""s3:// against a local S3 server. Skipped without s3fs and moto: `pip install -e '.[remote-test]'`."""

import gzip
import json
from urllib.request import Request, urlopen

import pytest

from batch.job import BatchOptions
from batch.many import run_places
from batch.places import Places
from l4tool.core.errors import InputMissing, L4Error, WriteError
from tests.batch.job.conftest import EchoBackend
from tests.batch.job.test_resume import many, no_backend

s3fs = pytest.importorskip("s3fs", reason="s3fs is not installed (extra remote-test)")
moto = pytest.importorskip("moto.server", reason="moto is not installed (extra remote-test)")


def text(count):
    return b"".join(json.dumps(line).encode() + b"\n" for line in many(count))


@pytest.fixture
def s3(monkeypatch):
    """A file system on an empty bucket of a server of its own."""
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    urlopen(Request(f"http://{host}:{port}/moto-api/reset", method="POST")).close()  # servers of a process share state
    fs = s3fs.S3FileSystem()
    fs.mkdir("bucket")
    yield fs
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


@pytest.fixture
def go(tmp_path, scout_tiny):
    def call(source, target, backend=EchoBackend, **options):
        places = Places(source, target, None, tmp_path / "spool")
        return run_places(places, BatchOptions(tmp_path, tmp_path, scout_tiny, **options), backend)

    return call


def test_in_and_out(s3, go, capsys):
    s3.pipe_file("bucket/in/x.jsonl.gz", gzip.compress(text(40)))
    go("s3://bucket/in/x.jsonl.gz", "s3://bucket/out/x.jsonl", in_order=True)
    lines = [json.loads(line) for line in s3.cat_file("bucket/out/x.jsonl").splitlines()]
    assert [line["id"] for line in lines] == list(range(40))
    capsys.readouterr()
    go("s3://bucket/in/x.jsonl.gz", "s3://bucket/out/x.jsonl", no_backend, in_order=True)
    assert "nothing to do" in capsys.readouterr().err


def test_an_object_that_was_removed_or_replaced_is_put_again(s3, go, capsys):
    s3.pipe_file("bucket/x.jsonl", text(3))
    go("s3://bucket/x.jsonl", "s3://bucket/y.jsonl")
    before = s3.cat_file("bucket/y.jsonl")
    for change in (lambda: s3.rm("bucket/y.jsonl"), lambda: s3.pipe_file("bucket/y.jsonl", b"x" * len(before))):
        change()
        go("s3://bucket/x.jsonl", "s3://bucket/y.jsonl", no_backend)
        assert s3.cat_file("bucket/y.jsonl") == before and "nothing to do" not in capsys.readouterr().err


def test_a_folder(s3, go):
    for name in ("a.jsonl", "b.jsonl"):
        s3.pipe_file(f"bucket/in/{name}", text(3))
    summary = go("s3://bucket/in/*.jsonl", "s3://bucket/out")
    assert [row.counts()[1] for row in summary.rows] == [3, 3]
    assert s3.ls("bucket/out", detail=False) == ["bucket/out/a.jsonl", "bucket/out/b.jsonl"]
    go("s3://bucket/in/", "s3://bucket/out/", no_backend)


def test_what_goes_wrong_is_told(s3, go, tmp_path):
    s3.pipe_file("bucket/x.jsonl", text(1))
    s3.pipe_file("bucket/theirs.jsonl", b"precious")
    with pytest.raises(InputMissing, match="no such object: s3://bucket/none"):
        go("s3://bucket/none.jsonl", str(tmp_path / "out"))
    with pytest.raises(WriteError, match="exists"):
        go("s3://bucket/x.jsonl", "s3://bucket/theirs.jsonl", no_backend)
    with pytest.raises(L4Error) as caught:
        go("s3://bucket/x.jsonl", "s3://no-such-bucket/y.jsonl")
    assert "s3://no-such-bucket/y.jsonl" in caught.value.message
    assert s3.cat_file("bucket/theirs.jsonl") == b"precious"
