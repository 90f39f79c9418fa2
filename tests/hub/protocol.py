"""The hub's HTTP: what each request means. One handler class serves all ports (hub, CDN, Xet's storage)."""

from __future__ import annotations

import json
from urllib.parse import parse_qs, quote, unquote, urlsplit

from tests.hub.answers import Answers, Done, Refused
from tests.hub.bodies import Cut
from tests.hub.repos import Repo, Revision, StoredFile

Query = dict[str, list[str]]


class Handler(Answers):
    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.request_log = self.hub.log(self)
        url = urlsplit(self.path)
        query = parse_qs(url.query, keep_blank_values=True)
        try:
            if self.port_name == "hub":
                self._authenticate()
                self._route([unquote(part) for part in url.path.strip("/").split("/")], query, body)
            elif self.port_name == "cdn":
                self._cdn(url.path, query)
            else:
                self.hub.xet.serve(self, url.path)
        except Refused as refused:
            self.refuse(refused)
        except Done:
            pass
        except Cut:
            self.close_connection = True

    do_HEAD = do_POST = do_GET

    # Who asks

    def _token(self) -> str | None:
        scheme, _, token = (self.headers.get("Authorization") or "").partition(" ")
        return token if scheme.lower() == "bearer" else None

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
            raise Refused(404, "RepoNotFound", "Repository not found")
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

    def _revision(self, repo: Repo, name: str) -> Revision:
        revision = repo.revision(name)
        if revision is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {name}")
        return revision

    # What is asked for

    def _route(self, parts: list[str], query: Query, body: bytes) -> None:
        if parts == ["api", "whoami-v2"]:
            self._whoami()
        elif parts[:3] == ["api", "resolve-cache", "models"] and len(parts) > 6:
            self._resolve_cache("/".join(parts[3:5]), parts[5], "/".join(parts[6:]))
        elif parts[:2] == ["api", "models"] and len(parts) >= 4:
            self._api("/".join(parts[2:4]), parts[4:], query, body)
        elif len(parts) >= 5 and parts[2] == "resolve":
            self._resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        else:
            raise Refused(404, None, "Sorry, we can't find the page you are looking for.")

    def _whoami(self) -> None:
        self.strike("api", "whoami")
        if self._token() is None:
            raise Refused(401, None, "Invalid username or password.")
        token = {"displayName": "test", "role": "read", "createdAt": "2025-01-01T00:00:00.000Z"}
        self.send_json({"type": "user", "id": "1", "name": "tester", "auth": {"accessToken": token}})

    def _api(self, name: str, rest: list[str], query: Query, body: bytes) -> None:
        what = rest[0] if rest and rest[0] != "revision" else "info"
        self.strike("api", what)
        repo = self._repo(name)
        if what == "refs":
            branches = [{"name": b, "ref": f"refs/heads/{b}", "targetCommit": c} for b, c in repo.branches.items()]
            self.send_json({"branches": branches, "converts": [], "tags": []}, fault_path=what)
            return
        revision = self._revision(repo, rest[1] if len(rest) > 1 else "main")
        if what == "info":
            self.send_json(repo.info(revision, flag(query, "blobs"), query.get("expand", [])), fault_path=what)
        elif what == "tree":
            self._tree(revision, "/".join(rest[2:]), query)
        elif what == "paths-info":
            self._paths_info(revision, body)
        elif what == "xet-read-token":
            self._pass_gate(repo)
            self.send_json(*self.hub.xet.token(), fault_path=what)
        else:
            raise Refused(404, None, "Not found")

    def _tree(self, revision: Revision, folder: str, query: Query) -> None:
        recursive, expand = flag(query, "recursive"), flag(query, "expand")
        entries = revision.entries(folder, recursive, expand)
        if entries is None:
            raise Refused(404, "EntryNotFound", f"{folder} does not exist on {revision.commit}")
        page_size = min(self.hub.page_size, int(query.get("limit", ["1000"])[0]), 50 if expand else 1000)
        start = int(query.get("cursor", ["0"])[0])
        headers = {}
        if start + page_size < len(entries):
            asked = f"recursive={recursive}&expand={expand}&limit={page_size}&cursor={start + page_size}".lower()
            headers["Link"] = f'<{self.hub.url}{urlsplit(self.path).path}?{asked}>; rel="next"'
        self.send_json(entries[start : start + page_size], headers, fault_path="tree")

    def _paths_info(self, revision: Revision, body: bytes) -> None:
        if (self.headers.get("Content-Type") or "").startswith("application/json"):
            asked = json.loads(body)
            paths, expand = asked["paths"], bool(asked.get("expand"))
        else:
            form = parse_qs(body.decode())
            paths, expand = form.get("paths", []), flag(form, "expand")
        every = {entry["path"]: entry for entry in revision.entries("", True, expand) or []}
        self.send_json([every[path] for path in paths if path in every], fault_path="paths-info")

    def _file_asked(self, name: str, revision_name: str, path: str) -> tuple[Repo, Revision, StoredFile]:
        """The file of a /resolve/ request, once all questions of access are settled."""
        self.request_log.file = path
        self.strike("resolve", path)
        repo = self._repo(name)
        revision = self._revision(repo, revision_name)
        self._pass_gate(repo)
        if path not in revision.files:
            raise Refused(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": revision.commit})
        return repo, revision, revision.files[path]

    def _resolve(self, name: str, revision_name: str, path: str) -> None:
        """Small files at once (or from the hub's own cache, by a relative redirect), large ones from the CDN."""
        repo, revision, file = self._file_asked(name, revision_name, path)
        headers = {"X-Repo-Commit": revision.commit, "ETag": self._etag("resolve", file, file.etag)}
        if self.hub.faults.strike("resolve", self.command, path, "redirect-loop"):
            self.answer(302, headers | {"Location": self.path})
        elif file.sha256 is None and not self.hub.resolve_cache:
            self.send_file(file, "resolve", headers | disposition(file))
        else:
            headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(file.size)}
            if file.sha256 is None:
                location = f"/api/resolve-cache/models/{repo.name}/{revision.commit}/{quote(path)}?etag={file.etag}"
            else:
                signed = f"Expires=4102444800&Signature={file.sha256[:16]}"
                location = f"{self.hub.cdn_url}/{repo.name}/{revision.commit}/{quote(path)}?{signed}"
            xet = self.hub.xet.headers(repo, revision, file) if file.xet_hash else {}
            status = 302 if file.sha256 else 307
            self.answer(status, headers | xet | {"Location": location}, f"Redirecting to {location}".encode())

    def _resolve_cache(self, name: str, commit: str, path: str) -> None:
        _, revision, file = self._file_asked(name, commit, path)
        headers = {"X-Repo-Commit": revision.commit, "ETag": self._etag("resolve", file, file.etag)}
        self.send_file(file, "resolve", headers | disposition(file))

    def _cdn(self, path: str, query: Query) -> None:
        owner, name, commit, *rest = [unquote(part) for part in path.strip("/").split("/")]
        file = self.hub.repos[f"{owner}/{name}"].commits[commit].files["/".join(rest)]
        self.request_log.file = file.path
        self.strike("cdn", file.path)
        if "Signature" not in query:
            raise Refused(403, None, "Missing signature")
        etag = self._etag("cdn", file, (file.sha256 or "")[:32])  # storage has etags of its own
        self.send_file(file, "cdn", {"ETag": etag} | disposition(file))

    def _etag(self, where: str, file: StoredFile, right: str) -> str:
        wrong = self.hub.faults.strike(where, self.command, file.path, "wrong-etag")
        return f'"{right[::-1]}"' if wrong else f'"{right}"'


def flag(query: Query, name: str) -> bool:
    return query.get(name, ["false"])[0].lower() in ("true", "1")


def disposition(file: StoredFile) -> dict[str, str]:
    return {"Content-Disposition": f'inline; filename="{file.path.split("/")[-1]}"'}
