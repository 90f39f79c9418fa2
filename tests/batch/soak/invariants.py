"""What must hold of an output when its run is complete, whatever happened on the way. One problem per line of text."""

import json
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from batch.journal import Kind, journal_path, read_journal

# These say when a run was and where its line stood; everything else must be as an uninterrupted run has it.
_OF_THE_TIME = ("created",)
_OF_THE_PLACE = ("line", "id", "request_id", "message")


@dataclass(frozen=True)
class Expected:
    """What an uninterrupted run over the final input wrote: its files; `moved` when lines changed places meanwhile, and
    `gone` the ids that the input has no more."""

    output: Path
    errors: Path | None = None
    in_order: bool = False
    moved: bool = False
    gone: frozenset = frozenset()


def problems(output: Path, errors: Path | None, expected: Expected) -> list[str]:
    """Everything that is wrong with a complete job's files."""
    found = []
    for path, reference in ((output, expected.output), (errors, expected.errors)):
        if path is not None and reference is not None:
            found += _compare(path, reference, expected)
    return found + journal_problems([output] if errors is None else [output, errors])


def _compare(path: Path, reference: Path, expected: Expected) -> list[str]:
    raw = path.read_bytes()
    if raw and not raw.endswith(b"\n"):
        return [f"{path.name}: the last line is torn"]
    try:
        have = [json.loads(line) for line in raw.splitlines()]
    except ValueError as error:
        return [f"{path.name}: a line is not JSON: {error}"]
    want = [json.loads(line) for line in reference.read_bytes().splitlines()]
    kept = [line for line in have if name(line) not in expected.gone]
    extra_at = [place for place, line in enumerate(have) if name(line) in expected.gone]
    first, second = ([comparable(line, expected.moved) for line in lines] for lines in (kept, want))
    found = []
    for text, count in (Counter(second) - Counter(first)).items():
        found.append(f"{path.name}: {count} × missing: {text[:200]}")
    for text, count in (Counter(first) - Counter(second)).items():
        found.append(f"{path.name}: {count} × too many or altered: {text[:200]}")
    if not found and expected.in_order and first != second:
        found.append(f"{path.name}: the lines are not in the input's order")
    if expected.in_order and extra_at and extra_at[0] < len(kept):
        found.append(f"{path.name}: lines that left the input do not stand at the end")
    return found


def name(line: dict) -> object:
    """The id that the input gave."""
    return line.get("custom_id", line.get("id"))


def comparable(line: dict, moved: bool) -> str:
    """A line's text without what may differ between two runs."""
    drop = _OF_THE_TIME + (_OF_THE_PLACE if moved else ())

    def strip(value):
        if isinstance(value, dict):
            return {key: strip(inner) for key, inner in value.items() if key not in drop}
        return [strip(inner) for inner in value] if isinstance(value, list) else value

    return json.dumps([name(line), strip(line)], sort_keys=True)


def journal_problems(paths: list[Path]) -> list[str]:
    """Journal and files must agree: the records tile the files, and every line has the bytes that its record says."""
    contents = read_journal(journal_path(paths[0]))
    if contents is None:
        return ["there is no journal"]
    if contents.num_bytes != journal_path(paths[0]).stat().st_size:
        return ["the journal has a torn end"]
    records, found = contents.records, []
    results = records[records["kind"] == Kind.RESULT]
    if not len(records) or records[-1]["kind"] != Kind.END:
        found.append("the journal does not say that the run ended")
    if (records["kind"] == Kind.REPLACED).any():
        found.append("the journal holds replaced results")
    if len(np.unique(results["key"], axis=0)) != len(results):
        found.append("the journal holds a key twice")
    for number, path in enumerate(paths):
        raw, at = path.read_bytes(), 0
        for record in results[results["file"] == number]:
            line = raw[at : at + int(record["length"])]
            if int(record["offset"]) != at or zlib.crc32(line) != record["crc"] or line.count(b"\n") != 1:
                found.append(f"{path.name}: journal and file differ at byte {at}")
                break
            at += len(line)
        else:
            if at != len(raw):
                found.append(f"{path.name}: {len(raw) - at} bytes that are not on record")
    leftovers = [path.name for path in paths[0].parent.glob("*.part")]
    return found + [f"left behind: {name}" for name in leftovers]


def answered_too_often(log: Path, needed: Counter, allowance: int) -> list[str]:
    """Nothing that was on record may be generated again. `needed`: how often each answer is in a complete output;
    `allowance`: answers that interruptions may cost: one for a kill (it was logged and not yet on record), what one
    sync covers for a power cut."""
    logged = Counter(log.read_text().split())
    extra = sum((logged - needed).values())
    missing = sum((needed - logged).values())
    found = (
        [f"{extra} answers were generated again; at most {allowance} can have been lost"] if extra > allowance else []
    )
    return found + ([f"{missing} answers are there that nobody generated"] if missing else [])
