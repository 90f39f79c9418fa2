"""Jobs that are killed again and again until they are complete, and then checked. Everything is drawn from a seed.

python -m tests.batch.soak.campaign MODEL_DIR --kills 1000 --seed 1
"""

import argparse
import errno
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tests.batch.soak import invariants

ROOT = Path(__file__).resolve().parents[3]
KILLED = -9
FINISHED = (0, 3)
STOPPED = (143, 130)
CANNOT_WRITE = 73
MAX_RUNS = 80  # of one job; the last ones are left alone, so that every job ends
FIXED = ["--sync-seconds", "600", "--grace", "5"]


class Server:
    """The forking process of server.py."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.batch.soak.server"]
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, **order) -> tuple[int, float]:
        """(exit code, negative for a signal; seconds)."""
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        return answer["code"], answer["seconds"]

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


@dataclass
class Figures:
    """What a campaign did."""

    jobs: int = 0
    runs: int = 0
    lines: int = 0
    ends: Counter = field(default_factory=Counter)
    kinds: Counter = field(default_factory=Counter)
    lost_answers: int = 0
    allowed_answers: int = 0

    @property
    def kills(self) -> int:
        return self.ends["killed"] + self.ends["power cut"]


class Job:
    """One job: its options, its input as it is now, and the runs over it."""

    def __init__(self, server: Server, model: Path, folder: Path, seed: int, figures: Figures) -> None:
        self.server, self.model, self.root, self.figures = server, model, folder, figures
        self.draw = draw = random.Random(seed)
        self.folder, self.store = folder / "job", folder / "store"
        self.folder.mkdir(parents=True)
        self.input, self.log, self.stderr = folder / "in.jsonl", folder / "answers.log", folder / "stderr"
        self.output = self.folder / "out.jsonl"
        self.errors = self.folder / "errors.jsonl" if draw.random() < 0.5 else None
        self.in_order = draw.random() < 0.5
        self.sync_lines = draw.choice([1, 7, 50, 1000])
        self.duplicates = draw.choice(["error", "run-each"])
        self.has_power_cuts = draw.random() < 0.35
        self.kinds_of_change = draw.choice([(), ("append",), ("append", "shuffle", "change"), ("remove", "change")])
        if self.duplicates == "run-each":  # equal ids are fine: a changed line is one more line, its old answer stays
            self.kinds_of_change = tuple(kind for kind in self.kinds_of_change if kind != "change")
        self.next_id, self.was_moved, self.gone = 0, False, set()
        self.lines = [self.line() for _ in range(draw.choice([1, 40, 400, 900]))]
        if "shuffle" not in self.kinds_of_change and "remove" not in self.kinds_of_change and draw.random() < 0.5:
            self.lines += draw.sample(self.lines, len(self.lines) // 10)  # equal lines, and equal ids
        self.allowance, self.seen = 0, Counter()
        self.history: list[str] = []

    def line(self) -> bytes:
        draw, number = self.draw, self.next_id
        self.next_id += 1
        kind = draw.random()
        if kind < 0.05:
            return b'{"id": %d, "prompt": "x", "what": %d}' % (number, number)
        if kind < 0.1:
            return b"not a request %d" % number
        prompt = f"number {number} of these, " + "word " * draw.randrange(12)
        if kind < 0.5:
            body = {"messages": [{"role": "user", "content": prompt}], "max_tokens": 4}
            named = {"custom_id": f"r{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}
        else:
            named = {"id": number, "prompt": prompt, "max_tokens": 4}
        return json.dumps(named).encode()

    def arguments(self, output: Path, errors: Path | None) -> list[str]:
        given = ["batch", self.input, output, "--model", self.model, "--sync-lines", self.sync_lines]
        given += ["--duplicates", self.duplicates, "--order", "input" if self.in_order else "completion"]
        return [str(item) for item in given + ([] if errors is None else ["--errors", errors])] + FIXED

    # -- what happens to it

    def fault(self) -> dict:
        """A kill or a failing call, as an order to the server."""
        draw, left = self.draw, 2 * len(self.lines) + 10
        kind = draw.choice(["time", "time", "write", "write", "end", "sync", "io", "signal"])
        self.figures.kinds[kind] += 1
        if kind == "time":
            return {"signals": [[draw.uniform(0, 0.05 + len(self.lines) / 4000), 9]]}
        if kind == "signal":
            first = [draw.uniform(0.02, 0.02 + len(self.lines) / 5000), draw.choice([15, 2])]
            return {"signals": [first, *draw.choice([[], [[first[0] + 0.003, 15]], [[first[0] + 0.01, 9]]])]}
        if kind == "write":
            number = draw.randint(1, draw.choice([12, left]))
            return {"fault": {"call": "write", "number": number, "action": draw.choice(["before", "after", "torn"])}}
        call = draw.choice({"end": ["replace", "fsync"], "sync": ["fdatasync", "ftruncate"]}.get(
            kind, ["write", "write", "fdatasync", "fsync", "replace", "ftruncate"]))  # fmt: skip
        number = draw.randint(1, left if call == "write" else draw.choice([3, 8]))
        if kind == "io":
            wrong = draw.choice([errno.ENOSPC, errno.EIO])
            return {"fault": {"call": call, "number": number, "action": wrong, "times": draw.choice([1, 2, 10**9])}}
        return {"fault": {"call": call, "number": number, "action": draw.choice(["before", "after"])}}

    def run(self, order: dict) -> int:
        if self.has_power_cuts:
            order = {"store": str(self.store)} | order
        code, _ = self.server.run(
            argv=self.arguments(self.output, self.errors), folder=str(self.folder), log=str(self.log),
            stderr=str(self.stderr), **order,
        )  # fmt: skip
        self.figures.runs += 1
        text = self.stderr.read_text()
        if "Traceback" in text or "internal error" in text or code not in (KILLED, CANNOT_WRITE, *FINISHED, *STOPPED):
            raise AssertionError(f"a run ended with {code}: {text}")
        return code

    def interrupt(self) -> bool:
        """One run that something happens to; True when it came to its end all the same."""
        order = self.fault()
        is_cut = self.has_power_cuts and self.draw.random() < 0.5
        if is_cut:
            order["power_cut"] = self.draw.randrange(2**32)
        code = self.run(order)
        kind = {KILLED: "killed", CANNOT_WRITE: "cannot write"}.get(code, "signal" if code in STOPPED else "complete")
        if is_cut:
            self.allowance += self.sync_lines
            kind = "power cut"
        self.figures.ends[kind] += 1
        self.history.append(f"{kind}: {order} {self.stderr.read_text().strip().splitlines()[-2:]}")
        self.allowance += code not in FINISHED
        self.note_answers()
        return code in FINISHED and not is_cut

    def note_answers(self) -> None:
        """What the output holds now may have been answered, once, whatever becomes of the line."""
        if self.output.exists():
            logged = Counter(self.log.read_text().split()) if self.log.exists() else Counter()
            self.seen |= answers_in(self.output) & logged  # a power cut may have left anything

    def tear(self) -> None:
        """A line or a record that a crash cut short, behind what is there."""
        for path in (self.output, self.errors, self.output.with_name("out.jsonl.journal")):
            if path is not None and path.exists() and self.draw.random() < 0.3 and not self.has_end():
                with open(path, "ab") as file:
                    file.write(self.draw.randbytes(self.draw.randrange(1, 95)))

    def has_end(self) -> bool:
        from batch.journal import Kind, journal_path, read_journal

        contents = read_journal(journal_path(self.output))
        return contents is None or (bool(len(contents.records)) and contents.records[-1]["kind"] >= Kind.REWRITE)

    def change(self) -> None:
        """The input between two runs."""
        draw = self.draw
        for kind in self.kinds_of_change:
            if draw.random() > 0.3 or not self.lines:
                continue
            if kind == "append":
                self.lines += [self.line() for _ in range(draw.randrange(1, 60))]
            elif kind == "shuffle":
                draw.shuffle(self.lines)
                self.was_moved = True
            elif kind == "change":
                place = draw.randrange(len(self.lines))
                if b"number" in self.lines[place]:
                    self.lines[place] = self.lines[place].replace(b"number", b"changed number", 1)
            else:
                self.remove(draw.randrange(len(self.lines)))

    def remove(self, place: int) -> None:
        """Take a line out of the input (one with an id, so that its answer can be told from others)."""
        if self.lines[place].startswith(b"{"):
            self.gone.add(invariants.name(json.loads(self.lines.pop(place))))
            self.was_moved = True

    # -- the whole life of a job

    def live(self) -> list[str]:
        """Interrupt until it is complete; what is wrong with it then."""
        for _ in range(MAX_RUNS):
            self.input.write_bytes(b"\n".join(self.lines) + self.draw.choice([b"", b"\n"]))
            if self.interrupt():
                break
            if self.draw.random() < 0.3:
                self.tear()
            self.change()
        self.input.write_bytes(b"\n".join(self.lines) + b"\n")
        if self.run({}) not in FINISHED:
            return [f"the last run did not finish: {self.stderr.read_text()}"]
        self.note_answers()
        self.figures.jobs += 1
        self.figures.lines += len(self.lines)
        return self.check()

    def check(self) -> list[str]:
        fresh = self.root / "fresh"
        fresh.mkdir()
        errors = fresh / "errors.jsonl" if self.errors else None
        code, _ = self.server.run(
            argv=self.arguments(fresh / "out.jsonl", errors), folder=str(fresh), log=str(self.root / "fresh.log"),
            stderr=str(self.stderr),
        )  # fmt: skip
        if code not in FINISHED:
            return [f"the undisturbed run ended with {code}: {self.stderr.read_text()}"]
        expected = invariants.Expected(
            fresh / "out.jsonl", errors, self.in_order, self.was_moved, frozenset(self.gone)
        )  # fmt: skip
        found = invariants.problems(self.output, self.errors, expected)
        needed = self.seen | answers_in(self.output)
        self.figures.lost_answers += sum((Counter(self.log.read_text().split()) - needed).values())
        self.figures.allowed_answers += self.allowance
        return found + invariants.answered_too_often(self.log, needed, self.allowance)


def answers_in(path: Path) -> Counter:
    """The answers' hashes (the last word of each text) in the whole lines of an output."""
    found = Counter()
    for raw in path.read_bytes().splitlines():
        try:
            line = json.loads(raw)
            if not line.get("error"):
                text = line.get("text") or line["response"]["body"]["choices"][0]["message"]["content"]
                found[text.split()[-1]] += 1
        except (ValueError, LookupError, TypeError, AttributeError):  # what a power cut left there
            continue
    return found


def campaign(model: Path, kills: int, seed: int, folder: Path) -> Figures:
    """Jobs until there were `kills` kills. Raises AssertionError with the seed of the job that went wrong."""
    figures, server = Figures(), Server()
    try:
        while figures.kills < kills:
            place = folder / f"job-{seed}"
            job = Job(server, model, place, seed, figures)
            found = job.live()
            if found:
                raise AssertionError("\n".join([f"seed {seed} ({place}):", *job.history, *found[:10]]))
            subprocess.run(["rm", "-rf", str(place)], check=True)
            seed += 1
    finally:
        server.close()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    started_s = time.monotonic()
    print(campaign(options.model, options.kills, options.seed, Path(tempfile.mkdtemp(prefix="soak-"))))
    print(f"{time.monotonic() - started_s:.0f} s")


if __name__ == "__main__":
    main()
