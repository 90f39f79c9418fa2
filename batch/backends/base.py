"""What every backend is: it pulls prepared requests and yields results as they finish."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from batch.requests import GenerationResult, PreparedRequest


class RequestSource(Protocol):
    """Where a backend pulls work from; pulling is the back-pressure."""

    def take(self, wait: bool) -> PreparedRequest | None:
        """The next request. None means: nothing ready yet (wait=False), or nothing will ever come (wait=True)."""
        ...


class Backend(Protocol):
    """Runs requests. Results come in the order they finish; a request that fails is a result with an error."""

    def run(self, source: RequestSource) -> Iterator[GenerationResult]: ...

    def close(self) -> None: ...


class ListSource:
    """A RequestSource over an iterable that is always ready."""

    def __init__(self, requests: Iterable[PreparedRequest]) -> None:
        self._requests = iter(requests)

    def take(self, wait: bool) -> PreparedRequest | None:
        return next(self._requests, None)
