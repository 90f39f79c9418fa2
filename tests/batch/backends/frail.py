"""A backend for worker processes that dies when it is told to. No torch: it starts in a moment."""

import os
import signal
import time
from pathlib import Path

from batch.requests import Choice, GenerationResult
from l4tool.core.errors import DeviceError

DEADLY, DEADLY_ONCE = 666, 667  # a prompt that begins with one of these kills the process that works on it


def unreadable(number):
    raise ValueError(f"not a request: {number}")


class Unreadable:
    """Can be sent, but not received."""

    def __reduce__(self):
        return unreadable, (7,)


class Unsendable:
    def __reduce__(self):
        raise TypeError("stays here")


class Frail:
    """Works on four requests at a time and answers with the prompt backwards."""

    def __init__(self, folder, step_s):
        self.folder, self.step_s = folder, step_s
        self.stats = {"steps": 0, "peak_work": 0}

    def run(self, source):
        work = []
        while True:
            while len(work) < 4 and (request := source.take(wait=not work)) is not None:
                work.append(request)
            if not work:
                return
            time.sleep(self.step_s)
            self.stats["steps"] += 1
            self.stats["peak_work"] = max(self.stats["peak_work"], len(work))
            for request in work:
                self.meet(request.prompt[0])
            request = work.pop()
            output = request.prompt[::-1] + [int(image.pixels.sum()) for image in request.images]
            yield GenerationResult(request.key, [Choice(0, output, str(os.getpid()), "stop")], len(request.prompt))

    def meet(self, token):
        marker = self.folder / "died"
        if token == DEADLY or (token == DEADLY_ONCE and not marker.exists()):
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    def close(self):
        pass


def make(job):
    """`job.engine`: step_s, and `starts`, how often workers may start in all; then they fail with DeviceError."""
    folder = Path(job.model)
    with open(folder / "starts", "ab") as file:
        file.write(b"x")
    if os.path.getsize(folder / "starts") > job.engine.get("starts", 1000):
        raise DeviceError("the device is gone", hint="look for it")
    return Frail(folder, job.engine.get("step_s", 0.001))


def die_at_start(job):
    os.kill(os.getpid(), signal.SIGKILL)


def break_at_start(job):
    raise ZeroDivisionError("a bug")
