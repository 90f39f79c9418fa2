"""Runs `quantize` or `convert` in forked children that are stopped at a chosen step; prints one JSON line per child.

  python -m tests.quant.interrupted SOURCE PARENT SHARD_BYTES OUT/STOP [OUT/STOP …]

Every STOP is a child of its own that writes PARENT/OUT: `kill:N` kills it before its N-th step, `torn:N` after half
of the N-th write, `term:N` and `int:N` send SIGTERM and SIGINT, `full:N` fails from then on with ENOSPC,
`limit:BYTES` runs under RLIMIT_FSIZE, `run` runs to the end. A step is a call that changes the disk: pwrite, fsync,
rename, truncate, unlink. A child that ends also tells which tensors it worked on.
With the environment variable CONVERT the command is `convert` with its words as options (`--to meta --shards 2`).
"""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import sys
import threading
from pathlib import Path

STEPS = ("pwrite", "fsync", "replace", "ftruncate", "unlink")


def hook(stop: str, counter: list[int]) -> None:
    """Count steps in this process and do what `stop` says at its step."""
    kind, _, number = stop.partition(":")
    if kind == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(number), int(number)))
        return
    lock = threading.Lock()

    def wrap(name):
        real = getattr(os, name)

        def step(*args, **kwargs):
            with lock:
                counter[0] += 1
                now = counter[0] == int(number or -1)
            if kind == "full" and counter[0] >= int(number) and name == "pwrite":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if now and kind == "torn" and name == "pwrite":
                real(args[0], memoryview(args[1])[: len(args[1]) // 2], args[2])
            if now and kind in ("kill", "torn"):
                os.kill(os.getpid(), signal.SIGKILL)
            if now and kind in ("term", "int"):
                os.kill(os.getpid(), signal.SIGTERM if kind == "term" else signal.SIGINT)
            return real(*args, **kwargs)

        setattr(os, name, step)

    for name in STEPS:
        wrap(name)


def child(source: str, out: str, shard_bytes: int, stop: str) -> int:
    from l4tool import main as entry

    counter = [0]
    hook(stop, counter)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    from converters.writing import stream
    from quant import pipeline

    real, real_work, worked = pipeline.Options, stream.Stream._work, []
    pipeline.Options = lambda **options: real(**options | {"max_shard_bytes": shard_bytes, "jobs": 2})

    def work(self, shard, unit):
        worked.append(unit.item.info.name)
        return real_work(self, shard, unit)

    stream.Stream._work = work
    options = os.environ.get("CONVERT")
    command = ["quantize", "--int4"] if options is None else ["convert", "--jobs", "2", *options.split()]
    code = entry.main([command[0], source, "-o", out, *command[1:]])
    print(json.dumps({"steps": counter[0], "tensors": sorted(worked)}), flush=True)
    return code


def main() -> None:
    source, parent, shard_bytes, *stops = sys.argv[1:]
    import quant.kernels.int4
    import quant.pipeline  # noqa: F401 - loaded once, so that children start at once

    for work in stops:
        name, _, stop = work.partition("/")
        out = str(Path(parent) / name)
        pid = os.fork()
        if pid == 0:
            code = 70
            try:
                code = child(source, out, int(shard_bytes), stop)
            finally:
                sys.stdout.flush()
                os._exit(code)
        status = os.waitpid(pid, 0)[1]
        folder = Path(out)
        names = sorted(entry.name for entry in folder.iterdir()) if folder.exists() else []
        print(json.dumps({"stop": stop, "code": os.waitstatus_to_exitcode(status), "names": names}), flush=True)


if __name__ == "__main__":
    main()
