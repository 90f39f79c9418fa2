"""Worker processes: the same answers, none lost and none twice whoever dies, blame where it belongs, no orphans."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from batch.backends import shares, workers
from batch.backends.base import ListSource
from batch.backends.shares import cpu_shares, cuda_shares, usable_cores
from batch.backends.worker_channel import WorkerJob
from batch.backends.worker_handle import Share
from batch.backends.workers import WorkersBackend, embedded_workers
from batch.job import BatchOptions, run_batch
from batch.requests import ImageTiles, PreparedRequest, SamplingParams
from batch.state import StateOptions
from l4tool.core.errors import EXIT_INTERNAL, DeviceError, L4Error, UsageError
from tests.batch.backends import frail
from tests.batch.backends.frail import DEADLY, DEADLY_ONCE

ROOT = Path(__file__).resolve().parents[3]
two_cores = pytest.mark.skipif(len(usable_cores()) < 2, reason="needs two cores")


@pytest.fixture
def backend(tmp_path):
    """backend(factory=…, count=2, **engine) → a WorkersBackend over the test's own worker code."""
    made = []

    def call(factory="make", count=2, **engine):
        job = WorkerJob(tmp_path, f"tests.batch.backends.frail:{factory}", engine)
        made.append(WorkersBackend(job, [Share((0,))] * count, pin_cores=False))
        return made[-1]

    yield call
    for one in made:
        one.close()


def request(key, *prompt, **fields):
    return PreparedRequest(key, list(prompt or (key,)), SamplingParams(4), **fields)


def check(results, requests):
    """One result per request, the right one. Returns the errors: {key: code}."""
    assert sorted(r.key for r in results) == sorted(r.key for r in requests)
    prompts = {r.key: r.prompt for r in requests}
    for result in results:
        if result.error_code is None:
            assert result.choices[0].token_ids[: len(prompts[result.key])] == prompts[result.key][::-1]
    return {result.key: result.error_code for result in results if result.error_code is not None}


def processes(backend):
    return {worker.process.pid for worker in backend.workers if worker.process is not None}


def test_all_workers_work_and_figures_are_added_up(backend):
    pool = backend(step_s=0.002)
    requests = [request(key) for key in range(200)]
    for _ in range(2):  # a backend runs again and again
        results = list(pool.run(ListSource(requests)))
        assert check(results, requests) == {}
        by_worker = [[r.choices[0].text for r in results].count(str(pid)) for pid in processes(pool)]
        assert len(by_worker) == 2 and min(by_worker) > 50
    assert pool.stats == {"steps": 400, "peak_work": 4, "workers": 2, "restarts": 0, "poison": 0}


def test_keys_of_requests_may_repeat_and_pixels_arrive(backend):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3, 336, 336), dtype=np.uint8)
    pictures = (ImageTiles(pixels, (1, 2)), ImageTiles(pixels[::2], (1, 1)))
    requests = [request(1, 5, images=pictures), request(1, 5, images=pictures)]
    results = list(backend().run(ListSource(requests)))
    expected = [5, int(pixels.sum()), int(pixels[::2].sum())]
    assert [(r.key, r.choices[0].token_ids) for r in results] == [(1, expected)] * 2


def test_workers_take_no_more_than_they_can_use(backend):
    taken = 0

    class Endless:
        def take(self, wait):
            nonlocal taken
            taken += 1
            return request(taken)

    results = backend(step_s=0.001).run(Endless())
    for _ in range(100):
        next(results)
    assert taken <= 100 + 2 * (workers.MAX_WAITING + 4) + 16
    results.close()


def test_pictures_at_workers_are_bounded(backend, monkeypatch):
    monkeypatch.setattr(workers, "PIXEL_BYTES", 10_000)
    monkeypatch.setattr(workers, "MIN_PIXEL_BYTES", 5_000)
    picture = ImageTiles(np.zeros((1, 3, 30, 30), np.uint8), (1, 1))
    pool = backend(step_s=0.001)
    most = 0
    for _ in pool.run(ListSource([request(key, images=(picture,)) for key in range(60)])):
        most = max(most, *(worker.load for worker in pool.workers))
    assert most == 2  # 2,700 bytes each


def test_killed_workers_lose_nothing(backend):
    pool, rng = backend(step_s=0.002), random.Random(1)
    requests = [request(key) for key in range(300)]
    results, killed, due = [], 0, [20, 90, 150, 160, 220]
    for result in pool.run(ListSource(requests)):
        results.append(result)
        # Not one that runs a line alone: that line would rightly be blamed.
        busy = sorted(worker.process.pid for worker in pool.workers if worker.process is not None and worker.load > 1)
        if due and len(results) >= due[0] and busy:
            os.kill(rng.choice(busy), signal.SIGKILL)
            killed += 1
            due.pop(0)
    assert check(results, requests) == {}
    assert killed >= 3 and 1 <= pool.stats["restarts"] <= killed  # one may be hit twice before that is noticed


def test_only_the_line_that_kills_is_blamed(backend, capfd, monkeypatch):
    monkeypatch.setattr(workers, "MAX_DEATHS", 3)  # in a row; here are more, with answers between
    requests = [request(key, DEADLY if key in (3, 4, 40) else key) for key in range(80)]
    pool = backend(step_s=0.002)
    assert check(list(pool.run(ListSource(requests))), requests) == dict.fromkeys((3, 4, 40), "poison")
    assert pool.stats["poison"] == 3 and 3 < pool.stats["restarts"] <= 6
    assert "was ended by SIGKILL; it is started again" in capfd.readouterr().err


def test_a_line_that_kills_once_is_answered(backend):
    requests = [request(key, DEADLY_ONCE if key == 5 else key) for key in range(20)]
    pool = backend()
    assert check(list(pool.run(ListSource(requests))), requests) == {}
    assert pool.stats["restarts"] == 1


@pytest.mark.parametrize("count", [1, 2])
def test_a_deadly_line_all_alone(backend, count):
    requests = [request(0, DEADLY)]
    assert check(list(backend(count=count).run(ListSource(requests))), requests) == {0: "poison"}


def test_when_nothing_is_answered_no_line_is_blamed(backend):
    results = []
    with pytest.raises(DeviceError, match=r"died 11 times with no answer between.*SIGKILL"):
        for result in backend().run(ListSource([request(key, DEADLY) for key in range(60)])):
            results.append(result)
    assert results == []


def test_a_line_that_cannot_travel_is_an_error_of_that_line(backend):
    odd = {4: frail.Unreadable(), 9: frail.Unsendable()}
    requests = [request(key, grammar=odd.get(key)) for key in range(20)]
    pool = backend()
    results = list(pool.run(ListSource(requests)))
    assert check(results, requests) == {4: "internal_error", 9: "internal_error"}
    said = {r.key: r.error_message for r in results if r.error_code}
    assert "not a request: 7" in said[4] and "stays here" in said[9]
    assert pool.stats["restarts"] == 0


@pytest.mark.parametrize(
    ("factory", "error", "text"),
    [("die_at_start", DeviceError, "SIGKILL while it loaded the model"), ("break_at_start", L4Error, "a bug")],
)
def test_workers_that_cannot_start_end_the_run(backend, factory, error, text):
    with pytest.raises(error, match=text) as caught:
        backend(factory)
    assert caught.value.exit_code == (EXIT_INTERNAL if error is L4Error else 69)


def test_what_a_worker_says_when_it_cannot_start_is_the_error(backend):
    with pytest.raises(DeviceError, match="the device is gone") as caught:
        backend(starts=1)
    assert caught.value.hint == "look for it"


def test_a_worker_that_starts_no_more_leaves_its_lines_to_the_others(backend, capfd):
    pool, requests = backend(starts=2), []

    def until_one_is_given_up():
        while len(processes(pool)) == 2:
            requests.append(request(len(requests), DEADLY_ONCE if len(requests) == 5 else 1))
            yield requests[-1]

    assert check(list(pool.run(ListSource(until_one_is_given_up()))), requests) == {}
    assert len(requests) > 5
    assert "does not start any more: the device is gone; the others carry on" in capfd.readouterr().err


def test_when_no_worker_starts_any_more_the_run_ends(backend):
    with pytest.raises(DeviceError, match="the device is gone"):
        list(backend(starts=2).run(ListSource([request(key, DEADLY) for key in range(40)])))


def test_a_run_that_is_given_up_leaves_nothing_behind(backend):
    pool = backend(step_s=0.01)
    results = pool.run(ListSource([request(key) for key in range(40)]))
    next(results)
    results.close()
    again = [request(key) for key in range(100, 120)]
    assert check(list(pool.run(ListSource(again))), again) == {}
    alive = processes(pool)
    pool.close()
    assert len(alive) == 2 and not any(psutil.pid_exists(pid) for pid in alive)


def test_cores_are_split_and_siblings_stay_together(monkeypatch):
    monkeypatch.setattr(shares, "usable_cores", lambda: list(range(8)))
    monkeypatch.setattr(shares, "_place", lambda cpu: (0, cpu % 4, cpu))  # 0 and 4 are threads of one core
    assert [share.cores for share in cpu_shares(2)] == [(0, 4, 1, 5), (2, 6, 3, 7)]
    assert sorted(core for share in cpu_shares(3) for core in share.cores) == list(range(8))
    with pytest.raises(UsageError, match="9 workers on 8 CPU cores"):
        cpu_shares(9)


def test_each_worker_has_a_device_and_its_share_of_threads(monkeypatch):
    monkeypatch.setattr(shares, "usable_cores", lambda: [0, 1, 2, 3])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    found = [share.environment() for share in cuda_shares(2, 2)]
    assert [e["CUDA_VISIBLE_DEVICES"] for e in found] == ["5", "7"]
    assert [e["OMP_NUM_THREADS"] for e in found] == ["2", "2"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert [share.cuda_device for share in cuda_shares(3, 8)] == ["0", "1", "2"]
    with pytest.raises(UsageError, match="3 workers on 2 CUDA devices"):
        cuda_shares(3, 2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_workers_on_devices_that_are_not_there(tmp_path):
    with pytest.raises(DeviceError, match="cuda is not available"):
        embedded_workers(tmp_path, {"device": "cuda", "max_seqs": None}, 2)


# -- the command with the real engine


LINES = [{"id": i, "prompt": f"number {i} " * (i % 7 + 1), "max_tokens": 10 + i % 20, "seed": i} for i in range(48)]
PICTURE = {"id": "picture", "prompt": "What is this?", "images": ["wide.png"], "temperature": 1.0, "max_tokens": 12}


def write_input(folder):
    Image.linear_gradient("L").resize((150, 60)).save(folder / "wide.png")
    (folder / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [PICTURE, *LINES]))
    return folder


@pytest.fixture
def folder(tmp_path):
    return write_input(tmp_path)


@pytest.fixture(scope="module")
def expected(scout_tiny, tmp_path_factory):
    """What one engine in this process answers, by id."""
    return answers(write_input(tmp_path_factory.mktemp("one")), scout_tiny, workers=1)


def answers(folder, model, **options):
    target = folder / "out.jsonl"
    run_batch(BatchOptions(folder / "in.jsonl", target, model, state=StateOptions(), dtype="float32", **options))
    return parsed(target)


def parsed(target):
    lines = [json.loads(line) for line in target.read_text().splitlines()]
    assert len({line["id"] for line in lines}) == len(lines)
    return {line["id"]: line for line in lines}


@pytest.fixture
def command(folder, scout_tiny):
    """command() → a running `l4tool batch --workers 2`, in a process group of its own."""
    started = []

    def call(*options):
        code = "import sys; from l4tool.main import main; sys.exit(main(sys.argv[1:]))"
        arguments = [folder / "in.jsonl", folder / "out.jsonl", "--model", scout_tiny, "--dtype", "float32"]
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", code, "batch", *map(str, arguments), "--workers", "2", *options],
                cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True,
            )
        )  # fmt: skip
        return started[-1]

    yield call
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # workers that outlived it too
        process.communicate()


def until(condition, timeout_s=60):
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)
    return found


def has_lines(folder, count):
    target = folder / "out.jsonl"
    return lambda: target.exists() and target.read_bytes().count(b"\n") >= count


def children(process):
    found = psutil.Process(process.pid).children()
    assert len(found) == 2
    return found


def are_gone(found):
    return lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in found)


@two_cores
def test_answers_do_not_depend_on_the_number_of_workers(folder, scout_tiny, expected):
    assert answers(folder, scout_tiny, workers=2) == expected


@two_cores
def test_a_worker_killed_while_the_command_runs(folder, command, expected):
    process = command("--max-seqs", "8")
    until(has_lines(folder, 5))
    children(process)[0].kill()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert "it is started again" in said
    assert parsed(folder / "out.jsonl") == expected


@two_cores
def test_nothing_outlives_a_killed_command(folder, command):
    process = command()
    until(has_lines(folder, 1))
    found = children(process)
    found[0].suspend()  # cannot notice anything by itself
    process.kill()
    until(are_gone(found), timeout_s=5)


@two_cores
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_to_the_whole_group_stop_in_good_order(folder, scout_tiny, command, expected, number, code):
    process = command("--max-seqs", "4")
    until(has_lines(folder, 5))
    found = children(process)
    os.killpg(process.pid, number)
    _, said = process.communicate(timeout=30)
    assert process.returncode == code, said
    assert "Traceback" not in said and "started again" not in said
    until(are_gone(found), timeout_s=5)
    before = parsed(folder / "out.jsonl")
    assert 5 <= len(before) < len(LINES) and before.items() <= expected.items()
    if number == signal.SIGTERM:
        assert answers(folder, scout_tiny, workers=2) == expected


@two_cores
def test_a_model_that_does_not_load_in_workers(command):
    process = command("--kv-memory", "1KB")
    _, said = process.communicate(timeout=60)
    assert process.returncode == 69 and "of KV memory hold no block" in said and "hint: give --kv-memory" in said, said
