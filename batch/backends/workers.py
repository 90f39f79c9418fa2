"""Several worker processes behind one Backend: this process reads, prepares and writes; they compute.

A worker that dies is started again. The lines that its engine had begun with are suspects: each is run again alone in
an idle worker, so that only a line that kills a worker while nothing else is there is blamed ("poison"). Lines that it
had not begun with, and lines at other workers, go on as if nothing had happened.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing import connection
from pathlib import Path
from typing import Any

from batch.backends.base import RequestSource
from batch.backends.shares import cpu_shares, cuda_shares
from batch.backends.worker_channel import Answered, Failed, Ready, Took, WorkerJob
from batch.backends.worker_handle import Share, Worker, WorkerLine
from batch.backends.worker_process import EMBEDDED
from batch.requests import GenerationResult
from l4tool.core.console import note
from l4tool.core.errors import DeviceError, L4Error

MAX_WAITING = 32  # lines sent to a worker that its engine has not asked for yet
PIXEL_BYTES = 1 << 30  # of all lines at workers; they are kept here too, to be sent again
MIN_PIXEL_BYTES = 256 << 20  # of one worker's
STARVED_S = 0.02  # how often the source is asked again when a worker has room and nothing was ready
MAX_FAILED_STARTS = 2  # in a row; then a worker's place stays empty
MAX_DEATHS = 10  # in a row with no answer between: it is the machine, not the lines
KILLS_FOR_POISON = 2


@dataclass
class _Counts:
    restarts: int = 0
    poison: int = 0


class WorkersBackend:
    """One worker per share; `run` may be called again and again.

    Raises what a worker's backend raises when it is made; DeviceError when workers keep dying.
    """

    def __init__(
        self, job: WorkerJob, shares: Sequence[Share], pin_cores: bool, max_waiting: int = MAX_WAITING
    ) -> None:
        self.workers = [
            Worker(number, replace(job, cores=share.cores if pin_cores else None), share)
            for number, share in enumerate(shares, start=1)
        ]
        self._max_waiting = min(max_waiting, MAX_WAITING)
        self._pixel_bytes = max(PIXEL_BYTES // len(shares), MIN_PIXEL_BYTES)
        self._tickets = itertools.count()
        self._again: deque[WorkerLine] = deque()  # to be sent like new ones
        self._suspects: deque[WorkerLine] = deque()  # to be run alone
        self._poison: list[WorkerLine] = []  # blamed, until an answer shows that workers do work
        self._results: deque[GenerationResult] = deque()
        self._deaths = 0  # since the last answer
        self._counts = _Counts()
        try:
            self._start_all()
        except BaseException:
            self.close()
            raise

    @property
    def stats(self) -> dict[str, Any]:
        """The engines' figures: sums, and of peaks the largest; and what became of the workers."""
        total: dict[str, Any] = {}
        for figures in itertools.chain.from_iterable([*w.earlier_figures, w.figures] for w in self.workers):
            for name, value in figures.items():
                if isinstance(value, int | float):
                    before = total.get(name, 0)
                    total[name] = max(before, value) if name.startswith("peak_") else before + value
        return total | {"workers": len(self.workers), **vars(self._counts)}

    def run(self, source: RequestSource) -> Iterator[GenerationResult]:
        """Results in the order in which they finish; one per request, whatever happens to it or to its worker."""
        for worker in self.workers:
            if worker.channel is None and worker.failed_starts < MAX_FAILED_STARTS:
                _start(worker)
        try:
            while True:
                is_starved = self._deal(source)
                yield from self._take_results()
                if any(worker.load for worker in self.workers) or self._suspects or self._again:
                    self._listen(STARVED_S if is_starved else None)
                    continue
                self._convict()  # nothing is left that could show more
                yield from self._take_results()
                request = source.take(wait=True)
                if request is None:
                    return
                self._again.append(WorkerLine(request))
        finally:
            self._abandon()

    def close(self) -> None:
        """End all workers, whatever they do."""
        for worker in self.workers:
            worker.kill()

    # -- lines on their way to workers

    def _deal(self, source: RequestSource) -> bool:
        """Give out lines while workers have room. True when one still has and the source has nothing ready."""
        while (worker := self._roomiest()) is not None:
            line = self._next_line(worker, source)
            if line is None:
                return True
            try:
                worker.send(next(self._tickets), line)
            except Exception as error:
                text = f"the line cannot be given to a worker: {type(error).__name__}: {error}"
                self._results.append(_error(line, "internal_error", text))
                worker.is_alone = False
        return False

    def _roomiest(self) -> Worker | None:
        """The worker with the least to do among those that take more; suspects go to idle ones only."""
        free = [worker for worker in self.workers if self._has_room(worker)]
        return min(free, key=lambda worker: worker.load, default=None)

    def _has_room(self, worker: Worker) -> bool:
        if not worker.is_ready or worker.is_alone or len(worker.waiting) >= self._max_waiting:
            return False
        return worker.pixel_bytes < self._pixel_bytes

    def _next_line(self, worker: Worker, source: RequestSource) -> WorkerLine | None:
        if self._suspects and not worker.load:
            worker.is_alone = True
            return self._suspects.popleft()
        if self._again:
            return self._again.popleft()
        request = source.take(wait=False)
        return None if request is None else WorkerLine(request)

    # -- what workers say

    def _listen(self, timeout_s: float | None) -> None:
        """Wait until a worker says something or ends, and take in all that is there."""
        channels = {w.channel.connection: w for w in self.workers if w.channel is not None}
        for ready in connection.wait(list(channels), timeout_s):
            worker = channels[ready]  # type: ignore[index]
            assert worker.channel is not None
            try:
                self._on_message(worker, worker.channel.receive())
            except (EOFError, OSError):
                self._on_death(worker)

    def _on_message(self, worker: Worker, message: object) -> None:
        if isinstance(message, Took):
            worker.took(message.key)
        elif isinstance(message, Answered):
            self._on_answer(worker, message)
        elif isinstance(message, Failed):
            worker.error = message.error  # its end comes next
        elif isinstance(message, Ready):
            worker.is_ready, worker.failed_starts = True, 0
            if message.kv_bytes is not None:  # one that is started again can do what this one could
                worker.job = replace(worker.job, engine=worker.job.engine | {"kv_memory_bytes": message.kv_bytes})

    def _on_answer(self, worker: Worker, message: Answered) -> None:
        line = worker.answered(message.result.key, message.stats)
        self._deaths = 0
        self._results.append(replace(message.result, key=line.request.key))
        self._convict()

    def _take_results(self) -> Iterator[GenerationResult]:
        while self._results:
            yield self._results.popleft()

    # -- workers that start and die

    def _start_all(self) -> None:
        for worker in self.workers:
            _start(worker)
        while not all(worker.is_ready for worker in self.workers):
            self._listen(None)

    def _on_death(self, worker: Worker) -> None:
        """Start it again and see to its lines. Raises when there is no use in it."""
        was_ready, error = worker.is_ready, worker.error
        begun, waiting = list(worker.running.values()), list(worker.waiting.values())
        how = f"worker {worker.number} {worker.end()}"
        if error is not None:
            how += f" ({error.message})"
        self._again.extendleft(line for line in reversed(waiting) if not line.deaths)
        self._suspects.extend(line for line in waiting if line.deaths)
        self._suspect(begun)
        if not was_ready:
            self._on_failed_start(worker, error or _died_at_start(how))
            return
        self._deaths += 1
        if self._deaths > MAX_DEATHS:
            raise DeviceError(
                f"workers died {self._deaths} times with no answer between; the last: {how}",
                hint="see what the device or the memory lacks (--workers 1 uses less); the same command carries on",
            )
        note(f"{how}; it is started again, and {len(begun) + len(waiting)} lines with it")
        self._counts.restarts += 1
        _start(worker)

    def _on_failed_start(self, worker: Worker, error: L4Error) -> None:
        """The first start of all is what the run begins with; later, the others carry on without this one."""
        worker.failed_starts += 1
        if not self._counts.restarts:
            raise error
        if worker.failed_starts < MAX_FAILED_STARTS:
            _start(worker)
            return
        if all(other.channel is None for other in self.workers):
            raise error
        note(f"worker {worker.number} does not start any more: {error.message}; the others carry on")

    def _suspect(self, begun: list[WorkerLine]) -> None:
        for line in begun:
            line.deaths += 1
            assert len(begun) == 1 or line.deaths == 1, "a suspect was not alone"
            (self._poison if line.deaths >= KILLS_FOR_POISON else self._suspects).append(line)

    def _convict(self) -> None:
        """Answer the lines that are to blame. They wait for this: where nothing else is answered, it is not they."""
        for line in self._poison:
            text = f"{line.deaths} workers died while they worked on this line; the last had nothing else to do"
            self._results.append(_error(line, "poison", text))
            self._counts.poison += 1
        self._poison.clear()

    def _abandon(self) -> None:
        """Forget all lines; a worker that is at one ends and is started again when there is another run."""
        for queue in (self._again, self._suspects, self._poison, self._results):
            queue.clear()
        for worker in self.workers:
            if worker.load:
                worker.kill()


def embedded_workers(model: Path, engine: dict[str, Any], count: int) -> WorkersBackend:
    """`count` built-in engines; `engine` are fields of EmbeddedOptions. Raises UsageError, DeviceError, and what an
    engine raises that cannot be made."""
    on_cuda = engine["device"] != "cpu"
    if on_cuda:
        import torch

        from batch.model.model import resolve_device

        resolve_device(engine["device"])  # says so where there is none
        shares = cuda_shares(count, torch.cuda.device_count())
    else:
        shares = cpu_shares(count)
    job = WorkerJob(model.absolute(), EMBEDDED, engine | {"memory_share": 1 if on_cuda else count})
    return WorkersBackend(job, shares, pin_cores=not on_cuda, max_waiting=engine["max_seqs"] or MAX_WAITING)


def _start(worker: Worker) -> None:
    try:
        worker.start()
    except OSError as error:
        raise DeviceError(f"worker {worker.number} cannot be started: {error}", hint="give fewer --workers") from error


def _died_at_start(how: str) -> DeviceError:
    return DeviceError(
        f"{how} while it loaded the model",
        hint="each worker has its own copy of the weights: if memory ran out, give fewer --workers",
    )


def _error(line: WorkerLine, code: str, message: str) -> GenerationResult:
    return GenerationResult(line.request.key, [], len(line.request.prompt), code, message)
