"""Whole files of damaged lines: one valid output line for every line that is not blank, whatever it holds."""

import json
import random

from hypothesis import given, settings
from hypothesis import strategies as st

from batch.job import BatchOptions, run_batch
from tests.batch.job.conftest import EchoBackend
from tests.batch.job.test_prepare import VALID


def damaged_file(seed, count):
    """Lines from VALID with bytes flipped, cut out, doubled or added, newlines and NULs among them."""
    generator = random.Random(seed)
    lines = []
    for _ in range(count):
        line = bytearray(json.dumps(generator.choice(VALID), ensure_ascii=generator.random() < 0.5).encode())
        for _ in range(generator.choice([0, 1, 1, 2, 5])):
            place = generator.randrange(len(line))
            piece = generator.choice(
                [b"\n", b"\x00", b"\xff", b'"', b"{", b"}", b"\\ud800", b"NaN", b"1e999", b",", b"\r"]
            )
            action = generator.randrange(4)
            if action == 0:
                line[place] = generator.randrange(256)
            elif action == 1:
                del line[place : place + generator.randrange(1, 9)]
            elif action == 2:
                line[place:place] = piece
            else:
                line[place:place] = line[place : place + 40]
            line = line or bytearray(b"x")
        lines.append(bytes(line))
    return generator.choice([b"\n", b"\r\n"]).join(lines)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_every_line_of_a_damaged_file_is_answered_once(scout_tiny, tmp_path_factory, seed):
    folder = tmp_path_factory.mktemp("fuzz")
    data = damaged_file(seed, 60)
    (folder / "in.jsonl").write_bytes(data)
    summary = run_batch(BatchOptions(folder / "in.jsonl", folder / "out.jsonl", scout_tiny), EchoBackend)
    expected = sum(bool(line.strip(b" \t\r\n")) for line in data.split(b"\n"))
    out = [json.loads(line) for line in (folder / "out.jsonl").read_bytes().splitlines()]
    assert len(out) == expected == summary.ok + summary.num_errors
    assert not summary.errors["internal_error"]
    for line in out:
        assert "custom_id" in line or "id" in line
        assert ("text" in line) or line.get("response") is not None or set(line["error"]) == {"code", "message"}
