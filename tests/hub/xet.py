"""Xet's side of the hub: the headers that name it, read tokens, and a storage server (CAS) on a port of its own.

A file is stored as xorbs of up to 16 MiB of uncompressed chunks; its hash is its sha256, which the client takes as
given. Only what a download needs: reconstructions (version 1 of the API) and ranges of xorbs.
"""

from __future__ import annotations

import hashlib
import io
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from tests.hub.answers import Refused
from tests.hub.bodies import ByteRange, parse_range
from tests.hub.faults import BODY_KINDS
from tests.hub.repos import Repo, Revision, StoredFile

if TYPE_CHECKING:
    from tests.hub.protocol import Handler
    from tests.hub.server import HubServer

TOKEN = "xet-token"
CHUNK_BYTES = 2**16
CHUNKS_PER_XORB = 256
HEADER_BYTES = 8


class Xet:
    def __init__(self, hub: HubServer) -> None:
        self.hub = hub

    def headers(self, repo: Repo, revision: Revision, file: StoredFile) -> dict[str, str]:
        """What /resolve/ adds for a file that is in Xet."""
        auth = f"{self.hub.url}/api/models/{repo.name}/xet-read-token/{revision.commit}"
        info = f"{self.hub.xet_url}/v1/reconstructions/{file.xet_hash}"
        links = f'<{auth}>; rel="xet-auth", <{info}>; rel="xet-reconstruction-info"'
        return {"X-Xet-Hash": file.xet_hash or "", "X-Xet-Refresh-Route": auth, "Link": links}

    def token(self) -> tuple[dict[str, Any], dict[str, str]]:
        """Body and headers of /xet-read-token/."""
        expires, url = int(time.time()) + 3600, self.hub.xet_url
        headers = {"X-Xet-Access-Token": TOKEN, "X-Xet-Token-Expiration": str(expires), "X-Xet-Cas-Url": url}
        return {"accessToken": TOKEN, "exp": expires, "casUrl": url}, headers

    def serve(self, handler: Handler, path: str) -> None:
        """Requests to the storage port; faults strike `reconstruction` and `xorb`."""
        match urlsplit(path).path.strip("/").split("/"):
            case ["v1", "reconstructions", file_hash]:
                handler.strike("xet", "reconstruction")
                if handler.headers.get("Authorization") != f"Bearer {TOKEN}":
                    raise Refused(401, None, "Unauthorized")
                handler.send_json(self._reconstruction(self._file(file_hash), handler.headers.get("Range")))
            case ["xorbs", file_hash, number]:
                handler.strike("xet", "xorb")
                self._send_xorb(handler, self._file(file_hash), int(number))
            case _:  # the client falls back from version 2 to version 1 at a 404
                raise Refused(404, None, "Not found")

    def _file(self, file_hash: str) -> StoredFile:
        for repo in list(self.hub.repos.values()):
            for revision in list(repo.commits.values()):
                for file in revision.files.values():
                    if file.xet_hash == file_hash:
                        return file
        raise Refused(404, None, "Not found")

    def _reconstruction(self, file: StoredFile, range_header: str | None) -> dict[str, Any]:
        """Which chunks of which xorbs make up the asked bytes of a file."""
        asked = parse_range(range_header, file.size)
        if asked is None:
            raise Refused(416, None, "Range not satisfiable")
        first, last = asked.start // CHUNK_BYTES, -(-asked.stop // CHUNK_BYTES)  # chunks of the file, half-open
        terms, fetch_info = [], {}
        for number in range(first // CHUNKS_PER_XORB, -(-last // CHUNKS_PER_XORB)):
            base = number * CHUNKS_PER_XORB
            chunks = {"start": max(first, base) - base, "end": min(last, base + CHUNKS_PER_XORB) - base}
            start, stop = (min((base + index) * CHUNK_BYTES, file.size) for index in chunks.values())
            xorb = hashlib.sha256(f"{file.xet_hash} {number}".encode()).hexdigest()
            offset = chunks["start"] * (CHUNK_BYTES + HEADER_BYTES)
            stored = stop - start + HEADER_BYTES * (chunks["end"] - chunks["start"])
            url_range = {"start": offset, "end": offset + stored - 1}
            url = f"{self.hub.xet_url}/xorbs/{file.xet_hash}/{number}"
            terms.append({"hash": xorb, "unpacked_length": stop - start, "range": chunks})
            fetch_info[xorb] = [{"range": chunks, "url": url, "url_range": url_range}]
        return {"offset_into_first_range": asked.start % CHUNK_BYTES, "terms": terms, "fetch_info": fetch_info}

    def _send_xorb(self, handler: Handler, file: StoredFile, number: int) -> None:
        handler.request_log.file = file.path
        body = _xorb(file, number)
        asked = parse_range(handler.headers.get("Range"), len(body)) or ByteRange(0, len(body), len(body), False)
        fault = self.hub.faults.strike("xet", handler.command, "xorb", *BODY_KINDS)
        headers = {"Content-Range": asked.content_range} if asked.asked else {}
        handler.start(206 if asked.asked else 200, headers, asked.stop - asked.start)
        handler.send_body(io.BytesIO(body), asked.start, asked.stop - asked.start, fault)


def _xorb(file: StoredFile, number: int) -> bytes:
    """Chunks, each after its header: version 0, stored length (3 bytes), compression 0 = none, length (3 bytes)."""
    parts = []
    with open(file.source, "rb") as source:
        source.seek(number * CHUNKS_PER_XORB * CHUNK_BYTES)
        for _ in range(CHUNKS_PER_XORB):
            if not (chunk := source.read(CHUNK_BYTES)):
                break
            length = len(chunk).to_bytes(3, "little")
            parts += [b"\0" + length + b"\0" + length, chunk]
    return b"".join(parts)
