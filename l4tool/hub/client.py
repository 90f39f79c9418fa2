"""What a hub says about a repository, and small pieces of its files."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from l4tool import __version__
from l4tool.core.console import note
from l4tool.core.errors import AuthError, CheckpointError, InputMissing, NetworkError
from l4tool.hub.names import RepoSpec
from l4tool.hub.transport import (
    AGAIN,
    DEFAULT_POLICY,
    Answer,
    Retry,
    RetryPolicy,
    check_status,
    network_errors,
    open_url,
    retrying,
)


@dataclass(frozen=True)
class RemoteFile:
    """A file of a commit. `sha256`: of its content, for files in LFS or Xet; `git_oid`: git's blob SHA-1 otherwise."""

    path: str
    size: int  # bytes
    sha256: str | None
    git_oid: str

    @property
    def digest(self) -> str:
        """The hash that its bytes must have, which is also its ETag on the hub."""
        return self.sha256 or self.git_oid


@dataclass(frozen=True)
class Snapshot:
    """A repository at one commit. `card`: metadata of its model card (license, license_name, base_model …)."""

    repo_id: str
    commit: str
    files: tuple[RemoteFile, ...]
    gated: bool
    card: dict[str, Any]

    def file(self, path: str) -> RemoteFile:
        """The file of that path. Raises InputMissing."""
        for file in self.files:
            if file.path == path:
                return file
        raise InputMissing(f"there is no {path} in {self.repo_id} at {self.commit[:12]}")


class Hub:
    """A hub and who we are to it.

    `endpoint` None takes HF_ENDPOINT or huggingface.co; `token` None takes HF_TOKEN or the one of `hf auth login`.
    `timeout_s` bounds every wait for a connection or for bytes. `say` gets a line before each retry.
    """

    def __init__(
        self,
        endpoint: str | None = None,
        token: str | None = None,
        timeout_s: float = 30.0,
        policy: RetryPolicy = DEFAULT_POLICY,
        say: Callable[[str], None] = note,
    ) -> None:
        from huggingface_hub import constants, get_token

        self.endpoint = (endpoint or constants.ENDPOINT).rstrip("/")
        self.token = token or (None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token())
        if self.token is not None and not (self.token.isascii() and self.token.isprintable() and " " not in self.token):
            raise AuthError("the token holds characters that no token has", hint="check HF_TOKEN or --token")
        self.timeout_s, self.policy, self.say = timeout_s, policy, say
        self._answers: dict[int, Answer] = {}
        self._lock = threading.Lock()

    def snapshot(self, spec: RepoSpec) -> Snapshot:
        """Resolve to a commit, with its files and their hashes. Every failure is an L4Error of its own class."""
        what = f"{spec.repo_id}@{spec.revision}" if spec.revision else spec.repo_id
        return retrying(lambda: self._snapshot(spec, what), self.policy, self.say)

    def _snapshot(self, spec: RepoSpec, what: str) -> Snapshot:
        from huggingface_hub import HfApi

        api = HfApi(self.endpoint, token=self.token or False, library_name="l4tool", library_version=__version__)
        with network_errors(what, spec.repo_id, self.token is not None):
            try:
                info = api.model_info(spec.repo_id, revision=spec.revision, files_metadata=True, timeout=self.timeout_s)
                files = tuple(_remote_file(sibling, what) for sibling in info.siblings or ())
                card = info.card_data.to_dict() if info.card_data else {}
            except (ValueError, TypeError, KeyError, AttributeError) as error:  # a login page, say, instead of JSON
                message = f"{what}: {self.endpoint} does not answer like a hub ({type(error).__name__})"
                raise Retry(NetworkError(message, hint="check HF_ENDPOINT and the proxy settings")) from error
        if info.sha is None or not re.fullmatch(r"[0-9a-f]{40,64}", info.sha):
            raise CheckpointError(f"{what}: the hub names no commit", hint="is the repository empty?")
        return Snapshot(spec.repo_id, info.sha, files, bool(info.gated), card)

    def check_access(self, snapshot: Snapshot) -> None:
        """Read one byte of a gated repository: lists are public there, files are not. Raises as `read_range`."""
        readable = [file for file in snapshot.files if file.size > 0]
        if snapshot.gated and readable:
            self.read_range(snapshot, min(readable, key=lambda file: file.size).path, 0, 1)

    def read_range(self, snapshot: Snapshot, path: str, start: int, stop: int) -> bytes:
        """Bytes start … stop of a file, for headers and configs: held in memory, not checked against a hash."""
        if stop <= start:
            return b""
        return retrying(lambda: self._read_range(snapshot, path, start, stop), self.policy, self.say)

    def _read_range(self, snapshot: Snapshot, path: str, start: int, stop: int) -> bytes:
        with self.get(snapshot, path, {"Range": f"bytes={start}-{stop - 1}"}) as answer:
            check_status(answer, snapshot.repo_id, path, self.token is not None)
            skip = start if answer.response.status_code == 200 else 0  # the whole file, though a piece was asked for
            data = bytearray()
            for chunk in answer.response.iter_bytes():
                data += chunk
                if len(data) >= skip + stop - start:
                    break
        if len(data) < skip + stop - start:
            raise Retry(NetworkError(f"{path}: the connection ended early", hint=AGAIN))
        return bytes(data[skip : skip + stop - start])

    @contextlib.contextmanager
    def get(self, snapshot: Snapshot, path: str, headers: dict[str, str]) -> Iterator[Answer]:
        """Open a file of the snapshot; its body is not read yet. Network trouble inside comes out as Retry."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers

        url = hf_hub_url(snapshot.repo_id, path, revision=snapshot.commit, endpoint=self.endpoint)
        # Compressed bodies have no ranges, and hashes are of the plain bytes.
        headers = {"Accept-Encoding": "identity", **headers}
        all_headers = build_hf_headers(
            token=self.token or False, library_name="l4tool", library_version=__version__, headers=headers
        )
        with (
            network_errors(path, snapshot.repo_id, self.token is not None),
            open_url(url, all_headers, self.timeout_s) as answer,
            self._live_answer(answer),
        ):
            yield answer

    @contextlib.contextmanager
    def _live_answer(self, answer: Answer) -> Iterator[None]:
        with self._lock:
            self._answers[id(answer)] = answer
        try:
            yield
        finally:
            with self._lock:
                del self._answers[id(answer)]

    def abort(self) -> None:
        """Break every open connection, so that threads that wait for bytes wake up."""
        with self._lock:
            for answer in self._answers.values():
                answer.abort()


def _remote_file(sibling: Any, what: str) -> RemoteFile:
    """huggingface_hub's entry → ours."""
    if not isinstance(sibling.size, int) or sibling.size < 0 or not sibling.blob_id:
        raise CheckpointError(f"{what}: the hub gives no size or hash for {sibling.rfilename!r}")
    sha256 = sibling.lfs.sha256 if sibling.lfs else None
    if not re.fullmatch(r"[0-9a-f]{64}" if sha256 else r"[0-9a-f]{40}", sha256 or sibling.blob_id):
        raise CheckpointError(f"{what}: the hub gives no usable hash for {sibling.rfilename!r}")
    return RemoteFile(sibling.rfilename, sibling.size, sha256, sibling.blob_id)
