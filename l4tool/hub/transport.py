"""HTTP as this package needs it: errors in words, bounded retries, and redirects that leave the token at home.

huggingface_hub speaks httpx in its 1.x versions and httpx2 in 2.x. Its session is used as it is, so that proxies,
certificates and client factories set up for it count here too; the exception classes are taken from wherever its own
errors come from.
"""

from __future__ import annotations

import contextlib
import email.utils
import importlib
import random
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urljoin, urlsplit

from l4tool.core.errors import AccessDenied, AuthError, InputMissing, L4Error, NetworkError, RateLimited

T = TypeVar("T")
MAX_REDIRECTS = 8
MAX_REDIRECT_BYTES = 65536
REDIRECTS = {301, 302, 303, 307, 308}
AGAIN = "check the connection, then run the same command again: it carries on where it stopped"


class Stopped(Exception):
    """The caller asked for the end; what is on disk can be resumed."""


class Retry(Exception):
    """An attempt failed in a way that another one may not. `error` is raised when there are no attempts left.

    `progressed` says that the attempt brought something: then the count of failures begins anew.
    """

    def __init__(self, error: L4Error, wait_s: float | None = None, progressed: bool = False) -> None:
        super().__init__(error.message)
        self.error, self.wait_s, self.progressed = error, wait_s, progressed


@dataclass(frozen=True)
class RetryPolicy:
    """How long to go on. Delays are drawn from 0 … min(max_delay_s, base_delay_s · 2ⁿ)."""

    attempts: int = 6  # in a row without progress
    base_delay_s: float = 1.0
    max_delay_s: float = 60.0
    max_retry_after_s: float = 600.0
    checksum_attempts: int = 3
    progress_bytes: int = 64 * 1024  # an attempt that brings less counts as failed
    floor_bytes_per_s: float = 1024.0  # slower than this for a whole timeout is a stall

    def delay_s(self, failures: int, wait_s: float | None) -> float:
        """Seconds before the next attempt; a server's Retry-After wins, up to a cap."""
        if wait_s is not None:
            return min(wait_s, self.max_retry_after_s)
        return random.uniform(0, min(self.max_delay_s, self.base_delay_s * 2 ** (failures - 1)))


DEFAULT_POLICY = RetryPolicy()


@dataclass
class Answer:
    """A response whose body is not read yet. `etag`: the hub's own name for the content, not that of its CDN."""

    response: Any
    on_hub: bool
    etag: str | None = None
    linked_size: int | None = None

    def abort(self) -> None:
        """Wake a thread that waits for bytes; it sees a broken connection."""
        with contextlib.suppress(OSError, AttributeError, KeyError):
            stream = self.response.extensions["network_stream"]
            stream.get_extra_info("socket").shutdown(socket.SHUT_RDWR)


def http() -> Any:
    """The httpx module that huggingface_hub uses."""
    from huggingface_hub.errors import HfHubHTTPError

    base = next(cls for cls in HfHubHTTPError.__mro__ if cls.__name__ == "HTTPError")
    return importlib.import_module(base.__module__.partition(".")[0])


@contextlib.contextmanager
def open_url(url: str, headers: dict[str, str], timeout_s: float) -> Iterator[Answer]:
    """GET `url`, following redirects; Authorization is dropped for good when one leads to another origin."""
    from huggingface_hub import get_session

    headers, home = dict(headers), origin(url)
    etag, linked_size = None, None
    for _ in range(MAX_REDIRECTS):
        session = get_session()
        with session.stream("GET", url, headers=headers, timeout=timeout_s, follow_redirects=False) as response:
            on_hub = origin(url) == home
            if on_hub:
                etag = clean_etag(response.headers.get("x-linked-etag") or response.headers.get("etag")) or etag
                linked_size = as_int(response.headers.get("x-linked-size"), linked_size)
            location = response.headers.get("location")
            if response.status_code not in REDIRECTS or not location:
                yield Answer(response, on_hub, etag, linked_size)
                return
            if (as_int(response.headers.get("content-length")) or MAX_REDIRECT_BYTES) < MAX_REDIRECT_BYTES:
                response.read()  # so that the connection can be used again
        target = urljoin(url, location)
        scheme = urlsplit(target).scheme
        if scheme not in ("http", "https") or (scheme == "http" and url.startswith("https:")):
            raise NetworkError(f"{short_url(url)} redirects to an unsafe address", hint="check HF_ENDPOINT")
        if origin(target) != home:
            headers = {name: value for name, value in headers.items() if name.lower() != "authorization"}
        url = target
    raise Retry(NetworkError(f"{short_url(url)}: redirects without end", hint=AGAIN))


def origin(url: str) -> tuple[str, str | None, int | None]:
    """Scheme, host and port: what a token may be sent to."""
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def short_url(url: object) -> str:
    """The address without its query, which may hold a signature."""
    return re.sub(r"[?#].*", "", str(url))


def clean_etag(value: str | None) -> str | None:
    """'W/"abc"' → 'abc'."""
    return value.strip().removeprefix("W/").strip('"') if value else None


def as_int(value: str | None, default: int | None = None) -> int | None:
    return int(value) if value is not None and value.strip().isdecimal() else default


def check_status(answer: Answer, repo_id: str, what: str, has_token: bool) -> None:
    """Raise the L4Error or Retry that an error status means; nothing for 200 and 206."""
    response = answer.response
    if response.status_code in (200, 206):
        return
    url = short_url(response.url)
    if not answer.on_hub and response.status_code not in (429,):
        # Signed addresses expire: the next attempt asks the hub for a new one.
        raise Retry(NetworkError(f"{what}: {urlsplit(url).netloc} answers {response.status_code}", hint=AGAIN))
    raise status_error(response, repo_id, what, has_token)


def status_error(response: Any, repo_id: str, what: str, has_token: bool) -> Exception:
    """What an HTTP error status of the hub means, in words."""
    status, headers = response.status_code, response.headers
    if status == 429:
        hint = "wait some minutes and run the same command again; a token (HF_TOKEN) raises the limit"
        return Retry(RateLimited(f"{what}: the hub's rate limit is reached", hint=hint), retry_after_s(headers))
    said = re.sub(r"[^\x20-\x7e]+", " ", headers.get("x-error-message") or "").strip()[:200]
    if status == 408 or status >= 500:
        error = NetworkError(f"{what}: the hub answers {status}{f' ({said})' if said else ''}", hint=AGAIN)
        return Retry(error, retry_after_s(headers))
    return _refusal(status, headers.get("x-error-code") or "", said, repo_id, what, has_token, response)


def _refusal(status: int, code: str, said: str, repo_id: str, what: str, has_token: bool, response: Any) -> L4Error:
    """A 4xx that another attempt will not change."""
    home = "{}://{}".format(*urlsplit(str(response.url))[:2])
    page = f"{home}/{repo_id}"
    if code == "GatedRepo" and has_token:
        hint = f"ask for access at {page} with the account of that token, then run the same command again"
        return AccessDenied(f"{repo_id} is gated and your token has no access to it", hint=hint)
    if code == "GatedRepo":
        hint = f"ask for access at {page}, then set HF_TOKEN to a token of that account (or run `hf auth login`)"
        return AuthError(f"{repo_id} is gated and no token was given", hint=hint)
    if status == 401 and has_token:
        hint = f"make a new one at {home}/settings/tokens and set HF_TOKEN (or run `hf auth login`)"
        return AuthError("the hub does not accept the token", hint=hint)
    if code == "RevisionNotFound":
        return InputMissing(f"{what}: no such revision", hint=f"see the branches and tags at {page}/tree/main")
    if code == "EntryNotFound":
        return InputMissing(f"{what}: no such file in {repo_id}", hint=f"see what is there at {page}/tree/main")
    if code == "RepoNotFound" or status in (401, 404):
        private = "" if has_token else ", or set HF_TOKEN if it is private"
        return InputMissing(f"there is no repository {repo_id} on {home}", hint=f"check the spelling{private}")
    if status == 403:
        hint = f"check what the token may do at {home}/settings/tokens" if has_token else "set HF_TOKEN"
        return AccessDenied(f"{what}: the hub refuses{f': {said}' if said else ''}", hint=hint)
    return NetworkError(f"{what}: the hub answers {status}{f' ({said})' if said else ''}", hint="check HF_ENDPOINT")


def retry_after_s(headers: Any) -> float | None:
    """Seconds asked for by Retry-After (a number or a date) or by the hub's `ratelimit: …;r=0;t=N`, else None."""
    value = (headers.get("retry-after") or "").strip()
    if re.fullmatch(r"\d+(\.\d+)?", value):
        return float(value)
    if value:
        with contextlib.suppress(ValueError, TypeError):
            return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    limit = re.search(r";\s*r\s*=\s*0\s*;\s*t\s*=\s*(\d+)", headers.get("ratelimit") or "")
    return float(limit.group(1)) if limit else None


@contextlib.contextmanager
def network_errors(what: str, repo_id: str, has_token: bool) -> Iterator[None]:
    """Turn the exceptions of httpx and huggingface_hub into L4Error and Retry."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    httpx = http()
    try:
        yield
    except HfHubHTTPError as error:
        raise status_error(error.response, repo_id, what, has_token) from error
    except OfflineModeIsEnabled as error:
        hint = "unset HF_HUB_OFFLINE (and TRANSFORMERS_OFFLINE) to allow it"
        raise NetworkError(f"{what}: the network is needed, and offline mode is on", hint=hint) from error
    except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
        raise NetworkError(f"{what}: not a usable address", hint="check HF_ENDPOINT and the proxy settings") from error
    except httpx.HTTPError as error:
        raise _broken(error, what) from error


def _broken(error: Exception, what: str) -> Exception:
    """A connection that could not be made or did not last."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    if any(isinstance(link, ssl.SSLCertVerificationError) for link in chain):
        hint = "check the clock and the proxy; SSL_CERT_FILE names a file with your own certificate authority"
        return NetworkError(f"{what}: the hub's TLS certificate cannot be verified", hint=hint)
    reason, host = str(error) or type(error).__name__, _host(error)
    if any(isinstance(link, socket.gaierror) for link in chain):
        reason = f"the name {host} cannot be resolved (DNS)"
    elif any(isinstance(link, ConnectionRefusedError) for link in chain):
        reason = f"{host} refuses the connection"
    elif "Timeout" in type(error).__name__:
        reason = f"no answer from {host} in time"
    return Retry(NetworkError(f"{what}: {reason}", hint=AGAIN))


def _host(error: Exception) -> str:
    """Host and port that a failed request went to."""
    try:
        return urlsplit(str(error.request.url)).netloc  # type: ignore[attr-defined]
    except (AttributeError, RuntimeError):  # httpx: a request that was never set
        return "the hub"


def retrying(
    attempt: Callable[[], T],
    policy: RetryPolicy,
    say: Callable[[str], None],
    stop: threading.Event | None = None,
) -> T:
    """Call `attempt` until it returns or fails for good. Raises its L4Error, or Stopped when `stop` is set."""
    failures = 0
    while True:
        if stop is not None and stop.is_set():
            raise Stopped
        try:
            return attempt()
        except Retry as retry:
            if stop is not None and stop.is_set():
                raise Stopped from None
            failures = 1 if retry.progressed else failures + 1
            if failures >= policy.attempts:
                raise retry.error from retry.__cause__
            delay_s = policy.delay_s(failures, retry.wait_s)
            say(f"{retry.error.message}; attempt {failures + 1} of {policy.attempts} in {delay_s:.0f} s")
            pause(delay_s, stop)


def pause(delay_s: float, stop: threading.Event | None) -> None:
    """Sleep; an Event ends it early."""
    (stop or threading.Event()).wait(delay_s)
