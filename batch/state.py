"""What a run knows of its lines: which are done, and what is written where. One output, its error file, its journal.

A result's record goes into the journal before its line goes into the file, and both are synced in groups. So a kill
loses nothing that was written, and a power cut at most the last group; `docs/reliability.md` has the argument.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
import zlib
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from batch import rewrite
from batch.first_look import FirstLook
from batch.journal import NO_KEY, Contents, Journal, Kind, ResultRecord, journal_path, pack_other, read_journal
from batch.jsonl import RawLine
from batch.key_table import KeyTable
from batch.line_keys import LineKeys
from batch.output import OutputFile
from batch.recovery import FORCE_HINT, difference, recover
from l4tool.core.atomic import fsync_dir, write_errors
from l4tool.core.errors import WriteError

THIS_RUN = -1


@dataclass(frozen=True)
class StateOptions:
    """At most `sync_lines` results or `sync_s` seconds of them are at risk in a power cut. `run_each`: equal ids are
    fine. `wait` for another run to end instead of raising LockHeld."""

    force: bool = False
    wait: bool = False
    retry_errors: bool = False
    run_each: bool = False
    sync_lines: int = 1000
    sync_s: float = 5.0


@dataclass
class Totals:
    """Results on record: `errors` by code."""

    ok: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    images: int = 0

    @property
    def lines(self) -> int:
        return self.ok + sum(self.errors.values())


class RunState:
    """Opening locks, recovers and compares, and changes nothing yet but the repair of a torn end; `start` begins.

    `job`: the facts that must not change between runs. Raises WriteError, LockHeld.
    """

    def __init__(self, output: Path, errors: Path | None, job: dict[str, Any], options: StateOptions) -> None:
        self.options = options
        self.paths = [output] if errors is None else [output, errors]
        self.totals = Totals()
        self._met = FirstLook()
        self.created_s = int(time.time())
        self._job = job
        self._keys, self._key_record = KeyTable(), array("Q")
        self._ids, self._id_owner = KeyTable(), array("q")  # journal record, or THIS_RUN
        self._to_replace: dict[bytes, int] = {}  # id → record of its old content
        self._counts, self._is_error = bytearray(), bytearray()  # per record: still counts; is an error line
        self._line_now = array("Q")  # per record: the input line's number in this run, 0 until it is met
        self._since_sync, self._synced_s = 0, time.monotonic()
        self._contents: Contents | None = None
        self._is_torn = self._is_started = False
        self.files: list[OutputFile] = []
        self.journal: Journal | None = None
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    # -- opening

    def _open(self) -> None:
        path = journal_path(self.paths[0])
        is_stdout = str(self.paths[0]) == "-"
        first = OutputFile(self.paths[0], fd=1 if is_stdout else None)
        self.files.append(first)
        if first.is_regular:
            self._is_new_journal = not path.exists()
            self.journal = Journal(path, self.options.wait)
            if rewrite.roll_forward(self.paths, path):
                first.close()
                self.journal.close()
                self.files[0], self.journal = OutputFile(self.paths[0]), Journal(path, self.options.wait)
        self.files += [OutputFile(path) for path in self.paths[1:]]
        if self.journal is not None and not self.options.force:
            self._contents = read_journal(path)
            self._check()

    def _check(self) -> None:
        """Compare the files with their journal and cut a torn end off."""
        if self._contents is None:
            for file in self.files:
                if file.found_bytes():
                    hint = "choose another output, or --force to overwrite it"
                    raise WriteError(f"{file.path} is not empty, and has no journal beside it", hint=hint)
            return
        changed = difference(self._contents.header.get("job") or {}, self._job)
        if changed:
            raise WriteError(f"{self.paths[0]} was begun by another run: {changed}", hint=FORCE_HINT)
        found = recover(self.files, self._contents)
        self._sizes, self._since_sync = found.sizes, found.num_unsynced  # what a killed run left is at risk still
        self._contents.let_go()
        self._contents = dataclasses.replace(self._contents, records=self._contents.records[: found.num_records])
        self.created_s = int(self._contents.header.get("created", self.created_s))
        self._load(self._contents)

    def _load(self, contents: Contents) -> None:
        records = contents.records
        self._places = places = np.flatnonzero(records["kind"] == Kind.RESULT)
        counts = np.ones(len(places), np.uint8)
        counts[records["line"][records["kind"] == Kind.REPLACED].astype(np.int64)] = 0
        codes = records["code"][places]
        self._counts, self._is_error = bytearray(counts.tobytes()), bytearray((codes != b"").astype(np.uint8).tobytes())
        self._line_now = array("Q", bytes(8 * len(places)))
        numbers = np.flatnonzero(counts)
        live = places[numbers]
        bad = codes[numbers[codes[numbers] != b""]]
        for code, count in zip(*np.unique(bad, return_counts=True), strict=True):
            self.totals.errors[code.decode()] += int(count)
        self.totals.ok = len(numbers) - len(bad)
        for name in ("prompt_tokens", "completion_tokens", "images"):
            setattr(self.totals, name, int(records[name][live].sum(dtype=np.uint64)))
        del codes
        self._key_record.frombytes(numbers.astype(np.uint64).tobytes())
        keys = records["key"][live]
        contents.let_go()
        self._keys.extend(keys)
        del keys
        if not self.options.run_each:
            ids = records["id"][live]
            contents.let_go()
            has_id = ids.any(axis=1)
            self._id_owner.frombytes(numbers[has_id].astype(np.int64).tobytes())
            self._ids.extend(ids if has_id.all() else ids[has_id])
        contents.let_go()

    # -- which lines are done

    @property
    def has_results(self) -> bool:
        """True when earlier runs left results to build on."""
        return bool(self.totals.lines)

    @property
    def is_complete(self) -> bool:
        """True when nothing was written since an earlier run ended as it should."""
        return self._end is not None and not self._is_started

    @property
    def _end(self) -> Any:
        """The END record that an earlier run left last."""
        records = None if self._contents is None else self._contents.records
        return records[-1] if records is not None and len(records) and records[-1]["kind"] == Kind.END else None

    def meet(self, lines: Iterable[RawLine], keys: LineKeys) -> int:
        """Look at a whole input beforehand, so that a changed line can be told from a repeated id; counts lines.
        `wanted` then takes the same `keys`, and makes none of them again."""
        self._met = met = FirstLook()
        for raw in lines:
            key = keys.key(raw)
            is_wanted = key is not None and self._is_wanted(key, raw.number)
            met.is_wanted.append(is_wanted)
            if is_wanted:
                met.keys += key or b""
                met.checks.append(zlib.crc32(raw.data))
        return keys.lines

    def wanted(self, lines: Iterable[RawLine], keys: LineKeys) -> Iterator[tuple[RawLine, bytes]]:
        """The lines that have no result yet, or one to be done again, each with its key."""
        lines = iter(lines)
        yield from self._met.wanted(lines)
        for raw in lines:
            key = keys.key(raw)
            if key is not None and self._is_wanted(key, raw.number):
                yield raw, key

    def _is_wanted(self, key: bytes, line: int) -> bool:
        record = self._find(key, line)
        return record is None or (self.options.retry_errors and bool(self._is_error[record]))

    def _find(self, key: bytes, line: int) -> int | None:
        """The record of a line's result, which now is known to stand at `line`."""
        entry = self._keys.find(key)
        if entry is None:
            return None
        record = self._key_record[entry]
        self._line_now[record] = line
        return record

    def claim(self, id_key: bytes, line: int) -> bool:
        """Take an id for this line, in input order; False when another line of the input has it."""
        if self.options.run_each or id_key == NO_KEY:
            return True
        entry, is_new = self._ids.add(id_key)
        if is_new:
            self._id_owner.append(THIS_RUN)
            return True
        record = self._id_owner[entry]
        if record == THIS_RUN or (self._line_now[record] and self._line_now[record] != line):
            return False
        self._id_owner[entry] = THIS_RUN
        self._to_replace[id_key] = record
        return True

    # -- writing

    def start(self) -> None:
        """Results come now: with `force` the old ones go."""
        if self._is_started:
            return
        sizes = [0, 0] if self._contents is None else self._sizes
        if self.journal is not None:
            if self._contents is None:
                errors = [os.path.relpath(path, self.paths[0].parent) for path in self.paths[1:]]
                self.journal.begin(
                    {"job": self._job, "created": self.created_s, "errors": errors[0] if errors else None}
                )
            else:
                self.journal.carry_on(self._contents)
                self._contents.let_go()
                if self.is_complete:  # from now on a longer output is a torn one, not somebody's change
                    self.journal.append(
                        pack_other(Kind.SYNCED, line=sizes[1] if len(sizes) > 1 else 0, offset=sizes[0])
                    )
                    self.journal.sync()
        for file, size in zip(self.files, sizes, strict=False):
            file.start(size)
        if self.journal is not None:
            for folder in {path.parent for path in (self.journal.path, *self.paths)}:
                with write_errors(folder):
                    fsync_dir(folder)  # the names of new files
        self._is_started = True

    def write(
        self, key: bytes, id_key: bytes, line: int, data: bytes, code: str = "", prompt_tokens: int = 0,
        completion_tokens: int = 0, images: int = 0,
    ) -> None:  # fmt: skip
        """Put one result line on record and in its file. Raises WriteError; then neither has it."""
        number = 1 if code and len(self.files) > 1 else 0
        file = self.files[number]
        if self.journal is None:
            file.write(data)
            self._add_up(code, prompt_tokens, completion_tokens, images)
            return
        record = ResultRecord(
            key, id_key, line, number, file.size, len(data), zlib.crc32(data), code, prompt_tokens, completion_tokens,
            images,
        )  # fmt: skip
        replaced = self._replaced(key, id_key)
        packed = b"".join(pack_other(Kind.REPLACED, old) for old in replaced) + record.pack()
        self._is_torn = True
        self.journal.append(packed)
        try:
            file.write(data)
        except BaseException:
            self._is_torn = not self.journal.take_back(len(packed))
            raise
        self._is_torn = False
        self.journal.num_results += 1
        for old in replaced:
            self._counts[old] = 0
            self._subtract(old)
        self._counts.append(1)
        self._is_error.append(bool(code))
        self._line_now.append(line)
        self._add_up(code, prompt_tokens, completion_tokens, images)
        self._since_sync += 1
        if self._since_sync >= self.options.sync_lines or time.monotonic() - self._synced_s > self.options.sync_s:
            self.sync()

    def _replaced(self, key: bytes, id_key: bytes) -> list[int]:
        """Records that a new result takes the place of: its own earlier one, and that of its id's earlier content."""
        found = set()
        entry = self._keys.find(key)
        if entry is not None and self._counts[self._key_record[entry]]:
            found.add(self._key_record[entry])
        changed = self._to_replace.pop(id_key, None)
        if changed is not None and self._counts[changed]:
            found.add(changed)
        return sorted(found)

    def _add_up(self, code: str, prompt_tokens: int, completion_tokens: int, images: int) -> None:
        totals = self.totals
        if code:
            totals.errors[code] += 1
        else:
            totals.ok += 1
        totals.prompt_tokens += prompt_tokens
        totals.completion_tokens += completion_tokens
        totals.images += images

    def _subtract(self, record: int) -> None:
        """Take a result of an earlier run out of the totals."""
        assert self._contents is not None
        row, totals = self._contents.records[self._places[record]], self.totals
        if code := row["code"].decode():
            totals.errors -= Counter({code: 1})
        else:
            totals.ok -= 1
        totals.prompt_tokens -= int(row["prompt_tokens"])
        totals.completion_tokens -= int(row["completion_tokens"])
        totals.images -= int(row["images"])

    def sync(self) -> None:
        """Everything written so far survives a power cut."""
        if self._is_torn or not self._is_started:
            return
        self._is_torn = True  # stays so if this fails: a second fsync may succeed though the first one lost data
        for file in self.files:
            file.sync()
        if self.journal is not None and self._since_sync:
            sizes = [file.size for file in self.files] + [0]
            self.journal.append(pack_other(Kind.SYNCED, line=sizes[1], offset=sizes[0]))
            self.journal.sync()
        self._is_torn = False
        self._since_sync, self._synced_s = 0, time.monotonic()

    # -- the end

    def finish(self, num_lines: int, digest: bytes, in_order: bool) -> None:
        """Every line has its result: put the files in order where that is asked for, drop what was replaced, and let
        the journal say where in the input the lines stand now. Nothing is written where nothing changed."""
        end_then = self._end if self.is_complete else None
        is_known = end_then is not None and (end_then["line"], end_then["key"].tobytes()) == (num_lines, digest)
        if is_known and self._contents is not None:
            layout = rewrite.plan(self._contents, self._counts, self._line_now, in_order)
            if layout is None:
                return
        self.start()
        self.sync()
        if self.journal is None:
            return
        self._keys, self._ids = KeyTable(), KeyTable()  # no line comes any more: make room
        contents = read_journal(self.journal.path)
        assert contents is not None
        layout = rewrite.plan(contents, self._counts, self._line_now, in_order)
        end = pack_other(Kind.END, line=num_lines, key=digest)
        if layout is not None:
            rewrite.rewrite(self.files, self.journal, contents, layout, self._line_now, end)
        elif rewrite.is_moved(contents, self._line_now):
            rewrite.renumber(self.files, self.journal, contents, self._line_now, end)
        else:
            self.journal.append(end)
            self.journal.sync()

    def results(self) -> Iterator[bytes]:
        """The result lines that count and whose input lines this run met, as they stand in the files. Only with a
        journal, and before `finish`."""
        contents = None if self.journal is None else read_journal(self.journal.path)
        if contents is None:
            return
        places = np.flatnonzero(contents.records["kind"] == Kind.RESULT)
        for place, counts, line in zip(places, self._counts, self._line_now, strict=False):  # a torn end is behind them
            if counts and line:
                record = contents.records[place]
                yield self.files[int(record["file"])].read(int(record["offset"]), int(record["length"]))

    def num_gone(self) -> int:
        """Results whose lines the input does not have any more (it was read to its end)."""
        return sum(1 for counts, line in zip(self._counts, self._line_now, strict=True) if counts and not line)

    def close(self) -> None:
        """Sync and let go. A run that never started leaves nothing behind that it made."""
        try:
            with contextlib.suppress(WriteError):
                self.sync()
        finally:
            for file in self.files:
                file.close(discard=not self._is_started)
            if self.journal is not None:
                if not self._is_started and self._is_new_journal:
                    self.journal.path.unlink(missing_ok=True)
                self.journal.close()
