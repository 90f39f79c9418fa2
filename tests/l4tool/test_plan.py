"""`l4tool plan` as a user types it: folders, configs and repositories; text, JSON and exit codes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from l4tool.main import main
from quant import pipeline
from tests import checkpoints
from tests.converters import published
from tests.hub.server import HubServer

ROOT = Path(__file__).resolve().parents[2]
NAME = "demo/Llama-4-Tiny"


@pytest.fixture
def config(tmp_path):
    """Writes a config.json and gives its path."""

    def write(values, name="config.json"):
        path = tmp_path / name
        path.write_text(values if isinstance(values, str) else json.dumps(values))
        return str(path)

    return write


@pytest.fixture
def plan(capsys):
    """Runs the command; gives (exit code, stdout, stderr)."""

    def run(*arguments):
        code = main(["plan", *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def answer(plan):
    def run(*arguments):
        code, out, err = plan(*arguments, "--json")
        assert code == 0 and not err, err
        return json.loads(out)

    return run


def test_all_schemes_side_by_side(plan, config):
    code, out, err = plan(config(published.scout()))
    assert code == 0 and not err
    assert "1 × h100, 79.1 GiB usable each" in out
    table = [line for line in out.splitlines() if line.endswith((" yes", " no"))]
    assert [line.split()[0] for line in table] == ["bfloat16", "--int4", "--mixed", "--fp8"]
    assert [line.split()[-1] for line in table] == ["no", "yes", "yes", "no"]
    assert "60.4 GiB" in table[1] and "107 GiB" in table[3]
    assert "--fp8 does not fit 1 × h100: 107 GiB of weights" in out
    assert "It fits 2 × h100, 1 × h200, 1 × b200, 1 × mi300x. On 1 × h100: --int4 or --mixed." in out


def test_one_scheme_in_detail(plan, config):
    code, out, _ = plan(config(published.scout()), "--int4", "--context", "32k", "--concurrency", "2")
    assert code == 0
    for told in ("--int4 on disk", "time, estimated from 0.83 GB/s", "reserved", "blocks of 32 tokens, NoPE layers",
                 "sequences of 32,768 tokens at once", "--int4 fits 1 × h100."):  # fmt: skip
        assert told in out


def test_a_scheme_that_does_not_fit_names_those_that_do(plan, config):
    _, out, _ = plan(config(published.scout()), "--fp8")
    assert out.strip().splitlines()[-1] == (
        "--fp8 does not fit 1 × h100: 107 GiB of weights and 2.58 GiB reserved on a GPU of 79.1 GiB. "
        "It fits 2 × h100, 1 × h200, 1 × b200, 1 × mi300x. On 1 × h100: --int4 or --mixed."
    )
    _, out, _ = plan(config(published.scout()), "--int4", "--concurrency", "64")
    assert "hold 9 of 64 sequences of 8,192 tokens" in out
    _, out, _ = plan(config(published.scout()), "--int4", "--gpus", "3")
    assert "--int4 does not fit 3 × h100: 40 attention heads do not divide over 3 GPUs. It fits 4 × h100, " in out


def test_fp8_keys_and_values_take_half(plan, answer, config):
    source = config(published.scout())
    plain, halved = answer(source, "--int4"), answer(source, "--int4", "--kv-dtype", "fp8")
    assert (plain["kv_dtype"], halved["kv_dtype"]) == ("auto", "fp8")
    plain, halved = (found["schemes"]["int4"]["per_gpu"] for found in (plain, halved))
    assert 2 * halved["kv_bytes_per_sequence"] == plain["kv_bytes_per_sequence"]
    assert halved["kv_bytes"] == plain["kv_bytes"] and 2 * plain["full_blocks"] <= halved["full_blocks"] + 1
    assert halved["longest_tokens"] > plain["longest_tokens"]
    _, out, _ = plan(source, "--int4", "--concurrency", "12")
    assert "--int4 does not fit 1 × h100" in out and "With --kv-dtype fp8 it does. It fits 2 × h100" in out
    found = answer(source, "--int4", "--concurrency", "12")["schemes"]["int4"]
    assert not found["fits"] and found["fits_with_fp8_kv"]
    assert not answer(source, "--int4", "--concurrency", "12", "--kv-dtype", "fp8")["schemes"]["int4"][
        "fits_with_fp8_kv"
    ]
    assert "FP8 KV cache/GPU" in plan(source, "--kv-dtype", "fp8")[1]
    assert "KV cache, FP8" in plan(source, "--int4", "--kv-dtype", "fp8")[1]


def test_json_has_everything_under_keys_that_stay(answer, config):
    found = answer(config(published.maverick()), "--gpus", "8", "--context", "128k", "--concurrency", "4")
    assert found["model"] == {
        "name": found["model"]["name"], "layout": "hf", "quantized": False, "dtype": "bfloat16",
        "parameters": found["model"]["parameters"], "layers": 48, "experts": 128, "context_tokens": 1048576,
        "file_bytes": 2 * found["model"]["parameters"],
    }  # fmt: skip
    assert found["gpu"] == {"name": "h100", "count": 8, "usable_bytes": int(79.1 * 2**30)}
    assert (found["context_tokens"], found["concurrency"]) == (131072, 4)
    assert list(found["schemes"]) == ["stored", "int4", "mixed", "fp8"]
    for scheme in found["schemes"].values():
        assert set(scheme) == {
            "file_bytes", "tensor_bytes", "quantize", "per_gpu", "fits", "would_fit", "schemes_that_fit",
            "fits_with_fp8_kv",
        }  # fmt: skip
        assert set(scheme["per_gpu"]) == {
            "obstacle", "weight_bytes", "reserved_bytes", "kv_bytes", "kv_bytes_per_sequence", "block_tokens",
            "full_blocks", "chunked_blocks", "longest_tokens", "sequences", "sequences_by_memory", "weights_fit",
            "fits",
        }  # fmt: skip
    assert set(found["schemes"]["int4"]["quantize"]) == {
        "source_file_bytes", "disk_bytes", "streaming_disk_bytes", "memory_bytes", "pieces_at_once",
        "gigabytes_per_s", "seconds", "limited_by_disk",
    }  # fmt: skip
    assert found["schemes"]["stored"]["quantize"] is None
    assert found["schemes"]["stored"]["would_fit"][0] == {"gpu": "h200", "count": 8}


def test_a_hypothetical_model(answer, config):
    """Behemoth's announced size: 2 T parameters, 16 experts. Everything else about it is made up here."""
    values = published.scout()
    values["text_config"] |= {
        "num_hidden_layers": 96, "hidden_size": 16384, "intermediate_size": 24576, "num_attention_heads": 128,
        "num_key_value_heads": 8, "interleave_moe_layer_step": 1, "max_position_embeddings": 1048576,
    }  # fmt: skip
    found = answer(config(values), "--gpus", "16", "--gpu", "h200")
    assert 1.9e12 < found["model"]["parameters"] < 2.2e12
    assert not found["schemes"]["stored"]["fits"] and found["schemes"]["int4"]["fits"]


@pytest.fixture(scope="module")
def quantized(scout_tiny, tmp_path_factory):
    from converters.detect import open_checkpoint
    from quant.schemes import make_recipe

    out = tmp_path_factory.mktemp("quantized") / "model"
    pipeline.quantize(open_checkpoint(scout_tiny), out, make_recipe("int4"), pipeline.Options())
    return out


def test_a_quantized_folder_is_taken_as_it_is(plan, answer, quantized, scout_tiny):
    found = answer(quantized)
    assert list(found["schemes"]) == ["stored"] and found["model"]["quantized"]
    before = answer(scout_tiny, "--int4")["schemes"]["int4"]
    assert found["schemes"]["stored"]["per_gpu"] == before["per_gpu"]
    assert plan(quantized)[1].endswith("as it is fits 1 × h100.\n")
    assert plan(quantized, "--fp8")[0] == 64


def test_the_default_context_is_at_most_the_models(answer, scout_tiny):
    assert answer(scout_tiny)["context_tokens"] == 4096


@pytest.fixture
def hub(scout_tiny, tmp_path):
    """(a hub server, a function that runs the command in a shell of its own with HF_ENDPOINT set to it)."""
    with HubServer() as server:
        server.add_repo(NAME, scout_tiny)
        clean = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        environment = clean | {
            "HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "hf"), "XDG_CACHE_HOME": str(tmp_path / "cache"),
        }  # fmt: skip

        def run(*arguments, **more):
            command = [sys.executable, "-m", "l4tool.main", "plan", *arguments]
            return subprocess.run(command, env=environment | more, cwd=ROOT, capture_output=True, text=True)

        yield server, run


def test_a_repository_by_a_few_small_reads(answer, hub, scout_tiny):
    server, run = hub
    expected = answer(scout_tiny)["schemes"]
    first = run(NAME, "--json")
    assert first.returncode == 0 and not first.stderr, first.stderr
    assert json.loads(first.stdout)["schemes"] == expected
    for path in scout_tiny.glob("*.safetensors"):
        assert 0 < server.bytes_sent(path.name) <= 64 * 1024
    before = server.bytes_sent()
    again = run(f"{NAME}@main", "--json")
    assert json.loads(again.stdout)["schemes"] == expected and server.bytes_sent() == before


def test_a_repository_in_the_shared_cache_needs_no_network(answer, scout_tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    folder = tmp_path / "models--demo--Llama-4-Tiny"
    checkpoints.copy(scout_tiny, folder / "snapshots" / ("a" * 40))
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("a" * 40)
    assert answer(NAME)["schemes"] == answer(scout_tiny)["schemes"]


def test_a_gated_repository_needs_a_token(hub, scout_tiny):
    server, run = hub
    server.add_repo("demo/gated", scout_tiny, gated=True)
    server.tokens = {"good-token"}
    refused = run("demo/gated")
    assert refused.returncode == 78 and not refused.stdout, refused.stderr
    assert len(refused.stderr.splitlines()) == 2 and "hint:" in refused.stderr
    assert run("demo/gated", HF_TOKEN="good-token").returncode == 0


BAD = [
    (["--context", "0"], 64, "not a number of tokens"),
    (["--context", "11M"], 64, "more than the 10,485,760 tokens"),
    (["--gpu", "h1000"], 64, "not a GPU"),
    (["--gpus", "0"], 64, "--gpus"),
    (["--int4", "--fp8"], 64, "exclude each other"),
    (["--disk-speed", "0"], 64, "never ends"),
    (["--disk-speed", "fast"], 64, "not a size"),
    (["--memory", "1KiB"], 64, "too little"),
    (["--group-size", "100"], 64, "not a multiple of 8"),
    (["--mixed", "--no-shared-experts"], 64, "--int4 --no-shared-experts"),
]


@pytest.mark.parametrize(("options", "code", "told"), BAD)
def test_bad_options(options, code, told, plan, config):
    found, out, err = plan(config(published.scout()), *options)
    assert found == code and told in err and not out and "Traceback" not in err


def test_bad_models(plan, config, tmp_path):
    cases = [
        ("nowhere", 66, "neither"),
        ("", 66, "neither"),
        ("x" * 5000, 66, "neither"),
        (tmp_path, 66, "config.json"),
        (config("{", "a.json"), 65, "not valid JSON"),
        (config("[]", "b.json"), 65, "not an object"),
        (config("{}", "c.json"), 65, "model_type"),
        (config({"model_type": "llama"}, "d.json"), 65, "Llama 4"),
        (config("x", "model.bin"), 66, "is a file"),
    ]
    for model, code, told in cases:
        found, out, err = plan(model)
        assert (found, out) == (code, "") and told in err and "internal" not in err, err


def test_check_sets_the_exit_code(plan, config):
    scout = config(published.scout())
    assert plan(scout, "--int4", "--check")[0] == 0
    code, out, err = plan(scout, "--fp8", "--check")
    assert code == 69 and out and len(err.splitlines()) == 1
    assert plan(scout, "--check")[0] == 0  # two of the schemes fit
    assert plan(scout, "--check", "--gpu", "24GiB")[0] == 69


def test_nothing_heavy_for_help():
    code = "import sys; from l4tool.main import main; main(['plan', '--help']); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "--concurrency" in done.stdout, done.stderr


def test_a_spoilt_folder(plan, scout_tiny, tmp_path):
    folder = checkpoints.copy(scout_tiny, tmp_path / "model")
    shard = checkpoints.shards(folder)[0]
    shard.write_bytes(shard.read_bytes()[:-1])
    code, out, err = plan(folder)
    assert code == 65 and not out and "truncated" in err
