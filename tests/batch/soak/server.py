"""A process that starts real `l4tool batch` runs by fork, kills them, and tells what became of them.

Reads one JSON object per line from stdin, answers with one per line on stdout. Only the model is not real: `Answering`
takes its place. It logs every answer before it hands it over, so that nothing can be generated twice unseen.
"""

import hashlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from batch import job
from batch.requests import Choice, GenerationResult
from l4tool.main import run
from tests.batch.soak.faults import REAL, Disk, Fault, Injector

WINDOW = 4


class Answering:
    """Says the end of the prompt and a hash of all that makes the answer; the last request in is the first one out."""

    log_fd = -1
    pause_s = 0.0

    def __init__(self, options, front):
        self.front = front

    def run(self, source):
        work = []
        while True:
            while len(work) < WINDOW and (request := source.take(wait=not work)) is not None:
                work.append(request)
            if not work:
                return
            yield self.answer(work.pop())

    def answer(self, request):
        if self.pause_s:
            time.sleep(self.pause_s)
        name = hashlib.sha256(repr((request.prompt, request.sampling.seed)).encode()).hexdigest()[:16]
        ids = request.prompt[-min(request.sampling.max_tokens, 5) :]
        text = f"{self.front.tokenizer.decode(ids)} {name}"
        REAL["write"](self.log_fd, name.encode() + b"\n")
        return GenerationResult(request.key, [Choice(0, ids, text, "length")], len(request.prompt))

    def close(self):
        pass


def child(order):
    """One run. Never returns."""
    errors = os.open(order["stderr"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for fd in (1, 2):
        os.dup2(errors, fd)
    Answering.log_fd = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    Answering.pause_s = order.get("pause_s", 0)
    folder = Path(order["folder"])
    fault = Fault(**order["fault"]) if order.get("fault") else None
    disk = Disk(folder, Path(order["store"])) if order.get("store") else None
    Injector(folder, fault, disk).install()
    sys.argv = ["l4tool", *order["argv"]]
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        run()
    except SystemExit as end:
        os._exit(end.code)
    except KeyboardInterrupt:  # it came before the command had begun
        os._exit(130)


def wait_for(pid, order):
    """Wait, and send the signals of `order` ([[after seconds, number], …]) when their time comes; the wait status."""
    started_s = time.monotonic()
    for after_s, number in order.get("signals", []):
        while time.monotonic() - started_s < after_s:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                return status
            time.sleep(0.001)
        os.kill(pid, number)
    return os.waitpid(pid, 0)[1]


def serve():
    for number in (signal.SIGTERM, signal.SIGINT):  # for the moment between the fork and the command
        signal.signal(number, lambda number, frame: os._exit(128 + number))
    job.run_batch.__defaults__ = (Answering, *job.run_batch.__defaults__[1:])
    for line in sys.stdin:
        order = json.loads(line)
        started_s = time.monotonic()
        pid = os.fork()
        if not pid:
            try:
                child(order)
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                os._exit(99)
        status = wait_for(pid, order)
        if order.get("power_cut") is not None:
            Disk(Path(order["folder"]), Path(order["store"])).power_cut(random.Random(order["power_cut"]))
        print(
            json.dumps({"code": os.waitstatus_to_exitcode(status), "seconds": time.monotonic() - started_s}), flush=True
        )


if __name__ == "__main__":
    serve()
