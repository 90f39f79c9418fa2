"""Local pictures stay below their folder, whatever paths and links say; nothing but regular files is opened."""

import contextlib
import os
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batch.local_files import MAX_DEPTH, local_path, read_file
from batch.schema import LineError

INSIDE, OUTSIDE = b"inside", b"secret"


@pytest.fixture
def root(tmp_path):
    """tmp/root holds what may be read, tmp/other and tmp/root2 what may not."""
    root = tmp_path / "root"
    (root / "sub/deep").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "root2").mkdir()
    for path in ("root/a.png", "root/sub/b.png", "root/sub/deep/c.png"):
        (tmp_path / path).write_bytes(INSIDE)
    for path in ("other/s.png", "root2/s.png", "s.png"):
        (tmp_path / path).write_bytes(OUTSIDE)
    links = {
        "in": "a.png", "sub/up": "../a.png", "sub/deep/chain": "../up", "folder": "sub",
        "absolute": str(root / "a.png"), "here": ".", "out": "../s.png", "out_folder": "../other",
        "out_absolute": "/etc/passwd",
        "sub/out": "../../s.png",
        "sneaky": "sub/../../s.png", "sneaky2": f"{root}/../s.png", "sibling": f"{tmp_path}/root2/s.png",
        "loop": "loop",
        "loop1": "loop2", "loop2": "loop1", "fd": "/proc/self/fd/0", "device": "/dev/zero", "nothing": "missing.png",
        "self": "/proc/self/cwd", "chain_out": "folder/out",
    }  # fmt: skip
    for name, target in links.items():
        (root / name).symlink_to(target)
    os.mkfifo(root / "pipe")
    return root


@pytest.mark.parametrize(
    "source",
    ["a.png", "./a.png", "sub/b.png", "sub//deep/./c.png", "in", "sub/up", "sub/deep/chain", "folder/b.png", "absolute",
     "here/here/a.png", "{root}/a.png", "{root}//sub/b.png", "{root}/folder/deep/c.png", "file://{root}/a.png",
     "FILE://localhost{root}/a.png"],
)  # fmt: skip
def test_what_lies_inside_is_read(root, source):
    assert read_file(source.format(root=root), root) == INSIDE


@pytest.mark.parametrize(
    "source",
    ["../s.png", "sub/../../s.png", "sub/../a.png", "..", "../root/a.png", "/etc/passwd", "/dev/zero", "/",
     "//etc/passwd",
     "{root}/../s.png", "{root}2/s.png", "{root}/../root2/s.png", "out", "out_folder/s.png", "out_absolute", "sub/out",
     "sneaky", "sneaky2", "sibling", "fd", "device", "self/passwd", "chain_out", "file:///etc/passwd",
     "file:///{root}/../s.png", "file://localhost/etc/passwd", "{root}/out", "folder/../../s.png"],
)  # fmt: skip
def test_what_leads_out_is_refused(root, source):
    with pytest.raises(LineError) as caught:
        read_file(source.format(root=root), root)
    assert caught.value.code in ("image_outside_root", "invalid_image")
    if "file:///{root}" not in source:
        assert caught.value.code == "image_outside_root" and "--image-root" in caught.value.message


@pytest.mark.parametrize("source", ["loop", "loop1", "nothing", "missing", "a.png/x", "x\0y", "a" * 300, "d/" * 5000])
def test_what_is_not_there(root, source):
    with pytest.raises(LineError) as caught:
        read_file(source, root)
    assert caught.value.code == "image_not_found" and len(caught.value.message) < 300


@pytest.mark.parametrize("source", ["", ".", "sub", "pipe", "here", "{root}"])
def test_what_is_not_a_file(root, source):
    with pytest.raises(LineError, match="not a file"):
        read_file(source.format(root=root), root)


def test_no_device_or_pipe_is_even_opened(root, monkeypatch):
    opened = []
    real = os.open
    monkeypatch.setattr(os, "open", lambda path, *a, **k: opened.append(str(path)) or real(path, *a, **k))
    with pytest.raises(LineError):
        read_file("pipe", root)
    assert opened == [str(root)]


@pytest.mark.parametrize(
    "source",
    ["file:a.png", "file:/a.png", "file://a.png", "file://host/a.png", "file:////etc/passwd", "file:///a%2epng", "file:///a?b",
     "file:///a#b", "file://127.0.0.1/a", "FILE:\\\\host\\a"],
)  # fmt: skip
def test_file_urls_come_in_one_form(source):
    with pytest.raises(LineError) as caught:
        local_path(source)
    assert caught.value.code == "invalid_image"


def test_a_root_that_is_a_link(root, tmp_path):
    (tmp_path / "alias").symlink_to(root)
    alias = tmp_path / "alias"
    for source in ("a.png", f"{alias}/a.png", f"{root}/a.png", "absolute"):
        assert read_file(source, alias) == INSIDE


def test_deep_paths_do_not_use_up_descriptors(tmp_path):
    deep = tmp_path.joinpath(*["d"] * (MAX_DEPTH + 5))
    deep.mkdir(parents=True)
    (deep / "x").write_bytes(INSIDE)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(LineError, match="too long"):
        read_file("d/" * (MAX_DEPTH + 5) + "x", tmp_path)
    assert read_file("d/" * (MAX_DEPTH - 5) + "x", tmp_path / "d/d/d/d/d/d/d/d/d/d") == INSIDE
    assert len(os.listdir("/proc/self/fd")) == before


def test_links_swapped_while_paths_are_walked(root, tmp_path):
    """Somebody turns a folder into a link and back as fast as possible: nothing from outside is ever read."""
    (root / "swap").mkdir()
    (root / "swap/s.png").write_bytes(INSIDE)
    stop = threading.Event()

    def swap():
        while not stop.is_set():
            os.rename(root / "swap", root / "aside")
            os.symlink("../other", root / "swap")
            os.unlink(root / "swap")
            os.rename(root / "aside", root / "swap")

    thread = threading.Thread(target=swap)
    thread.start()
    found, end_s = set(), time.monotonic() + 1.5
    while time.monotonic() < end_s:
        try:
            found.add(read_file("swap/s.png", root))
        except LineError as error:
            found.add(error.code)
    stop.set()
    thread.join()
    assert OUTSIDE not in found and INSIDE in found
    assert found <= {INSIDE, "image_outside_root", "image_not_found"} and len(found) > 1


PIECES = st.sampled_from(
    ["..", ".", "", "a.png", "sub", "folder", "out", "out_folder", "s.png", "here", "sub/up", "loop", "/"]
)


@settings(max_examples=300, deadline=None)
@given(parts=st.lists(PIECES, max_size=6), absolute=st.booleans())
def test_no_path_at_all_leads_out(shared_root, parts, absolute):
    path = "/".join(parts)
    with contextlib.suppress(LineError):
        assert read_file(f"{shared_root}/{path}" if absolute else path, shared_root) == INSIDE


@pytest.fixture(scope="module")
def shared_root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    root = folder / "root"
    (root / "sub").mkdir(parents=True)
    (folder / "other").mkdir()
    (root / "a.png").write_bytes(INSIDE)
    for path in ("other/s.png", "s.png"):
        (folder / path).write_bytes(OUTSIDE)
    targets = {
        "folder": "sub",
        "out": "../s.png",
        "out_folder": "../other",
        "here": ".",
        "sub/up": "../a.png",
        "loop": "loop",
    }
    for name, target in targets.items():
        (root / name).symlink_to(target)
    return root


@pytest.mark.parametrize(("name", "target"), [("swap", "../other"), ("s.png", "../../s.png")])
def test_a_link_put_there_between_looking_and_opening(root, monkeypatch, name, target):
    (root / "swap").mkdir()
    (root / "swap/s.png").write_bytes(INSIDE)
    place = root / name if name == "swap" else root / "swap" / name
    real = os.stat

    def stat_then_swap(path, *args, **options):
        status = real(path, *args, **options)
        if path == name and options.get("dir_fd") is not None:
            place.rename(root / "aside")
            place.symlink_to(target)
        return status

    monkeypatch.setattr(os, "stat", stat_then_swap)
    with pytest.raises(LineError) as caught:
        read_file("swap/s.png", root)
    assert caught.value.code == "image_not_found"
