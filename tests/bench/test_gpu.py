"""bench/gpu.py as far as a CPU goes: a random model of every scheme runs, rates add up, the table, the refusal."""

import argparse
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from batch.engine.engine import EngineConfig
from batch.kernels import reference
from batch.model.model import load_model
from converters.arch_io import arch_from_config

BENCH = Path(__file__).resolve().parents[2] / "bench"
CPU = torch.device("cpu")
sys.path.insert(0, str(BENCH))
import gpu  # noqa: E402
import gpu_measure  # noqa: E402
import gpu_random  # noqa: E402
import gpu_tune  # noqa: E402
import limits  # noqa: E402

sys.path.remove(str(BENCH))
MACHINE = limits.Machine(1, 1e12, 1e14, 1e14)


@pytest.fixture(params=["int4", "fp8", "bf16"])
def engine(request, tmp_path):
    reader = gpu_random.RandomReader(gpu_random.scout_config(4, 4, 4096, tiny=True), request.param, CPU, tmp_path)
    model = load_model(reader, "cpu", "bfloat16")
    engine = gpu_measure.engine_of(model, EngineConfig(64, 8, 8 << 20, 16, prefix_cache=False))
    engine.costs = limits.model_costs(reader)
    return engine


def test_the_engine_is_measured(engine):
    prefill = gpu_measure.prefill_rate(engine, 40, 2, engine.costs, MACHINE)
    decode, drawn = (
        gpu_measure.decode_rate(engine, 3, engine.costs, MACHINE, prompt=20, steps=4, drawn=drawn)
        for drawn in (False, True)
    )
    assert drawn.per_second > 0 and gpu_measure.draw_seconds(2, CPU, 100) > 0
    assert prefill.per_second > 0 and decode.per_second > 0
    assert 0 < prefill.of_limit < 1 and 0 < decode.of_limit < 1  # no CPU has a terabyte per second
    assert not engine.has_work and engine.stats.output_tokens >= 3 * 4
    assert gpu_measure.images_per_second(engine, tiles=2, count=2) > 0


def test_what_does_not_run_is_said(engine):
    with pytest.raises(gpu_measure.Unmeasured, match=r"1 of 1 sequences failed: .'context_length"):
        gpu_measure.run_all(engine, [[1] * 5000], 1)
    with pytest.raises(gpu_measure.Unmeasured, match="the KV cache is too small"):
        gpu_measure.decode_rate(engine, 9, engine.costs, MACHINE, prompt=2, steps=4)  # eight places


def test_scout_has_its_published_size(tmp_path):
    arch = arch_from_config(gpu_random.scout_config(), "config")
    assert (arch.text.num_layers, arch.text.num_experts, arch.text.vocab_size) == (48, 16, 202048)
    assert arch.vision.num_layers == 34
    for scheme, gigabytes in (("int4", 64.9), ("fp8", 114.6), ("bf16", 217.3)):
        reader = gpu_random.RandomReader(gpu_random.scout_config(), scheme, CPU, tmp_path)
        assert sum(info.nbytes for info in reader.tensors().values()) / 1e9 == pytest.approx(gigabytes, abs=0.1)


@pytest.mark.parametrize("scheme", ["int4", "fp8", "bf16"])
def test_products_are_measured(scheme):
    def run(x, logits, experts):
        best, expert = logits.max(-1)
        assert torch.bincount(expert, minlength=4).tolist() == [len(x) // 4] * 4
        return reference.routed_experts(x, expert, best, experts)

    found = gpu_measure.measure_products(scheme, [1, 3], MACHINE, CPU, run, experts=4, hidden=128, inner=256)
    assert [figures.tokens for figures in found] == [1, 3]
    assert all(0 < figures.of_flops < 1 and 0 < figures.of_bandwidth < 1 for figures in found)


def test_quantizing_is_measured():
    assert gpu_measure.quantize_rate(CPU, rows=64, columns=256, count=3) > 0


def test_the_card_is_measured():
    machine = gpu_measure.measure_card(CPU, copy_bytes=1 << 20, size=64)
    assert machine.read_bytes_s > 0 and machine.bf16_flops > 0


@pytest.fixture
def small(monkeypatch):
    """Every size of bench/gpu.py as small as a CPU wants it."""
    sizes = {"PREFILL": {40: 2}, "DECODE": (1, 3), "DRAWN": (2,), "MAX_BATCH_TOKENS": 64, "PEER_PROMPTS": 2,
             "PEER_LENGTH": 20, "PEER_NEW": 4}  # fmt: skip
    for name, value in sizes.items():
        monkeypatch.setattr(gpu, name, value)
    config = gpu_random.scout_config
    monkeypatch.setattr(gpu_random, "scout_config", lambda layers: config(layers, 4, 4096, tiny=True))
    monkeypatch.setattr(gpu_measure, "images_per_second", lambda engine: 1.0)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 1 << 30)


def refuse():
    raise gpu_measure.Unmeasured("too small")


@pytest.mark.parametrize("scheme", ["int4", "bf16"])
def test_a_whole_model_is_measured(small, scheme, tmp_path):
    arguments = argparse.Namespace(layers=4, scheme=scheme)
    found = gpu.measure_model(arguments, CPU, tmp_path, MACHINE, 8.0)
    assert set(found["prefill"]) == {40} and set(found["decode"]) == {1, 3} and set(found["drawn"]) == {2}
    assert all(rate["per_second"] > 0 for kind in ("prefill", "decode", "drawn") for rate in found[kind].values())
    assert found["default_kv_bytes"] > 0 and found["plan_kv_bytes"] > 0
    rows = gpu.model_rows(found | {"layers": 4, "drawn": {256: gpu.rate_of(refuse)}})
    assert ("decoding, 256 at a time, drawn", "not measured: too small", "") in rows


def test_transformers_runs_beside(small, tmp_path):
    rates = gpu.measure_peer(CPU, tmp_path)
    assert rates["ours"] > 0 and rates["transformers"] > 0


FIGURES = {
    "card": "A card", "torch": "2.11", "triton": "3.6", "date": "2026-12-01", "command": "python bench/gpu.py",
    "cap_gib": 79.1, "copy_bytes_s": 4.3e12, "matmul_flops": 7.9e14, "layers": 48, "scheme": "int4",
    "weight_bytes": 64.9e9, "kv_bytes": 14 << 30, "kv_tokens": 123456, "default_kv_bytes": 15 << 30,
    "plan_kv_bytes": 16 << 30, "peak_bytes": 78 << 30,
    "prefill": {2048: {"per_second": 9000.4, "of_limit": 0.456}}, "images_s": 30.04,
    "decode": {1: {"per_second": 88.0, "of_limit": 0.6}}, "drawn": {64: {"per_second": 2000.0, "of_limit": 0.5}},
    "draw_s": {256: 1.234e-3},
    "products": [
        {"scheme": "int4", "tokens": 16, "seconds": 3e-4, "of_bandwidth": 0.74, "of_flops": 0.1},
        {"scheme": "int4", "tokens": 512, "seconds": 1e-2, "of_bandwidth": 0.1, "of_flops": 0.58},
    ],
    "quantize_bytes_s": 12.34e9, "peer": {"ours": 5000.0, "transformers": 250.0},
}  # fmt: skip


def test_the_table():
    lines = gpu.markdown(FIGURES).splitlines()
    assert lines[0].endswith("Copy 4.30 TB/s, bf16 product 790 TFLOP/s.")
    assert lines[4:] == [
        "| weights, 48 layers | 64.9 GB |  |",
        "| KV cache, steps of 8192 tokens | 14.0 GiB, 123,456 tokens |  |",
        "| KV cache, default steps | 15.0 GiB, 16.0 by `plan` | -6.2% |",
        "| memory reserved, at most | 78.0 GiB |  |",
        "| prompts of 2048 tokens | 9,000 tokens/s | 46% |",
        "| decoding, 1 at a time | 88 tokens/s | 60% |",
        "| decoding, 64 at a time, drawn | 2,000 tokens/s | 50% |",
        "| pictures of five tiles | 30.0 a second |  |",
        "| experts, 16 tokens each | 300 µs | 74% of the copy |",
        "| experts, 512 tokens each | 10,000 µs | 58% of the product |",
        "| quantizing to INT4, from host memory | 12.3 GB/s of bf16 |  |",
        "| drawing 256 tokens | 1,234 µs |  |",
        "| 4 layers in bf16, 16 prompts | 5,000 tokens/s, transformers 250 | 20.0 times |",
    ]
    short = gpu.markdown({**FIGURES, "failure": "it does not fit", "products": []} | {"peer": FIGURES["peer"]})
    assert "| weights, 48 layers | do not fit: it does not fit |  |" in short


def test_the_page_is_filled(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- gpu int4: begin -->\nold\n<!-- gpu int4: end -->\nb\n")
    gpu.write_into(page, "int4", "new\n| table |")
    assert page.read_text() == ("a\n<!-- gpu int4: begin -->\nnew\n| table |\n<!-- gpu int4: end -->\nb\n")
    with pytest.raises(SystemExit, match="has no lines"):
        gpu.write_into(page, "fp8", "x")


def test_the_cap(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 160 << 30))
    monkeypatch.setattr(torch.cuda.memory, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch._C, "_cuda_setMemoryFraction", lambda share, device: asked.append(share), raising=False)
    card = torch.device("cuda", 0)
    assert gpu.cap_memory(80, card) == 80 and gpu.cap_memory(1000, card) == 160
    assert asked == [0.5, 1.0]


@pytest.mark.parametrize("options, code, said", [
    (["--help"], 0, "--memory-cap"), (["--random", "--device", "cpu"], 1, "needs a CUDA device, not cpu"),
])  # fmt: skip
def test_the_command_line(options, code, said):
    done = subprocess.run([sys.executable, str(BENCH / "gpu.py"), *options], capture_output=True, text=True)
    assert done.returncode == code and said in done.stdout + done.stderr


def test_tiles_are_tuned(monkeypatch, capsys):
    def seconds_of(shape):
        if shape[0] == 128:
            raise MemoryError("too large")
        return 1 / sum(shape)

    shapes = [(64, 4, 3), (128, 4, 3), (64, 8, 3)]
    assert gpu_tune.fastest(shapes, seconds_of, (MemoryError,)) == [(1 / 75, (64, 8, 3)), (1 / 71, (64, 4, 3))]
    assert "(128, 4, 3): MemoryError" in capsys.readouterr().err
    with pytest.raises(MemoryError):
        gpu_tune.fastest(shapes, seconds_of, (ValueError,))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_tune.py"])
    with pytest.raises(SystemExit, match="needs a CUDA device"):
        gpu_tune.main()


def test_every_shape_is_tried(device, monkeypatch, capsys):
    for name, value in {"COLUMNS": (32, 64), "WARPS": (4,), "STAGES": (4, 5), "ROWS": (16,),
                        "EXPERTS": 2, "HIDDEN": 128, "INNER": 128}.items():  # fmt: skip
        monkeypatch.setattr(gpu_tune, name, value)
    monkeypatch.setattr(gpu_measure, "timed", lambda work, device: work().numel() / 1e6)
    gpu_tune.tune("int4", str(device))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("int4, gated, 16 rows: now (64, 4, 4)") and len(lines) == 2


def test_a_machine_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--random"])
    with pytest.raises(SystemExit, match=r"needs a CUDA device: .*torch sees 0"):
        gpu.main()
