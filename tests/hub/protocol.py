"""The hub's HTTP: what each request is answered with. One handler class serves all ports (hub, CDN, Xet)."""

from __future__ import annotations

import io
import json
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any, BinaryIO
from urllib.parse import parse_qs, quote, unquote, urlsplit

from tests.hub.bodies import Cut, Sender, parse_range
from tests.hub.faults import BODY_KINDS, Fault
from tests.hub.repos import Repo, Revision, StoredFile

if TYPE_CHECKING:
    from tests.hub.server import HubServer, Request

LOGIN_PAGE = b"<!DOCTYPE html><html><body>Please log in to this network.</body></html>"
ERRORS = {  # X-Error-Code → status, message
    "RepoNotFound": (404, "Repository not found"),
    "RevisionNotFound": (404, "Invalid rev id"),
    "EntryNotFound": (404, "Entry not found"),
}


class Refused(Exception):
    """An error answer: status, X-Error-Code (may be None) and X-Error-Message."""

    def __init__(self, status: int, code: str | None, message: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


def not_found(code: str) -> Refused:
    status, message = ERRORS[code]
    return Refused(status, code, message)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server_version = "TestHub"
    hub: HubServer  # set on a subclass per server and port
    port_name: str

    def setup(self) -> None:
        super().setup()
        self.hub.connections.add(self.connection)

    def finish(self) -> None:
        self.hub.connections.discard(self.connection)
        super().finish()

    def log_message(self, format: str, *args: object) -> None:
        """Requests are in `hub.requests`; stderr stays quiet."""

    def do_GET(self) -> None:
        self._handle()

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self._handle()

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.request_log: Request = self.hub.log(self)
        url = urlsplit(self.path)
        query = parse_qs(url.query, keep_blank_values=True)
        try:
            if self.port_name == "hub":
                self._authenticate()
                self._route([unquote(part) for part in url.path.strip("/").split("/")], query, body)
            elif self.port_name == "cdn":
                self._cdn(url.path, query)
            else:
                self.hub.xet.answer(self, url.path)
        except Refused as refused:
            self._refuse(refused)
        except Cut:
            self.close_connection = True

    # Who asks

    def _token(self) -> str | None:
        scheme, _, token = (self.headers.get("Authorization") or "").partition(" ")
        return token if scheme == "Bearer" else None

    def _authenticate(self) -> None:
        token = self._token()
        if token is not None and token not in self.hub.tokens | self.hub.strangers:
            raise Refused(401, None, "Invalid credentials in Authorization header")

    def _repo(self, name: str) -> Repo:
        repo = self.hub.repos.get(name)
        token = self._token()
        if repo is None or (repo.private and token not in self.hub.tokens):
            if token is None:  # the hub does not tell strangers whether a repository exists
                raise Refused(401, "RepoNotFound", "Invalid username or password.")
            raise not_found("RepoNotFound")
        return repo

    def _pass_gate(self, repo: Repo) -> None:
        """Files of gated repositories are for users with access; names, sizes and hashes are public."""
        token = self._token()
        if not repo.gated or token in self.hub.tokens:
            return
        restricted = f"Access to model {repo.name} is restricted"
        if token is None:
            raise Refused(401, "GatedRepo", f"{restricted}. You must be authenticated to access it. Please log in.")
        raise Refused(403, "GatedRepo", f"{restricted} and you are not in the authorized list.")

    # What is asked for

    def _route(self, parts: list[str], query: dict[str, list[str]], body: bytes) -> None:
        if parts == ["api", "whoami-v2"]:
            self._strike("api", "whoami")
            if self._token() is None:
                raise Refused(401, None, "Invalid username or password.")
            token = {"displayName": "test", "role": "read", "createdAt": "2025-01-01T00:00:00.000Z"}
            self._json({"type": "user", "id": "1", "name": "tester", "auth": {"accessToken": token}})
        elif parts[:2] == ["api", "models"] and len(parts) >= 4:
            self._api("/".join(parts[2:4]), parts[4:], query, body)
        elif len(parts) >= 5 and parts[2] == "resolve":
            self._resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        else:
            raise Refused(404, None, "Sorry, we can't find the page you are looking for.")

    def _api(self, name: str, rest: list[str], query: dict[str, list[str]], body: bytes) -> None:
        what = {"": "info", "revision": "info"}.get(rest[0] if rest else "", rest[0] if rest else "")
        if self._strike("api", what):
            return
        repo = self._repo(name)
        if what == "refs":
            branches = [{"name": b, "ref": f"refs/heads/{b}", "targetCommit": c} for b, c in repo.branches.items()]
            self._json({"branches": branches, "converts": [], "tags": []})
            return
        revision = self._revision(repo, rest[1] if len(rest) > 1 else "main")
        if what == "info":
            blobs = query.get("blobs", ["false"])[0].lower() == "true"
            self._json(repo.info(revision, blobs, query.get("expand", [])))
        elif what == "tree":
            self._tree(revision, "/".join(rest[2:]), query)
        elif what == "paths-info":
            self._paths_info(revision, body)
        elif what == "xet-read-token":
            self._pass_gate(repo)
            self._json(*self.hub.xet.token())
        else:
            raise Refused(404, None, "Not found")

    def _revision(self, repo: Repo, name: str) -> Revision:
        revision = repo.revision(name)
        if revision is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {name}")
        return revision

    def _tree(self, revision: Revision, folder: str, query: dict[str, list[str]]) -> None:
        flags = {key: query.get(key, ["false"])[0].lower() == "true" for key in ("recursive", "expand")}
        entries = revision.entries(folder, **flags)
        if entries is None:
            raise Refused(404, "EntryNotFound", f"{folder} does not exist on {revision.commit}")
        page_size = min(self.hub.page_size, int(query.get("limit", ["1000"])[0]), 50 if flags["expand"] else 1000)
        start = int(query.get("cursor", ["0"])[0])
        headers = {}
        if start + page_size < len(entries):
            kept = "".join(f"{key}={str(value).lower()}&" for key, value in flags.items())
            target = f"{self.hub.url}{urlsplit(self.path).path}?{kept}limit={page_size}&cursor={start + page_size}"
            headers["Link"] = f'<{target}>; rel="next"'
        self._json(entries[start : start + page_size], headers)

    def _paths_info(self, revision: Revision, body: bytes) -> None:
        if (self.headers.get("Content-Type") or "").startswith("application/json"):
            asked = json.loads(body)
        else:
            form = parse_qs(body.decode())
            asked = {"paths": form.get("paths", []), "expand": form.get("expand", ["false"])[0].lower() == "true"}
        every = {entry["path"]: entry for entry in revision.entries("", True, bool(asked.get("expand"))) or []}
        self._json([every[path] for path in asked["paths"] if path in every])

    def _resolve(self, name: str, revision_name: str, path: str) -> None:
        self.request_log.file = path
        if self._strike("resolve", path):
            return
        repo = self._repo(name)
        revision = self._revision(repo, revision_name)
        self._pass_gate(repo)
        file = revision.files.get(path)
        commit = {"X-Repo-Commit": revision.commit}
        if file is None:
            self._refuse(not_found("EntryNotFound"), commit)
            return
        etag = self._etag("resolve", file, file.etag)
        if self.hub.faults.strike("resolve", self.command, path, "redirect-loop"):
            self._answer(302, {"Location": self.path, **commit})
        elif file.sha256 is None:
            self._file(file, "resolve", {**commit, "ETag": etag, "Content-Disposition": f'inline; filename="{path}"'})
        else:
            token = f"Expires=4102444800&Signature={file.sha256[:16]}"
            location = f"{self.hub.cdn_url}/{repo.name}/{revision.commit}/{quote(path)}?{token}"
            linked = {"X-Linked-Etag": etag, "X-Linked-Size": str(file.size), "ETag": etag, "Location": location}
            xet = self.hub.xet.headers(repo, revision, file) if file.xet_hash else {}
            self._answer(302, commit | linked | xet, f"Found. Redirecting to {location}".encode())

    def _cdn(self, path: str, query: dict[str, list[str]]) -> None:
        _, owner, name, commit, *rest = path.split("/")
        repo = self.hub.repos[f"{owner}/{name}"]
        file = repo.commits[commit].files[unquote("/".join(rest))]
        self.request_log.file = file.path
        if self._strike("cdn", file.path):
            return
        if "Signature" not in query:
            raise Refused(403, None, "Missing signature")
        etag = self._etag("cdn", file, (file.sha256 or "")[:32])  # storage has etags of its own
        self._file(file, "cdn", {"ETag": etag, "Content-Disposition": f'inline; filename="{file.path}"'})

    def _etag(self, where: str, file: StoredFile, right: str) -> str:
        wrong = self.hub.faults.strike(where, self.command, file.path, "wrong-etag")
        return f'"{right[::-1]}"' if wrong else f'"{right}"'

    # Answers

    def _strike(self, where: str, path: str) -> bool:
        """Faults that take the place of an answer: True if one was given."""
        fault = self.hub.faults.strike(where, self.command, path, "status", "drop", "hang", "html")
        if fault is None:
            return False
        if fault.kind == "hang":
            self.hub.closing.wait(fault.seconds)
        if fault.kind in ("drop", "hang"):
            raise Cut
        if fault.kind == "html":
            self._answer(200, {"Content-Type": "text/html"}, LOGIN_PAGE)
            return True
        retry = {"Retry-After": fault.retry_after} if fault.retry_after is not None else {}
        self._refuse(Refused(fault.status, None, f"Test fault {fault.status}"), retry)
        return True

    def _refuse(self, refused: Refused, headers: dict[str, str] | None = None) -> None:
        code = {"X-Error-Code": refused.code} if refused.code else {}
        described = {"X-Error-Message": refused.message, "Content-Type": "application/json; charset=utf-8"}
        body = json.dumps({"error": refused.message}).encode()
        self._answer(refused.status, {**(headers or {}), **code, **described}, body)

    def _json(self, value: Any, headers: dict[str, str] | None = None) -> None:
        content_type = {"Content-Type": "application/json; charset=utf-8"}
        self._answer(200, content_type | (headers or {}), json.dumps(value).encode(), fault_path=self._api_name())

    def _api_name(self) -> str:
        parts = urlsplit(self.path).path.strip("/").split("/")
        return parts[4].replace("revision", "info") if len(parts) > 4 else "info"

    def _answer(self, status: int, headers: dict[str, str], body: bytes = b"", fault_path: str | None = None) -> None:
        """A whole answer from memory; `fault_path` lets faults of bodies strike it."""
        fault = self.hub.faults.strike("api", self.command, fault_path, *BODY_KINDS) if fault_path else None
        self._start(status, headers, len(body))
        self._send(io.BytesIO(body), 0, len(body), fault)

    def _file(self, file: StoredFile, where: str, headers: dict[str, str]) -> None:
        """A file or the range of it that the client asked for."""
        asked = parse_range(self.headers.get("Range"), file.size)
        condition = self.headers.get("If-Range")
        if asked is None:
            self._answer(416, {"Content-Range": f"bytes */{file.size}"})
            return
        if condition and condition != headers["ETag"]:
            asked = parse_range(None, file.size)
        assert asked is not None
        offsets = range(asked.start, asked.stop)
        fault = self.hub.faults.strike(where, self.command, file.path, *BODY_KINDS, has_byte=offsets)
        kind = fault.kind if fault else None
        if kind == "no-range":
            asked = parse_range(None, file.size)
            assert asked is not None
        count = asked.stop - asked.start - (min(fault.after_bytes, len(offsets)) if fault and kind == "short" else 0)
        if asked.asked:
            headers = headers | {"Content-Range": asked.content_range}
        if kind != "no-range":
            headers = headers | {"Accept-Ranges": "bytes"}
        self._start(206 if asked.asked else 200, headers, None if kind == "no-length" else count)
        with open(file.source, "rb", buffering=0) as source:
            self._send(source, 0 if kind == "wrong-range" else asked.start, count, fault)

    def _start(self, status: int, headers: dict[str, str], length: int | None) -> None:
        self.request_log.status = status
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if length is None:
            self.send_header("Connection", "close")
        else:
            self.send_header("Content-Length", str(length))
        self.end_headers()

    def _send(self, source: BinaryIO, start: int, count: int, fault: Fault | None) -> None:
        if self.command == "HEAD":
            return
        rate = self.hub.rate if self.port_name != "hub" else None
        Sender(self.connection, self.hub.closing, self.request_log.add).send(source, start, count, rate, fault)
