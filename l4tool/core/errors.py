"""The errors a user sees: what went wrong, where, what to type next, and the exit code.

Exit codes follow sysexits.h where it has one; `docs/architecture.md` and `l4tool --help` show the same table.
"""

from __future__ import annotations

EXIT_OK = 0
EXIT_ERROR_LINES = 3  # a batch run finished, but some output lines are errors
EXIT_USAGE = 64  # wrong options or arguments
EXIT_DATA = 65  # input unusable: checkpoint, config, JSONL
EXIT_NO_INPUT = 66  # an input file or folder does not exist or cannot be read
EXIT_NETWORK = 68  # the hub cannot be reached, or its connections keep failing
EXIT_UNAVAILABLE = 69  # backend, device or service gone; the hub's rate limit
EXIT_INTERNAL = 70  # our own bug
EXIT_CANT_WRITE = 73  # output exists, disk full, no permission to write
EXIT_TEMPFAIL = 75  # another run holds the lock
EXIT_CHECKSUM = 76  # bytes that are not what their hash says
EXIT_NO_ACCESS = 77  # gated, licence not accepted, or no permission
EXIT_AUTH = 78  # token missing or wrong
EXIT_SIGINT = 130
EXIT_SIGTERM = 143


class L4Error(Exception):
    """A failure the user can act on.

    `message` says what and where (file, tensor, line); `hint` says what to type or change next.
    """

    exit_code = EXIT_DATA

    def __init__(self, message: str, hint: str | None = None, exit_code: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        if exit_code is not None:
            self.exit_code = exit_code


class UsageError(L4Error):
    """Options or arguments that do not fit together."""

    exit_code = EXIT_USAGE


class InputMissing(L4Error):
    """An input path that does not exist or cannot be read."""

    exit_code = EXIT_NO_INPUT


class CheckpointError(L4Error):
    """A checkpoint that cannot be used: missing, extra, truncated or mis-shaped tensors, a bad config."""

    exit_code = EXIT_DATA


class DeviceError(L4Error):
    """A device or backend that is not there, or is too small."""

    exit_code = EXIT_UNAVAILABLE


class WriteError(L4Error):
    """Output that cannot be written: disk full, not empty, no permission."""

    exit_code = EXIT_CANT_WRITE


class LockHeld(L4Error):
    """Another process owns the output."""

    exit_code = EXIT_TEMPFAIL


class NetworkError(L4Error):
    """The hub cannot be reached, or goes on failing after all retries."""

    exit_code = EXIT_NETWORK


class RateLimited(L4Error):
    """The hub goes on answering 429 after all retries."""

    exit_code = EXIT_UNAVAILABLE


class ChecksumError(L4Error):
    """Bytes that are not what their manifest or the hub says they are."""

    exit_code = EXIT_CHECKSUM


class AccessDenied(L4Error):
    """A gated repository, or a licence that was not accepted."""

    exit_code = EXIT_NO_ACCESS


class AuthError(L4Error):
    """A token that is missing or wrong."""

    exit_code = EXIT_AUTH
