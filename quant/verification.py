"""`verify`: files against their hashes, names and shapes against config.json, values, and the error against a source.

Everything that is wrong is collected; nothing stops at the first fault.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converters.detect import open_source
from converters.findings import Collector, Finding, worst_code
from converters.folding import fold
from converters.mapped import MappedFile
from converters.reader import Reader
from converters.survey import LAYOUTS, QUANTO, Survey, survey
from converters.writing.journal import REPORT, read_report
from l4tool.core.console import Progress
from l4tool.core.errors import EXIT_CHECKSUM, EXIT_NO_INPUT, L4Error, UsageError
from l4tool.core.placeholder import is_placeholder
from quant import comparison
from quant.comparison import Compared
from quant.evidence import Proof, find_proofs
from quant.sweep import FileJob, Values, sweep

SCALES = (".weight_scale", "._scale")  # compressed-tensors, optimum-quanto
REPORT_TOLERANCE = 1e-6  # relative: sums of a quantize run and ours
AGAIN = "fetch or quantize it again"


@dataclass(frozen=True)
class Outcome:
    """What was looked at and what was found. `hashed`: source of the digests → (files that match, files it knows).

    `finite_tensors`: float tensors without NaN and Inf. `seconds` includes everything; `read_bytes` is what was read
    from the checkpoint itself.
    """

    path: Path
    layout: str
    weight_files: int
    weight_bytes: int
    hashed: dict[str, tuple[int, int]]
    names_checked: bool
    tensors: int
    float_tensors: int
    finite_tensors: int
    findings: tuple[Finding, ...]
    source: Path | None
    compared: Compared | None
    read_bytes: int
    seconds: float

    @property
    def exit_code(self) -> int:
        return worst_code(self.findings)


def verify(path: Path, against: Path | None = None, threads: int | None = None) -> Outcome:
    """Check the checkpoint in `path`; with `against` also compare it with the checkpoint it was quantized from.

    Raises L4Error only where there is nothing to check: no folder, no usable source.
    """
    started_s = time.monotonic()
    threads = threads or len(os.sched_getaffinity(0))
    source = _open_source(path, against) if against is not None else None
    found = survey(path)
    noted = Collector()
    noted.add(*found.findings)
    try:
        if source is not None:
            _require_comparable(found, source)
        jobs, proofs = _jobs(found, noted)
        with Progress("verify", sum(job.nbytes for job in jobs)) as progress:
            sweep(jobs, threads, progress.advance)
        hashed = _judge_digests(jobs, proofs, noted)
        finite = _judge_values(jobs, noted)
        compared = _compare(found, source, threads, noted) if source is not None else None
    finally:
        found.close()
        if source is not None:
            source.close()
    weights = [job for job in jobs if job.tensors or job.path.suffix == ".pth"]
    return Outcome(
        path=path, layout=found.layout, weight_files=len(weights), weight_bytes=sum(job.size for job in weights),
        hashed=hashed, names_checked=found.readable is not None,
        tensors=sum(len(file.tensors) for file in found.weight_files().values()),
        float_tensors=sum(len(job.values) for job in jobs), finite_tensors=finite,
        findings=tuple(sorted(noted.findings, key=lambda finding: not finding.is_error)),
        source=against, compared=compared,
        read_bytes=sum(job.nbytes for job in jobs), seconds=time.monotonic() - started_s,
    )  # fmt: skip


def _open_source(path: Path, against: Path) -> Reader:
    if path.resolve() == against.resolve():
        raise UsageError("the checkpoint and its source are the same folder", hint="give the original with --against")
    source = open_source(against)
    absent = [file for file in source.weight_files() if is_placeholder(file)]
    if absent:
        source.close()
        raise L4Error(f"{absent[0]} holds a header only", hint="fetch the source first", exit_code=EXIT_NO_INPUT)
    return source


def _require_comparable(found: Survey, source: Reader) -> None:
    if found.layout == QUANTO:
        raise UsageError(
            f"{found.path} is in the layout {LAYOUTS[found.layout]}, which --against cannot read",
            hint="leave --against away; l4tool-report.json holds the errors of a quantize run",
        )
    if found.readable is not None:
        comparison.require_same_architecture(found.readable, source)


def _jobs(found: Survey, noted: Collector) -> tuple[list[FileJob], dict[Path, Proof]]:
    """What to read: every weight file, and every other file that something knows the hash of."""
    try:
        proofs = {found.path / name: proof for name, proof in find_proofs(found.path).items()}
    except L4Error as error:
        noted(error)
        proofs = {}
    files = found.weight_files()
    jobs = []
    for path in sorted({*files, *proofs, *found.path.glob("consolidated.*.pth")}):
        job = _job(path, files.get(path), proofs.get(path), noted)
        if job is not None:
            jobs.append(job)
    return jobs, proofs


def _job(path: Path, file: MappedFile | None, proof: Proof | None, noted: Collector) -> FileJob | None:
    """None for a file that cannot be read or need not be: what is wrong with it is noted."""
    if is_placeholder(path):
        what = f"{path} holds a header only, its weights are not here"
        noted.add(Finding("missing-file", what, path.name, None, EXIT_NO_INPUT, "fetch it"))
        return None
    try:
        size = path.stat().st_size
    except OSError as error:
        missing = f"{path} does not exist" if isinstance(error, FileNotFoundError) else f"cannot read {path}"
        source = proof.source if proof is not None else "the folder"
        noted.add(Finding("missing-file", f"{missing}, {source} names it", path.name, None, EXIT_NO_INPUT, AGAIN))
        return None
    tensors = tuple(file.tensors.values()) if file is not None else ()
    if proof is None:
        return FileJob(path, size, tensors)
    if proof.size is not None and proof.size != size:
        what = f"{path} has {size:,} bytes, {proof.source} says {proof.size:,}"
        noted.add(Finding("size", what, path.name, None, EXIT_CHECKSUM, AGAIN))
        return FileJob(path, size, tensors)
    if proof.kind == "tensors" and file is None:
        return FileJob(path, size)  # its header is noted as unsound
    return FileJob(path, size, tensors, proof.start(size, file))


def _judge_digests(jobs: Sequence[FileJob], proofs: dict[Path, Proof], noted: Collector) -> dict[str, tuple[int, int]]:
    """Source of the digests → how many files are what it says, and how many it knows."""
    matching = dict.fromkeys((proof.source for proof in proofs.values()), 0)
    for job in jobs:
        if job.error is not None:
            what = f"cannot read {job.path}: {job.error.strerror or job.error}"
            noted.add(Finding("unreadable", what, job.path.name, None, EXIT_NO_INPUT, AGAIN))
        elif job.digest is not None:
            proof = proofs[job.path]
            if job.digest.hexdigest() == proof.digest:
                matching[proof.source] += 1
            else:
                what = f"{job.path} is not what {proof.source} says: its bytes have changed"
                noted.add(Finding("checksum", what, job.path.name, None, EXIT_CHECKSUM, AGAIN))
    known = [proof.source for proof in proofs.values()]
    return {source: (number, known.count(source)) for source, number in matching.items()}


def _judge_values(jobs: Sequence[FileJob], noted: Collector) -> int:
    """How many float tensors are finite; notes the others, zeros among scales, and tensors of nothing but zeros."""
    finite, empty = 0, []
    for job in jobs:
        for name, values in job.values.items():
            finite += values.first is None
            if (finding := _judge_tensor(job.path, name, values)) is not None:
                noted.add(finding)
            elif values.count and values.zeros == values.count:
                empty.append(name)
    for one in fold(empty):
        what = f"tensor {one.pattern} holds only zeros" if len(one.names) == 1 else f"only zeros in {one.pattern}"
        noted.add(Finding("zeros", what, None, one.pattern, 0))
    return finite


def _judge_tensor(path: Path, name: str, values: Values) -> Finding | None:
    if values.first is not None:
        found = " and ".join(f"{n:,} {what}" for n, what in ((values.nan, "NaN"), (values.inf, "Inf")) if n)
        place = f"[{', '.join(map(str, values.first))}]"
        what = f"{path}: tensor {name!r} holds {found} among {values.count:,} values, the first at {place}"
        return Finding("not-finite", what, path.name, name, hint=AGAIN)
    if name.endswith(SCALES) and values.zeros:
        what = f"{path}: tensor {name!r} holds {values.zeros:,} scales of zero, which would wipe out their weights"
        return Finding("zero-scale", what, path.name, name, hint=AGAIN)
    return None


def _compare(found: Survey, source: Reader, threads: int, noted: Collector) -> Compared | None:
    if found.readable is None:
        return None  # it cannot be opened; that is noted
    with Progress("compare", comparison.source_bytes(source)) as progress:
        compared = comparison.compare(found.readable, source, threads, progress.advance, noted)
    said = (read_report(found.path) or {}).get("tensors")
    for one in compared.errors if isinstance(said, dict) else ():
        entry = said.get(one.name) if isinstance(said, dict) else None
        expected = entry.get("relative_error") if isinstance(entry, dict) else None
        if isinstance(expected, float) and not abs(one.relative_error - expected) <= REPORT_TOLERANCE * expected:
            what = f"tensor {one.name!r} has a relative error of {one.relative_error:.6g}, {REPORT} says {expected:.6g}"
            noted.add(Finding("report", what, None, one.name, hint="is this the source it was quantized from?"))
    return compared


def as_json(outcome: Outcome) -> dict[str, Any]:
    """The outcome as an object with stable keys; sizes in bytes."""
    result: dict[str, Any] = {
        "path": str(outcome.path),
        "sound": outcome.exit_code == 0,
        "exit_code": outcome.exit_code,
        "layout": outcome.layout,
        "weights": {"files": outcome.weight_files, "bytes": outcome.weight_bytes, "tensors": outcome.tensors},
        "hashes": {source: {"match": match, "files": files} for source, (match, files) in outcome.hashed.items()},
        "names_checked": outcome.names_checked,
        "float_tensors": outcome.float_tensors,
        "finite_tensors": outcome.finite_tensors,
        "findings": [finding.as_json() for finding in outcome.findings],
        "against": None,
        "read_bytes": outcome.read_bytes,
        "seconds": round(outcome.seconds, 3),
    }
    if outcome.compared is not None:
        errors = outcome.compared.errors
        result["against"] = {
            "source": str(outcome.source),
            "copies": outcome.compared.copies,
            "totals": comparison.totals(errors),
            "tensors": [
                {
                    "name": one.name, "class": one.group, "kind": one.kind, "relative_error": one.relative_error,
                    "sqnr_db": one.sqnr_db, "max_abs_error": one.max_abs_error, "worst_row": one.worst_row,
                    "worst_row_error": one.worst_row_error,
                }
                for one in errors
            ],
        }  # fmt: skip
    return result
