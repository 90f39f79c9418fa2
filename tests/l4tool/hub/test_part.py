import hashlib
import json
import os

import pytest

from l4tool.core.errors import ChecksumError, WriteError
from l4tool.hub import part as part_module
from l4tool.hub.client import RemoteFile
from l4tool.hub.part import Part, ledger_path, part_bytes, read_ledger

MARK = 1000  # bytes between marks in these tests


@pytest.fixture(autouse=True)
def small_marks(monkeypatch):
    monkeypatch.setattr(part_module, "MARK_BYTES", MARK)


@pytest.fixture
def data():
    return os.urandom(5500)


def remote(data, lfs=True):
    oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    return RemoteFile("f", len(data), hashlib.sha256(data).hexdigest() if lfs else None, oid)


def begin(target, data, length, **kwargs):
    part = Part(target, remote(data, **kwargs), lambda delta: None)
    part.write(data[:length])
    part.close()


def reopen(target, data, **kwargs):
    counted = []
    part = Part(target, remote(data, **kwargs), counted.append)
    assert sum(counted) == part.size
    return part


@pytest.mark.parametrize("lfs", [True, False])
@pytest.mark.parametrize("length", [0, 1, 999, 1000, 3700, 5500])
def test_resumed_to_the_byte(tmp_path, data, length, lfs):
    target = tmp_path / "f"
    begin(target, data, length, lfs=lfs)
    assert part_bytes(target, remote(data, lfs=lfs)) == length
    part = reopen(target, data, lfs=lfs)
    assert part.size == length
    part.write(data[length:])
    part.check()
    part.finish()
    part.close()
    assert target.read_bytes() == data and os.listdir(tmp_path) == ["f"]


def test_marks_are_prefix_hashes(tmp_path, data):
    begin(tmp_path / "f", data, 5500)
    marks = read_ledger(ledger_path(tmp_path / "f"))[1]
    assert marks and all(hashlib.sha256(data[:size]).hexdigest() == digest for size, digest in marks.items())


def test_after_a_restart_only_what_was_synced_counts(tmp_path, data, monkeypatch):
    begin(tmp_path / "f", data, 3700)
    last = max(read_ledger(ledger_path(tmp_path / "f"))[1])
    monkeypatch.setattr(part_module, "boot_id", lambda: "another")
    part = reopen(tmp_path / "f", data)
    assert part.size == last and last % MARK == 0 and last > 0
    part.close()


def test_unknown_boot_is_not_trusted(tmp_path, data, monkeypatch):
    monkeypatch.setattr(part_module, "boot_id", lambda: None)
    begin(tmp_path / "f", data, 700)
    part = reopen(tmp_path / "f", data)
    assert part.size == 0
    part.close()


def test_bytes_that_rotted_cost_one_block_only(tmp_path, data):
    target = tmp_path / "f"
    part = Part(target, remote(data), lambda delta: None)
    for start in range(0, 5000, 500):  # every mark synced
        part.write(data[start : start + 500])
        part._wait()
    part.close()
    raw = bytearray((tmp_path / "f.part").read_bytes())
    raw[3100] ^= 1
    (tmp_path / "f.part").write_bytes(raw)
    part = reopen(target, data)
    assert part.size == 3000
    part.write(data[3000:])
    part.check()
    part.close()


def test_part_of_another_content_is_dropped(tmp_path, data):
    begin(tmp_path / "f", data, 3000)
    part = reopen(tmp_path / "f", os.urandom(5500))
    assert part.size == 0 and (tmp_path / "f.part").stat().st_size == 0
    part.close()


@pytest.mark.parametrize("junk", ["", "{", "[]", '{"digest": 1}\n', "null\nnull\n"])
def test_junk_in_the_ledger_is_no_ledger(tmp_path, data, junk):
    begin(tmp_path / "f", data, 3000)
    ledger_path(tmp_path / "f").write_text(junk)
    part = reopen(tmp_path / "f", data)
    assert part.size == 0
    part.close()


def test_torn_last_line_of_the_ledger(tmp_path, data):
    begin(tmp_path / "f", data, 3700)
    ledger = ledger_path(tmp_path / "f")
    ledger.write_text(ledger.read_text() + '{"size": 40')
    part = reopen(tmp_path / "f", data)
    assert part.size == 3700
    part.close()
    assert all(json.loads(line) for line in ledger.read_text().splitlines())


def test_wrong_bytes_are_told_and_thrown_away(tmp_path, data):
    counted = []
    part = Part(tmp_path / "f", remote(data), counted.append)
    part.write(bytes(5500))
    with pytest.raises(ChecksumError) as error:
        part.check()
    assert remote(data).sha256 in error.value.message and hashlib.sha256(bytes(5500)).hexdigest() in error.value.message
    part.reset()
    assert part.size == 0 == sum(counted)
    part.write(data)
    part.check()
    part.close()


def test_symlink_in_place_of_the_part(tmp_path, data):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "f.part").symlink_to(victim)
    with pytest.raises(WriteError):
        Part(tmp_path / "f", remote(data), lambda delta: None)
    assert victim.read_text() == "precious"
