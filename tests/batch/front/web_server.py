"""A server on this machine that answers as a test wants it to, and a policy that lets it be asked."""

import contextlib
import io
import socket
import threading
import time

from PIL import Image

from batch.url_images import UrlFetcher, UrlLimits
from batch.web_addresses import UrlPolicy

PNG = io.BytesIO()
Image.new("RGB", (20, 10), (1, 2, 3)).save(PNG, "PNG")
PNG = PNG.getvalue()
OK = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: %d\r\n\r\n" % len(PNG) + PNG


class Server:
    """Answers every connection with what `routes` says for its path: bytes, or a function of the socket."""

    def __init__(self, tls=None):
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.routes, self.requests, self.tls = {}, [], tls
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                client, _ = self.socket.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client):
        with contextlib.suppress(OSError), contextlib.closing(client):
            if self.tls is not None:
                client = self.tls.wrap_socket(client, server_side=True)
            data = b""
            while b"\r\n\r\n" not in data:
                data += client.recv(65536)
            self.requests.append(data)
            answer = self.routes.get(data.split()[1].decode(), OK)
            if callable(answer):
                answer(client)
            else:
                client.sendall(answer)
            client.close()

    def url(self, path="/p.png", host="pictures.test"):
        return f"http://{host}:{self.port}{path}"


class TestPolicy(UrlPolicy):
    """Everything as in the real one, but the test's server may be asked on its own address and port."""

    __test__ = False
    port = 0

    def check_target(self, target):
        if target.port != self.port:
            super().check_target(target)

    def check_addresses(self, target, addresses):
        public = [address for address in addresses if str(address) != "127.0.0.1"]
        super().check_addresses(target, public)


class Names:
    """A resolver that gives the answers of a script, one after the other, and remembers what it was asked."""

    def __init__(self, *answers):
        self.answers, self.asked = list(answers), []

    def __call__(self, host, port):
        self.asked.append(host)
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


def fetcher_for(server, names=None, **limits):
    policy = type("Policy", (TestPolicy,), {"port": server.port})()
    return UrlFetcher(policy, UrlLimits(**limits), names or Names(["127.0.0.1"]))


def redirect(location, status=302):
    return f"HTTP/1.1 {status} X\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n".encode()


ENDLESS = b"HTTP/1.1 200 OK\r\n\r\n"


def drip(head, piece, pause_s=0.05):
    def answer(client):
        client.sendall(head)
        while True:
            client.sendall(piece)
            time.sleep(pause_s)

    return answer
