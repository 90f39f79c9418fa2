"""Xet's side of the hub: the headers that name it, read tokens, and a storage server (CAS) on a port of its own."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from tests.hub.repos import Repo, Revision, StoredFile

if TYPE_CHECKING:
    from tests.hub.protocol import Handler
    from tests.hub.server import HubServer


class Xet:
    def __init__(self, hub: HubServer) -> None:
        self.hub = hub

    def headers(self, repo: Repo, revision: Revision, file: StoredFile) -> dict[str, str]:
        """What /resolve/ adds for a file that is in Xet."""
        auth = f"{self.hub.url}/api/models/{repo.name}/xet-read-token/{revision.commit}"
        info = f"{self.hub.xet_url}/v1/reconstructions/{file.xet_hash}"
        return {
            "X-Xet-Hash": file.xet_hash or "",
            "X-Xet-Refresh-Route": auth,
            "Link": f'<{auth}>; rel="xet-auth", <{info}>; rel="xet-reconstruction-info"',
        }

    def token(self) -> tuple[dict[str, Any], dict[str, str]]:
        """Body and headers of /xet-read-token/."""
        expires = int(time.time()) + 3600
        body = {"accessToken": "xet-token", "exp": expires, "casUrl": self.hub.xet_url}
        headers = {
            "X-Xet-Access-Token": "xet-token",
            "X-Xet-Token-Expiration": str(expires),
            "X-Xet-Cas-Url": self.hub.xet_url,
        }
        return body, headers

    def answer(self, handler: Handler, path: str) -> None:
        handler._strike("xet", "reconstruction")
        self.hub.closing.wait(3600)
