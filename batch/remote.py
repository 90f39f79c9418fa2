"""Objects behind URLs (s3://, gs://, hf://, memory://, …), read and put through fsspec."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from l4tool.core.errors import AccessDenied, AuthError, InputMissing, L4Error, NetworkError, UsageError

CHUNK_BYTES = 4 * 2**20
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]+)://", re.IGNORECASE)
_VERSION_KEYS = ("ETag", "etag", "md5Hash", "crc32c", "blob_id", "LastModified", "mtime", "created")


def is_url(text: str) -> bool:
    return _SCHEME.match(text) is not None


def local_path(url: str) -> Path | None:
    """The path that a file:// URL means; None for other URLs."""
    scheme, _, rest = url.partition("://")
    return Path(unquote(rest)) if scheme.lower() in ("file", "local") else None


@contextlib.contextmanager
def remote_errors(url: str, doing: str = "read") -> Iterator[None]:
    """Turn what a driver raises into an L4Error. Drivers raise exceptions of their own, so all are caught."""
    try:
        yield
    except L4Error:
        raise
    except FileNotFoundError:
        raise InputMissing(f"no such object: {url}") from None
    except PermissionError as error:
        raise AccessDenied(f"no access to {url}: {error}", hint="check the credentials of that store") from None
    except ImportError as error:
        scheme = url.partition("://")[0]
        raise UsageError(f"{scheme}:// needs another package: {error}", hint="pip install it beside l4tool") from None
    except Exception as error:
        if type(error).__name__ == "NoCredentialsError":
            raise AuthError(f"no credentials for {url}", hint="set them up as for that store's own tools") from None
        if isinstance(error, ValueError) and "Protocol not known" in str(error):
            raise UsageError(f"{url}: no driver for such URLs", hint="see the list of drivers of fsspec") from None
        raise NetworkError(f"cannot {doing} {url}: {error}", hint="the same command carries on") from error


def file_system(url: str) -> tuple[Any, str]:
    """(fsspec's file system, the path in it). Raises L4Error."""
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        raise UsageError(f"{url} needs the package fsspec", hint="pip install 'l4tool[remote]'") from None
    with remote_errors(url):
        fs, path = url_to_fs(url)
    return fs, path


def open_remote(url: str) -> Iterator[bytes]:
    """An object's bytes as they come; the first ones are asked for now. Raises L4Error."""
    fs, path = file_system(url)
    with remote_errors(url):
        if fs.isdir(path):
            raise InputMissing(f"{url} is a folder", hint="end it with / and give a folder for the output")
        file = fs.open(path, "rb")
    return _chunks(file, url)


def _chunks(file: Any, url: str) -> Iterator[bytes]:
    with file:
        while True:
            with remote_errors(url):
                chunk = file.read(CHUNK_BYTES)
            if not chunk:
                return
            yield chunk


def list_objects(url: str) -> list[str]:
    """The objects that a pattern matches, or those right in a folder, as URLs in order. Raises L4Error."""
    fs, path = file_system(url)
    with remote_errors(url, "list"):
        if "*" in path or "?" in path or "[" in path:
            found = [name for name in fs.glob(path) if not fs.isdir(name)]
        else:
            found = [entry["name"] for entry in fs.ls(path, detail=True) if entry["type"] == "file"]
        return sorted(fs.unstrip_protocol(name) for name in found)


def describe(url: str) -> dict[str, Any] | None:
    """An object's size and what its store calls this version of it; None when there is none. Raises L4Error."""
    fs, path = file_system(url)
    with remote_errors(url, "look at"):
        fs.invalidate_cache()
        try:
            info = fs.info(path)
        except FileNotFoundError:
            return None
    version = next((str(info[key]) for key in _VERSION_KEYS if info.get(key)), None)
    return {"url": url, "size": info["size"], "version": version}


def put(local: Path, url: str) -> dict[str, Any]:
    """Put a file in one piece; returns what `describe` then says. Raises L4Error."""
    fs, path = file_system(url)
    with remote_errors(url, "write"):
        fs.put_file(str(local), path)
    found, size = describe(url), local.stat().st_size
    if found is None or found["size"] != size:
        there = "nothing" if found is None else f"{found['size']:,} bytes"
        raise NetworkError(f"{url}: {size:,} bytes were put, {there} arrived", hint="the same command tries it again")
    return found
