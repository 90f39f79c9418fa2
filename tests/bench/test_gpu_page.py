"""bench/gpu_page.py and bench/gpu_quantize.py without a GPU: what goes on the page, and real commands on a CPU."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).resolve().parents[2] / "bench"
sys.path.insert(0, str(BENCH))
import gpu_page  # noqa: E402
import gpu_quantize  # noqa: E402

sys.path.remove(str(BENCH))


def page_of(tmp_path, *parts):
    page = tmp_path / "page.md"
    page.write_text(
        "".join(f"{part}\n<!-- gpu {part}: begin -->\nNot run.\n<!-- gpu {part}: end -->\n" for part in parts)
    )
    return page


def test_the_page_has_a_place_for_every_part():
    page = gpu_page.PAGE.read_text()
    for part in gpu_page.PARTS:
        assert f"<!-- gpu {part}: begin -->" in page and f"<!-- gpu {part}: end -->" in page


def test_what_is_printed_goes_on_the_page(tmp_path, monkeypatch):
    monkeypatch.setitem(gpu_page.PARTS, "peers", ["-c", f"print('1\\n' * 99 + 'the table of {gpu_page.ROOT}/x')"])
    monkeypatch.setitem(gpu_page.PARTS, "load", ["-c", "import sys; print('so far'); sys.exit('no room')"])
    page = page_of(tmp_path, "peers", "load")
    assert gpu_page.run_part("peers", page) and not gpu_page.run_part("load", page)
    text = page.read_text()
    assert "the table of x\n```\n<!-- gpu peers: end -->" in text and text.count("\n1\n") == 30
    assert "Exit code 1.\n```\nso far\nno room\n```" in text and "Not run" not in text


def test_a_part_that_writes_by_itself(tmp_path, monkeypatch):
    write = "import sys; open(sys.argv[-1], 'w').write('written'); sys.exit(len(sys.argv) - 3)"
    monkeypatch.setitem(gpu_page.PARTS, "int4", ["-c", write])
    page = page_of(tmp_path, "int4")
    assert gpu_page.run_part("int4", page) and page.read_text() == "written"
    page = page_of(tmp_path, "int4")
    monkeypatch.setitem(gpu_page.PARTS, "int4", ["-c", "raise SystemExit('it does not fit')"])
    assert not gpu_page.run_part("int4", page) and "it does not fit\n```" in page.read_text()


def test_every_part_knows_its_options():
    for part, command in gpu_page.PARTS.items():
        if part != "tests":
            done = subprocess.run(
                [sys.executable, *command, "--help"], capture_output=True, text=True, cwd=gpu_page.ROOT
            )
            assert done.returncode == 0 and done.stdout.startswith("usage"), part


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so_and_leaves_the_page(tmp_path):
    page = page_of(tmp_path, "peers")
    command = [sys.executable, str(BENCH / "gpu_page.py"), "--page", str(page), "--parts"]
    done = subprocess.run([*command, "peers"], capture_output=True, text=True)
    assert done.returncode == 1 and "needs a CUDA device" in done.stderr and "Not run." in page.read_text()
    done = subprocess.run([*command, "peers", "load"], capture_output=True, text=True)
    assert done.returncode == 1 and "has no marks of load" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("script, options", [
    ("gpu_tune.py", ["--device", "cpu"]), ("gpu_peers.py", ["--device", "cpu"]), ("gpu_quantize.py", []),
    ("load.py", ["nowhere"]),
])  # fmt: skip
def test_one_line_says_what_is_lacking(script, options, tmp_path):
    done = subprocess.run([sys.executable, str(BENCH / script), *options], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and not list(tmp_path.iterdir())


def test_quantized_shards_are_compared(tmp_path, monkeypatch, capsys):
    """The CPU in both places: a real checkpoint, real commands."""
    options = ["--work", str(tmp_path), "--preset", "tiny", "--layers", "2", "--schemes", "int4"]
    monkeypatch.setattr(sys, "argv", ["gpu_quantize.py", *options, "--devices", "cpu"])
    gpu_quantize.main()
    assert "int4" in capsys.readouterr().out and (tmp_path / "int4-cpu" / "config.json").exists()
    other = tmp_path / "other"
    other.mkdir()
    shards = sorted((tmp_path / "int4-cpu").glob("*.safetensors"))
    for path in shards:
        (other / path.name).write_bytes(path.read_bytes())
    assert gpu_quantize.differing(tmp_path / "int4-cpu", other) == 0
    (other / shards[0].name).write_bytes(shards[0].read_bytes()[:-1] + b"x")
    assert gpu_quantize.differing(tmp_path / "int4-cpu", other) == 1
    (other / shards[0].name).unlink()
    assert gpu_quantize.differing(tmp_path / "int4-cpu", other) == 1
