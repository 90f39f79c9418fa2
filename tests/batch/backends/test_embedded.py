"""The embedded backend end to end on a tiny model: requests in, texts out."""

import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from batch.backends import memory
from batch.backends.base import ListSource
from batch.backends.embedded import EmbeddedBackend, EmbeddedOptions, engine_config
from batch.backends.memory import available_bytes, default_kv_bytes
from batch.requests import ImageTiles, PreparedRequest, SamplingParams
from l4tool.core.errors import UsageError

OPTIONS = EmbeddedOptions(dtype="float32", max_batch_tokens=64, kv_memory_bytes=8 << 20, max_seqs=8, block_size=16)


def make_backend(model, tokenizer, **changes):
    eos = changes.pop("eos_token_ids", ())
    return EmbeddedBackend(model, tokenizer, replace(OPTIONS, **changes), eos_token_ids=eos)


def request(key, tokenizer, text="Write a line about water.", max_tokens=20, **fields):
    sampling = {name: fields.pop(name) for name in list(fields) if name in SamplingParams.__dataclass_fields__}
    return PreparedRequest(key, tokenizer.encode(text), SamplingParams(max_tokens, **sampling), **fields)


def results_of(backend, requests):
    results = list(backend.run(ListSource(requests)))
    assert sorted(r.key for r in results) == sorted(r.key for r in requests)
    assert not backend.engine.has_work and backend.engine.blocks.full.num_used == 0
    return {result.key: result for result in results}


def text_of(result):
    assert result.error_code is None, result.error_message
    return result.choices[0].text


def test_from_a_path_to_texts(scout_tiny, model, tokenizer):
    backend = EmbeddedBackend(scout_tiny, tokenizer, EmbeddedOptions(dtype="float32"))
    result = results_of(backend, [request(7, tokenizer)])[7]
    (choice,) = result.choices
    assert result.prompt_tokens == len(tokenizer.encode("Write a line about water."))
    assert choice.index == 0 and choice.logprobs is None
    ended = choice.finish_reason == "stop"
    assert ended == (choice.token_ids[-1] in model.arch.text.eos_token_ids)
    assert choice.text == tokenizer.decode(choice.token_ids[:-1] if ended else choice.token_ids)
    backend.close()
    assert backend.engine.runner.kv is None


def test_stop_token_ends_the_text_and_is_not_in_it(model, tokenizer):
    backend = make_backend(model, tokenizer)
    free = results_of(backend, [request(0, tokenizer)])[0].choices[0]
    assert free.finish_reason == "length" and len(free.token_ids) == 20
    stop_id = free.token_ids[9]
    first = free.token_ids.index(stop_id)
    cut = results_of(backend, [request(0, tokenizer, stop_token_ids=frozenset({stop_id}))])[0].choices[0]
    assert cut.finish_reason == "stop" and cut.token_ids == free.token_ids[: first + 1]
    assert cut.text == tokenizer.decode(free.token_ids[:first])


@pytest.mark.parametrize("seed", range(6))
def test_stop_strings_cut_the_text_wherever_they_fall(model, tokenizer, seed):
    backend = make_backend(model, tokenizer)
    free = results_of(backend, [request(0, tokenizer, max_tokens=40, temperature=1.0, seed=seed)])[0].choices[0]
    start = int(np.random.default_rng(seed).integers(5, len(free.text) - 8))
    stop = next(free.text[i : i + 5] for i in range(start, 0, -1) if "\ufffd" not in free.text[i : i + 5])
    asked = request(0, tokenizer, max_tokens=40, temperature=1.0, seed=seed, stop=("never this", stop))
    cut = results_of(backend, [asked])[0].choices[0]
    assert cut.finish_reason == "stop"
    assert cut.text == free.text[: free.text.index(stop)]
    assert cut.token_ids == free.token_ids[: len(cut.token_ids)] and len(cut.token_ids) <= 40
    assert stop in tokenizer.decode(cut.token_ids) and stop not in tokenizer.decode(cut.token_ids[:-1])


def test_special_tokens_are_echoed_only_on_request(model, tokenizer):
    eot = tokenizer.control_id("<|eot|>")
    # Any token that this model draws may stand in for the end token: what is special is decided by the tokenizer.
    backend = make_backend(model, tokenizer, eos_token_ids=[eot])
    asked = request(0, tokenizer, max_tokens=60, temperature=3.0, seed=4)
    plain = results_of(backend, [asked])[0].choices[0]
    echoed = results_of(backend, [replace(asked, echo_special=True)])[0].choices[0]
    assert plain.token_ids == echoed.token_ids
    assert any(token in tokenizer.special_ids for token in plain.token_ids)
    assert "<|" not in plain.text and "<|" in echoed.text


def test_n_choices_differ_and_the_first_is_the_single_one(model, tokenizer):
    backend = make_backend(model, tokenizer)
    single = request(0, tokenizer, temperature=1.0, seed=11)
    several = results_of(backend, [replace(single, key=1, n=4), single])
    assert [c.index for c in several[1].choices] == [0, 1, 2, 3]
    assert several[1].choices[0].token_ids == several[0].choices[0].token_ids
    assert len({tuple(c.token_ids) for c in several[1].choices}) == 4
    assert results_of(backend, [replace(single, key=1, n=4)])[1].choices == several[1].choices


def test_logprobs_travel_with_every_choice(model, tokenizer):
    backend = make_backend(model, tokenizer)
    for choice in results_of(backend, [request(0, tokenizer, temperature=1.0, n=2, logprobs=3)])[0].choices:
        assert [p.token_id for p in choice.logprobs] == choice.token_ids
        assert all(len(p.top) == 3 and p.logprob <= p.top[0][1] for p in choice.logprobs)


def test_errors_are_results_and_the_others_go_on(model, tokenizer):
    requests = [request(i, tokenizer, n=1 + i % 2) for i in range(6)]
    requests[1] = replace(requests[1], prompt=[])
    requests[3] = replace(requests[3], prompt=[1] * 5000)
    requests[4] = replace(requests[4], images=(ImageTiles(np.zeros((1, 3, 56, 56), np.uint8), (1, 1)),))
    results = results_of(make_backend(model, tokenizer), requests)
    codes = [results[i].error_code for i in range(6)]
    assert codes == [None, "empty_prompt", None, "context_length_exceeded", "image_mismatch", None]
    assert all(results[i].choices == [] and results[i].error_message for i in (1, 3, 4))
    assert [len(results[i].choices) for i in (0, 2, 5)] == [1, 1, 2]


def test_one_failing_choice_fails_its_request_once(model, tokenizer, monkeypatch):
    forward = type(model).forward
    steps = []

    def broken_later(self, step, kv):
        steps.append(step)
        logits = forward(self, step, kv).clone()
        if len(steps) == 3:
            logits[1] = torch.nan  # the second choice
        return logits

    monkeypatch.setattr(type(model), "forward", broken_later)
    results = results_of(make_backend(model, tokenizer), [request(0, tokenizer, n=3), request(1, tokenizer)])
    assert results[0].error_code == "model_error" and results[0].choices == []
    assert text_of(results[1])


class CountingSource:
    """Counts what was pulled and not yet answered; sometimes has nothing ready."""

    def __init__(self, requests):
        self.requests = iter(requests)
        self.open = self.most_open = self.calls = 0

    def take(self, wait):
        self.calls += 1
        if not wait and self.calls % 3 == 0:
            return None
        request = next(self.requests, None)
        self.open += request is not None
        self.most_open = max(self.most_open, self.open)
        return request


def test_only_a_bounded_window_is_pulled_and_results_come_as_they_finish(model, tokenizer):
    backend = make_backend(model, tokenizer)
    requests = [request(i, tokenizer, max_tokens=40 if i == 0 else 3) for i in range(120)]
    source = CountingSource(requests)
    finished = []
    for result in backend.run(source):
        source.open -= 1
        finished.append(result.key)
    assert sorted(finished) == list(range(120))
    assert source.most_open <= OPTIONS.max_seqs
    assert 0 < finished.index(0) < 119  # the long one neither blocks the others nor waits for them


def test_results_do_not_depend_on_company_or_pools(model, tokenizer):
    texts = ["One.", "Two and some more words than before.", "Three " * 30, "Four?"]
    requests = [
        request(i, tokenizer, text, max_tokens=60, temperature=0.9, top_p=0.95, seed=i)
        for i, text in enumerate(texts * 2)
    ]
    wide = results_of(make_backend(model, tokenizer), requests)
    narrow = make_backend(model, tokenizer, kv_memory_bytes=640 << 10, max_batch_tokens=40)
    tight = results_of(narrow, requests[::-1])
    assert narrow.stats.preemptions > 0
    assert all(wide[i].choices == tight[i].choices for i in range(8))


def test_leaving_early_frees_everything_and_the_backend_can_run_again(model, tokenizer):
    backend = make_backend(model, tokenizer)
    results = backend.run(ListSource([request(i, tokenizer, max_tokens=5 + 40 * (i > 0)) for i in range(5)]))
    assert next(results).key == 0
    results.close()
    assert not backend.engine.has_work and backend.engine.blocks.full.num_used == 0
    assert text_of(results_of(backend, [request(3, tokenizer)])[3])


def test_options_have_sensible_defaults(model):
    config = engine_config(model, EmbeddedOptions())
    assert config.block_size == 16 and config.max_seqs <= config.max_batch_tokens
    assert 0 < config.kv_bytes <= available_bytes()
    assert engine_config(model, EmbeddedOptions(max_batch_tokens=3)).max_seqs == 3
    with pytest.raises(UsageError, match="chunk of 32"):
        engine_config(model, EmbeddedOptions(block_size=24))


@pytest.mark.parametrize("version", [1, 2])
def test_default_kv_memory_respects_a_cgroup_limit(tmp_path, monkeypatch, version):
    """The limit may be on any group above one's own; cached file pages are no obstacle."""
    names = memory.CGROUP_FILES[version]
    own, root = tmp_path / "cgroup", tmp_path / "fs"
    own.write_text("4:memory:/a/b\n3:cpu:/c\n" if version == 1 else "0::/a/b\n")
    group = root / "memory" / "a" if version == 1 else root / "a"
    group.mkdir(parents=True)
    monkeypatch.setattr(memory, "OWN_CGROUPS", own)
    monkeypatch.setattr(memory, "CGROUP_ROOT", root)
    (group / names[0]).write_text("1000000\n")
    (group / names[1]).write_text("400000\n")
    assert available_bytes() == 600_000
    assert default_kv_bytes(torch.device("cpu"), 0) == 300_000
    (group / "memory.stat").write_text(f"other 5\n{names[2]} 300000\n")
    assert available_bytes() == 900_000
    (group / names[0]).write_text("max\n")
    assert available_bytes() > 900_000


def test_waiting_for_input_and_for_whoever_takes_the_results_is_counted(model, tokenizer):
    class Slow(ListSource):
        def take(self, wait):
            time.sleep(0.05)
            return super().take(wait)

    backend = make_backend(model, tokenizer)
    began_s = time.perf_counter()
    for _ in backend.run(Slow([request(i, tokenizer, max_tokens=2) for i in range(4)])):
        time.sleep(0.1)
    took_s = time.perf_counter() - began_s
    stats = backend.stats
    assert stats.input_wait_s >= 5 * 0.05 and stats.output_wait_s >= 4 * 0.1
    assert stats.input_wait_s + stats.output_wait_s < stats.run_s <= took_s
