"""Compiled kernels are kept by the source of their whole package."""

import os

import pytest

from l4tool.core.jit import cache_folder, kernel_jit


@pytest.fixture
def package(tmp_path, monkeypatch):
    # Not NUMBA_CACHE_DIR: numba itself watches that one and would move all its caches.
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "some" / "kernels"
    folder.mkdir(parents=True)
    (folder / "a.py").write_text("A = 1\n")
    (folder / "b.py").write_text("B = 1\n")
    cache_folder.cache_clear()
    yield folder
    cache_folder.cache_clear()


def test_another_file_of_the_package_changes_the_folder(package):
    before = cache_folder(package)
    cache_folder.cache_clear()
    assert cache_folder(package) == before
    (package / "b.py").write_text("B = 2\n")
    cache_folder.cache_clear()
    assert cache_folder(package) != before


def test_no_folder_to_write_still_compiles(package, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/nowhere")
    assert cache_folder(package) is None
    assert kernel_jit(package)(lambda x: x // 2)(9) == 4


def test_machine_code_lands_in_the_folder_and_numba_keeps_its_setting(package):
    import numba

    setting = numba.config.CACHE_DIR
    scope = {}
    code = "def twice(x):\n    return 2 * x\n"
    path = package / "c.py"
    path.write_text(code)
    exec(compile(code, str(path), "exec"), scope)
    assert kernel_jit(package)(scope["twice"])(21) == 42
    assert setting == numba.config.CACHE_DIR
    kept = [name for _, _, names in os.walk(cache_folder(package)) for name in names]
    assert any(name.endswith(".nbc") for name in kept), kept
