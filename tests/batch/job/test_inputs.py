"""Inputs and outputs of every kind: compressed, cut off, from pipes and URLs, one or many."""

import gzip
import io
import json
import os
import subprocess
import sys
import threading
import time

import pytest

from batch.inputs import InputBroken, decompressed
from batch.job import BatchOptions, run_batch
from batch.journal import journal_path
from batch.many import run_places
from batch.places import Places, find_inputs
from batch.spool import spool_path
from batch.state import StateOptions
from l4tool.core.errors import DeviceError, InputMissing, UsageError, WriteError
from tests.batch.job.conftest import EchoBackend
from tests.batch.job.test_resume import Job, many, no_backend, without_time


def zstd(data):
    zstandard = pytest.importorskip("zstandard")
    return zstandard.ZstdCompressor().compress(data)


PACK = {"gzip": gzip.compress, "zstd": zstd, "plain": bytes}


def text(count, start=0):
    return b"".join(json.dumps(line).encode() + b"\n" for line in many(count, start))


@pytest.fixture
def job(tmp_path, scout_tiny):
    return Job(tmp_path, scout_tiny)


@pytest.fixture
def plain(job):
    """What 40 lines of an uncompressed file are answered with."""
    job.source.write_bytes(text(40))
    job.run()
    lines = without_time(job.lines)
    for path in (job.target, journal_path(job.target)):
        path.unlink()
    return lines


class TestCompressed:
    @pytest.mark.parametrize("kind", ["gzip", "zstd"])
    def test_content_decides_and_resume_works(self, job, plain, kind):
        job.source.write_bytes(PACK[kind](text(40)))
        job.interrupt(after=15)
        job.run()
        assert sum(job.answered.values()) == 25 and without_time(job.lines) == plain
        assert run_batch(BatchOptions(job.source, job.target, job.model), no_backend).ok == 40

    @pytest.mark.parametrize("kind", ["gzip", "zstd"])
    def test_many_members_make_one_file(self, kind):
        pack = PACK[kind]
        data = pack(b"one\ntw") + pack(b"") + pack(b"o\n" * 3)
        if kind == "gzip":
            data += bytes(512)  # tape and dd pad with zeros
        assert decompressed(io.BytesIO(data), "x").read() == b"one\ntwo\no\no\n"

    def test_zstd_may_begin_with_a_skippable_frame(self):
        data = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd" + zstd(b"hello\n")
        assert decompressed(io.BytesIO(data), "x").read() == b"hello\n"

    @pytest.mark.parametrize("kind", ["gzip", "zstd"])
    @pytest.mark.parametrize("harm", ["cut off", "damaged"])
    def test_what_comes_before_the_harm_is_answered(self, job, plain, kind, harm):
        """And the whole file, brought later, carries on."""
        whole = PACK[kind](text(20)) + PACK[kind](text(20, start=20))
        second = PACK[kind](text(20, start=20))
        broken = whole[:-10] if harm == "cut off" else whole[: -len(second)] + b"\0" * 0 + second[:4] + b"\xff" * 40
        job.source.write_bytes(broken)
        with pytest.raises(InputBroken, match=harm) as caught:
            job.run()
        assert caught.value.exit_code == 65 and "same command" in caught.value.hint
        first = {line["id"] for line in job.lines}
        assert first >= set(range(20)) and not any("error" in line for line in job.lines)
        with pytest.raises(InputBroken):
            run_batch(BatchOptions(job.source, job.target, job.model), no_backend)
        job.source.write_bytes(whole)
        job.run()
        assert sum(job.answered.values()) == 40 - len(first) and without_time(job.lines) == plain

    def test_a_bomb_is_one_line_of_bounded_memory(self, tmp_path):
        """A gigabyte of blanks in a megabyte, with a real line behind it."""
        path = tmp_path / "bomb.gz"
        with gzip.open(path, "wb", compresslevel=1) as file:
            for _ in range(256):
                file.write(b" " * 2**20)
            file.write(b'\n{"prompt": "x"}\n')
        code = (
            "import resource, sys; from pathlib import Path\n"
            "from batch.inputs import open_input; from batch.jsonl import LineReader\n"
            "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
            "with open_input(Path(sys.argv[1])).open() as file:\n"
            "    found = [(x.number, x.too_long) for x in LineReader(file, 2**20)]\n"
            "print(found, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)"
        )
        done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
        assert done.stdout.startswith("[(1, True), (2, False)]") and int(done.stdout.split()[-1]) < 100, done.stdout

    @pytest.mark.parametrize("head", [b"PK\x03\x04", b"\xfd7zXZ\0", b"BZh91AY&SY"])
    def test_other_archives_are_refused(self, job, head):
        job.source.write_bytes(head + bytes(100))
        with pytest.raises(InputBroken, match="archive"):
            run_batch(BatchOptions(job.source, job.target, job.model), no_backend)
        assert not job.target.exists()

    def test_a_missing_package_is_named(self, job, monkeypatch):
        data = zstd(text(2))
        monkeypatch.setitem(sys.modules, "zstandard", None)
        monkeypatch.setitem(sys.modules, "compression.zstd", None)
        job.source.write_bytes(data)
        with pytest.raises(UsageError) as caught:
            run_batch(BatchOptions(job.source, job.target, job.model), no_backend)
        assert "l4tool[zstd]" in caught.value.hint

    @pytest.mark.parametrize("kind", list(PACK))
    def test_a_pipe_that_comes_in_small_pieces(self, kind):
        data = PACK[kind](text(10))
        reading, writing = os.pipe()

        def write():
            with open(writing, "wb", buffering=0) as file:
                for at in range(0, len(data), 7):
                    file.write(data[at : at + 7])

        thread = threading.Thread(target=write)
        thread.start()
        with decompressed(open(reading, "rb"), "pipe") as file:
            assert file.read() == text(10)
        thread.join()


class TestMany:
    """A folder or a pattern of inputs: one output each, one model for all."""

    @pytest.fixture
    def box(self, tmp_path, scout_tiny):
        class Box:
            inbox, outbox = tmp_path / "inbox", tmp_path / "outbox"

            def run(self, source=None, make_backend=None, **options):
                errors = options.pop("errors", None)
                places = Places(str(source or self.inbox), str(self.outbox), errors)
                run = BatchOptions(tmp_path, tmp_path, scout_tiny, **options)
                return run_places(places, run, make_backend or self.make)

            def make(self, options, front):
                self.made.append(EchoBackend(options, front))
                return self.made[-1]

            def ids(self, name):
                return sorted(json.loads(line)["id"] for line in (self.outbox / name).read_bytes().splitlines())

        box = Box()
        box.made = []
        box.inbox.mkdir()
        (box.inbox / "a.jsonl").write_bytes(text(4))
        (box.inbox / "b.jsonl.gz").write_bytes(gzip.compress(text(5)))
        (box.inbox / "notes.txt").write_text("not lines")
        (box.inbox / ".hidden.jsonl").write_bytes(text(1))
        (box.inbox / "c.jsonl.part").write_bytes(text(1))
        return box

    def test_a_folder(self, box):
        summary = box.run()
        assert sorted(path.name for path in box.outbox.iterdir()) == [
            "a.jsonl", "a.jsonl.journal", "b.jsonl", "b.jsonl.journal",
        ]  # fmt: skip
        assert box.ids("a.jsonl") == list(range(4)) and box.ids("b.jsonl") == list(range(5))
        assert len(box.made) == 1 and box.made[0].is_closed and summary.exit_code == 0
        assert "2 inputs" in summary.as_table()

    def test_complete_ones_need_no_model_and_new_ones_are_found(self, box):
        box.run()
        box.run(make_backend=no_backend)
        (box.inbox / "d.jsonl").write_bytes(text(3))
        box.run()
        assert box.ids("d.jsonl") == [0, 1, 2] and len(box.made) == 2 and box.made[1].stats["steps"] == 3

    def test_a_pattern(self, box):
        box.run(source=box.inbox / "*.gz")
        assert [path.name for path in sorted(box.outbox.iterdir())] == ["b.jsonl", "b.jsonl.journal"]
        assert box.run(source=box.inbox / "*.none").rows == []
        with pytest.raises(InputMissing, match="no such folder"):
            box.run(source=box.inbox / "none" / "*.jsonl")

    def test_a_file_that_is_called_like_a_pattern_is_a_file(self, box, tmp_path):
        (box.inbox / "a[1].jsonl").write_bytes(text(2))
        summary = box.run(source=box.inbox / "a[1].jsonl")
        assert summary.ok == 2 and box.outbox.is_file()

    def test_a_bad_file_does_not_end_the_others(self, box, capsys):
        (box.inbox / "a.jsonl.gz").write_bytes(b"")
        (box.inbox / "a.jsonl").unlink()
        (box.inbox / "aa.jsonl").write_bytes(gzip.compress(text(9))[:-9])
        (box.inbox / "ab.jsonl").write_bytes(b"not json\n")
        summary = box.run(summary=box.inbox.parent / "summary.json")
        assert [row.exit_code for row in summary.rows] == [0, 65, 3, 0] and summary.exit_code == 65
        assert box.ids("b.jsonl") == list(range(5)) and "cut off" in capsys.readouterr().err
        saved = json.loads((box.inbox.parent / "summary.json").read_text())
        assert saved["inputs"] == 4 and not saved["complete"] and saved["ok"] == 5
        assert saved["files"][1]["exit_code"] == 65

    def test_an_input_that_is_being_written_is_left_for_the_next_run(self, box, capsys):
        path = box.inbox / "a.jsonl"
        path.write_bytes(text(4)[:-1])
        assert [row.state for row in box.run().rows] == ["left for the next run", "done"]
        assert not (box.outbox / "a.jsonl").exists() and "still being written" in capsys.readouterr().err
        an_hour_ago = time.time() - 3600
        os.utime(path, (an_hour_ago, an_hour_ago))
        assert box.run().exit_code == 0 and box.ids("a.jsonl") == list(range(4))

    def test_pictures_lie_beside_each_input(self, box, tmp_path):
        from PIL import Image

        line = json.dumps({"id": 1, "prompt": "what?", "images": ["p.png"]}) + "\n"
        answers = []
        for name, color in (("one", "red"), ("two", "blue")):
            (box.inbox / name).mkdir()
            Image.new("RGB", (8, 8), color).save(box.inbox / name / "p.png")
            (box.inbox / name / f"{name}.jsonl").write_text(line)
        box.run(source=box.inbox / "*" / "*.jsonl")
        for name in ("one", "two"):
            answers.append(json.loads((box.outbox / f"{name}.jsonl").read_text()))
        assert "error" not in answers[0] and answers[0]["text"] != answers[1]["text"]

    def test_error_files_have_a_folder_of_their_own(self, box, tmp_path):
        (box.inbox / "a.jsonl").write_bytes(text(4) + b"bad\n")
        assert box.run(errors=str(tmp_path / "bad")).exit_code == 3
        assert (tmp_path / "bad" / "a.jsonl").read_bytes().count(b"\n") == 1
        assert box.ids("a.jsonl") == list(range(4)) and not (tmp_path / "bad" / "b.jsonl").read_bytes()

    @pytest.mark.parametrize("case", ["same name", "into the inbox", "stdout", "a file", "no parent"])
    def test_refusals_come_before_any_work(self, box, tmp_path, case):
        if case == "same name":
            (box.inbox / "a.jsonl.gz").write_bytes(gzip.compress(text(1)))
        elif case == "into the inbox":
            box.outbox = box.inbox
        elif case == "stdout":
            box.outbox = "-"
        elif case == "a file":
            box.outbox = tmp_path / "file"
            box.outbox.write_text("")
        else:
            box.outbox = tmp_path / "no" / "outbox"
        with pytest.raises((UsageError, WriteError)):
            box.run(make_backend=no_backend)
        assert not list(box.inbox.glob("*.journal")) and not (tmp_path / "outbox").exists()

    def test_a_backend_that_was_left_in_the_middle_is_not_used_again(self, box, monkeypatch):
        calls = []

        class Failing(EchoBackend):
            def answer(self, request):
                calls.append(request)
                if len(calls) == 2:
                    raise WriteError("the disk is full")
                return super().answer(request)

        made = []
        summary = box.run(make_backend=lambda *args: made.append(Failing(*args)) or made[-1])
        assert [row.exit_code for row in summary.rows] == [73, 0] and len(made) == 2 and made[0].is_closed


class TestRemote:
    """fsspec's own memory:// store; a real S3 server is in test_s3.py."""

    @pytest.fixture
    def store(self):
        fsspec = pytest.importorskip("fsspec")
        fs = fsspec.filesystem("memory")
        fs.store.clear()
        yield fs
        fs.store.clear()

    @pytest.fixture
    def go(self, tmp_path, scout_tiny):
        def call(source, target, backend=EchoBackend, errors=None, **options):
            places = Places(source, target, errors, tmp_path / "spool")
            return run_places(places, BatchOptions(tmp_path, tmp_path, scout_tiny, **options), backend)

        return call

    def read(self, store, path):
        return [json.loads(line) for line in store.cat_file(path).splitlines()]

    @pytest.mark.parametrize("kind", list(PACK))
    def test_in_and_out(self, store, go, plain, kind, capsys):
        store.pipe_file("/in/x.jsonl", PACK[kind](text(40)))
        summary = go("memory://in/x.jsonl", "memory://out/x.jsonl")
        assert without_time(self.read(store, "/out/x.jsonl")) == plain and summary.output == "memory://out/x.jsonl"
        capsys.readouterr()
        go("memory://in/x.jsonl", "memory://out/x.jsonl", no_backend)
        assert "nothing to do" in capsys.readouterr().err

    def test_nothing_is_put_before_all_is_done(self, store, go):
        store.pipe_file("/in/x.jsonl", text(40))

        class Dying(EchoBackend):
            def answer(self, request):
                if self.stats["steps"] > 10:
                    raise RuntimeError("the device is gone")
                return super().answer(request)

        with pytest.raises(DeviceError):
            go("memory://in/x.jsonl", "memory://out/x.jsonl", Dying)
        assert not store.exists("/out/x.jsonl")
        made = []
        go("memory://in/x.jsonl", "memory://out/x.jsonl", lambda *a: made.append(EchoBackend(*a)) or made[0])
        assert made[0].stats["steps"] == 30 and len(self.read(store, "/out/x.jsonl")) == 40

    @pytest.mark.parametrize("change", ["removed", "replaced"])
    def test_an_object_that_is_gone_is_put_again(self, store, go, capsys, change):
        store.pipe_file("/in/x.jsonl", text(4))
        go("memory://in/x.jsonl", "memory://out/x.jsonl")
        before = store.cat_file("/out/x.jsonl")
        if change == "removed":
            store.rm("/out/x.jsonl")
        else:
            time.sleep(0.002)
            store.pipe_file("/out/x.jsonl", b"x" * len(before))
        capsys.readouterr()
        go("memory://in/x.jsonl", "memory://out/x.jsonl", no_backend)
        errors = capsys.readouterr().err
        assert store.cat_file("/out/x.jsonl") == before and "nothing to do" not in errors and "putting" in errors

    def test_an_object_of_somebody_else_is_not_overwritten(self, store, go):
        store.pipe_file("/in/x.jsonl", text(4))
        store.pipe_file("/out/x.jsonl", b"precious")
        with pytest.raises(WriteError, match="exists"):
            go("memory://in/x.jsonl", "memory://out/x.jsonl", no_backend)
        assert store.cat_file("/out/x.jsonl") == b"precious"
        go("memory://in/x.jsonl", "memory://out/x.jsonl", state=StateOptions(force=True))
        assert len(self.read(store, "/out/x.jsonl")) == 4

    def test_a_put_that_loses_bytes_is_seen(self, store, go, monkeypatch):
        from l4tool.core.errors import NetworkError

        store.pipe_file("/in/x.jsonl", text(4))
        real = type(store).put_file
        monkeypatch.setattr(type(store), "put_file", lambda fs, local, path, **k: fs.pipe_file(path, b"half"))
        with pytest.raises(NetworkError, match="arrived"):
            go("memory://in/x.jsonl", "memory://out/x.jsonl")
        monkeypatch.setattr(type(store), "put_file", real)
        go("memory://in/x.jsonl", "memory://out/x.jsonl", no_backend)
        assert len(self.read(store, "/out/x.jsonl")) == 4

    def test_error_lines_are_put_apart(self, store, go):
        store.pipe_file("/in/x.jsonl", text(4) + b"bad\n")
        go("memory://in/x.jsonl", "memory://out/x.jsonl", errors="memory://bad/x.jsonl")
        assert len(self.read(store, "/out/x.jsonl")) == 4 and len(self.read(store, "/bad/x.jsonl")) == 1

    @pytest.mark.parametrize("source", ["memory://in/", "memory://in/*.jsonl*"])
    def test_many(self, store, go, source):
        for name in ("a.jsonl", "b.jsonl"):
            store.pipe_file(f"/in/{name}", text(3))
        store.pipe_file("/in/c.jsonl.gz", gzip.compress(text(2)))
        summary = go(source, "memory://out/")
        assert [row.counts()[1] for row in summary.rows] == [3, 3, 2]
        assert sorted(store.ls("/out", detail=False)) == ["/out/a.jsonl", "/out/b.jsonl", "/out/c.jsonl"]

    def test_pictures_beside_a_url_are_error_lines(self, store, go, tmp_path):
        store.pipe_file("/in/x.jsonl", json.dumps({"prompt": "what?", "images": ["a.png"]}).encode())
        out = tmp_path / "out.jsonl"
        assert go("memory://in/x.jsonl", str(out)).num_errors == 1
        assert "--image-root" in json.loads(out.read_text())["error"]["message"]

    def test_errors_of_drivers_are_told(self, store, go, tmp_path):
        with pytest.raises(InputMissing, match="memory://in/none"):
            go("memory://in/none.jsonl", str(tmp_path / "out"))
        with pytest.raises(UsageError, match="no driver"):
            go("nosuch://x/y.jsonl", str(tmp_path / "out"))

    def test_one_output_is_an_object_not_a_folder(self, store, go):
        store.pipe_file("/in/x.jsonl", text(1))
        with pytest.raises(UsageError, match="folder"):
            go("memory://in/x.jsonl", "memory://out/", no_backend)

    def test_a_web_server(self, go, tmp_path):
        pytest.importorskip("aiohttp", reason="fsspec reads http:// with aiohttp (extra remote-test has it)")
        from functools import partial
        from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

        (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(text(20)))
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=tmp_path))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            url = f"http://127.0.0.1:{server.server_port}"
            assert go(f"{url}/x.jsonl.gz", str(tmp_path / "out.jsonl")).ok == 20
            with pytest.raises(InputMissing):
                go(f"{url}/none.jsonl", str(tmp_path / "out2.jsonl"))
        finally:
            server.shutdown()
            server.server_close()

    def test_file_urls_are_files(self, go, tmp_path):
        (tmp_path / "a b.jsonl").write_bytes(text(3))
        go(f"file://{tmp_path}/a%20b.jsonl", f"file://{tmp_path}/out.jsonl")
        assert (tmp_path / "out.jsonl").read_bytes().count(b"\n") == 3

    def test_every_url_has_a_spool_of_its_own(self, tmp_path):
        assert spool_path("s3://a/x.jsonl", tmp_path) != spool_path("s3://b/x.jsonl", tmp_path)
        assert spool_path("s3://a/x.jsonl", tmp_path) == spool_path("s3://a/x.jsonl", tmp_path)


def test_stdout_may_be_in_input_order(tmp_path, scout_tiny, capfdbinary):
    source = tmp_path / "in.jsonl"
    source.write_bytes(text(30))
    for in_order in (False, True):
        places = Places(str(source), "-")
        run_places(places, BatchOptions(source, tmp_path, scout_tiny, in_order=in_order), EchoBackend)
        ids = [json.loads(line)["id"] for line in capfdbinary.readouterr().out.splitlines()]
        assert (ids == list(range(30))) is in_order and sorted(ids) == list(range(30))
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_find_inputs_of_an_empty_folder(tmp_path):
    assert find_inputs(str(tmp_path)) == []
