"""A full disk: what is promised depends on what is written."""

import errno
import os

import pytest

from l4tool.core import atomic
from l4tool.core.errors import WriteError


def full(*args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_small_file_does_not_carry_on(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic.os, "fsync", full)
    with pytest.raises(WriteError) as caught:
        atomic.write_file(tmp_path / "summary.json", "{}")
    assert "free some space" in caught.value.hint and "carries on" not in caught.value.hint
    with pytest.raises(WriteError) as caught, atomic.write_errors(tmp_path / "shard"):
        full()
    assert "carries on" in caught.value.hint
