"""Xet, when asked for: huggingface_hub downloads a file in a process of its own, which can be ended when it hangs.

What it brings becomes the file's part, as if a run over HTTP had been killed at its last byte: it is hashed like any
other part, and thrown away if it is wrong. A download that stalls or fails is done over HTTP, and so is every file
after it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from l4tool.core.atomic import part_path, write_errors
from l4tool.hub.client import Hub, RemoteFile, Snapshot
from l4tool.hub.part import claim_part, part_bytes
from l4tool.hub.transport import Stopped

FOLDER_SUFFIX = ".l4tool-xet"
MIN_BYTES = 2**20  # smaller files are not worth a process
POLL_S = 0.1


class Xet:
    """Brings files until the first that fails."""

    def __init__(self, hub: Hub, snapshot: Snapshot) -> None:
        self.hub, self.snapshot = hub, snapshot
        self.on = importlib.util.find_spec("hf_xet") is not None
        if not self.on:
            hub.say("hf_xet is not installed; downloading over HTTP")

    def bring(self, file: RemoteFile, target: Path, on_bytes: Callable[[int], None], stop: threading.Event) -> None:
        """Leave the whole file as the part of `target`, or nothing. Raises Stopped and WriteError."""
        if not self.on or file.sha256 is None or file.size < MIN_BYTES or part_bytes(target, file):
            return
        folder = xet_folder(target)
        try:
            problem = self._run(file, folder, on_bytes, stop)
            if problem is None:
                with write_errors(target):
                    claim_part(target, file, folder / file.path)
                return
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        if self.on:
            self.on = False
            self.hub.say(f"{file.path}: Xet {problem}; going on over HTTP, with the other files too")

    def _run(
        self, file: RemoteFile, folder: Path, on_bytes: Callable[[int], None], stop: threading.Event
    ) -> str | None:
        """Run the child until it ends or stalls; returns what went wrong."""
        with write_errors(folder):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        command = [sys.executable, "-m", __name__, self.snapshot.repo_id, self.snapshot.commit, file.path, str(folder)]
        null = subprocess.DEVNULL
        counted, moved_s = 0, time.monotonic()
        with subprocess.Popen(
            command, env=self._environment(), stdin=subprocess.PIPE, stdout=null, stderr=null
        ) as child:
            try:
                while child.poll() is None:
                    if stop.is_set():
                        raise Stopped
                    size = min(_bytes_below(folder), file.size)
                    if size != counted:
                        on_bytes(size - counted)
                        counted, moved_s = size, time.monotonic()
                    elif time.monotonic() - moved_s > self.hub.timeout_s:
                        return f"brought nothing for {self.hub.timeout_s:.0f} s"
                    stop.wait(POLL_S)
            finally:
                on_bytes(-counted)  # they count again when they are hashed
                child.kill()
        if child.returncode or not (folder / file.path).is_file():
            return "failed"
        return None

    def _environment(self) -> dict[str, str]:
        """The token goes through the environment, which other users cannot read; arguments they can."""
        variables = {**os.environ, "HF_ENDPOINT": self.hub.endpoint, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        variables.pop("HF_TOKEN", None)
        return variables | ({"HF_TOKEN": self.hub.token} if self.hub.token else {"HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"})


def xet_folder(target: Path) -> Path:
    """Where the child of `target` works."""
    part = part_path(target)
    return part.with_name(part.name + FOLDER_SUFFIX)


def _bytes_below(folder: Path) -> int:
    """Bytes on disk: files may be given their full size at once."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            total += path.stat().st_blocks * 512 if path.is_file() else 0
    return total


def _main(repo_id: str, commit: str, path: str, folder: str) -> None:
    """The child: one download; ends when its parent does, whose end closes stdin."""
    from huggingface_hub import hf_hub_download

    threading.Thread(target=lambda: (os.read(0, 1), os._exit(1)), daemon=True).start()
    hf_hub_download(repo_id, path, revision=commit, local_dir=folder)


if __name__ == "__main__":
    _main(*sys.argv[1:])
