"""Fetching pictures against a real server on this machine, made reachable by a policy that says so."""

import socket
import ssl
import subprocess
import threading
import time

import pytest

from batch.images import read_source
from batch.schema import LineError
from batch.url_images import UrlFetcher
from batch.web_addresses import HostRule, UrlPolicy
from tests.batch.front.web_server import ENDLESS, PNG, Names, Server, TestPolicy, drip, fetcher_for, redirect


@pytest.fixture
def server():
    server = Server()
    yield server
    server.socket.close()


def error_of(fetcher, url):
    started_s = time.monotonic()
    with pytest.raises(LineError) as caught:
        fetcher.fetch(url)
    return caught.value.code, caught.value.message, time.monotonic() - started_s


def test_a_picture_comes_whatever_its_declared_type(server):
    assert fetcher_for(server).fetch(server.url("/a%20b?c=d#e")) == PNG
    head = server.requests[0].decode()
    assert head.startswith("GET /a%20b?c=d HTTP/1.1\r\n") and f"Host: pictures.test:{server.port}\r\n" in head
    assert not any(name in head.lower() for name in ("cookie", "referer", "authorization", "gzip"))


def test_proxies_of_the_environment_are_not_used(server, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert fetcher_for(server).fetch(server.url()) == PNG


def test_a_name_is_looked_up_once_and_the_checked_address_is_the_one_asked(server, monkeypatch):
    """DNS rebinding: the second answer would be private, but nobody asks a second time."""
    names = Names(["93.184.216.34"], ["127.0.0.1"])
    connected = []
    real = socket.create_connection

    def connect(address, timeout):
        connected.append(address)
        return real(("127.0.0.1", server.port), timeout)  # stands for the public server

    monkeypatch.setattr("socket.create_connection", connect)
    assert UrlFetcher(UrlPolicy(), resolve=names).fetch("http://rebind.test/p.png") == PNG
    assert names.asked == ["rebind.test"] and connected == [("93.184.216.34", 80)]
    assert b"Host: rebind.test\r\n" in server.requests[0]


def test_each_hop_is_looked_up_and_checked_again(server):
    names = Names(["127.0.0.1"], ["10.0.0.5"])
    server.routes["/p.png"] = redirect("http://inner.test/x.png")
    code, message, _ = error_of(fetcher_for(server, names), server.url())
    assert code == "url_not_allowed" and "inner.test" in message and names.asked == ["pictures.test", "inner.test"]


@pytest.mark.parametrize(
    "location",
    [
        "http://169.254.169.254/latest/meta-data/", "http://2130706433/", "http://[::1]/", "//127.0.0.1:22/", "file:///etc/passwd",
        "http://user@pictures.test/", "http://127.1/", "http://[::ffff:10.0.0.1]/", "gopher://x/", "http://a\\b/",
        "http://localhost:6379/", "http://0x7f000001/x", "http://①.test/",
    ],
)  # fmt: skip
@pytest.mark.parametrize("status", [301, 307])
def test_redirects_to_bad_places_are_refused(server, location, status):
    server.routes["/p.png"] = redirect(location, status)
    code, _, _ = error_of(fetcher_for(server), server.url())
    assert code == "url_not_allowed" and len(server.requests) == 1


def test_good_redirects_are_followed_and_endless_ones_are_not(server):
    server.routes |= {
        "/a": redirect("/b"),
        "/b": redirect(server.url("/c", "other.test"), 308),
        "/loop": redirect("/loop"),
    }
    assert fetcher_for(server).fetch(server.url("/a")) == PNG
    server.requests.clear()
    code, message, _ = error_of(fetcher_for(server), server.url("/loop"))
    assert code == "url_failed" and "5 redirects" in message and len(server.requests) == 6


@pytest.mark.parametrize(
    "head",
    [b"", b"HTTP/1.1 200 OK\r\nX: ", b"HTTP/1.1 200 OK\r\n\r\n",
     b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n",
     b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n", b"HTTP/1.1 100 Continue\r\n\r\n"],
)  # fmt: skip
def test_slow_answers_end_with_the_total_time(server, head):
    server.routes["/p.png"] = drip(head, b"1")
    code, message, took_s = error_of(fetcher_for(server, total_s=0.6, stall_s=0.3), server.url())
    assert code == "url_failed" and "too long" in message and 0.5 < took_s < 2


def test_silence_ends_with_the_stall_time(server):
    server.routes["/p.png"] = lambda client: time.sleep(5)
    code, _, took_s = error_of(fetcher_for(server, total_s=4, stall_s=0.3), server.url())
    assert code == "url_failed" and took_s < 2


def test_slow_names_end_with_the_total_time(server):
    def resolve(host, port):
        time.sleep(1.5)
        return ["127.0.0.1"]

    code, message, took_s = error_of(fetcher_for(server, resolve, total_s=0.3), server.url())
    assert code == "url_failed" and "name" in message and took_s < 1


def test_endless_bodies_end_with_the_size(server):
    sent = []

    def flood(client):
        client.sendall(ENDLESS)
        while True:
            sent.append(client.send(b"x" * 65536))

    server.routes["/p.png"] = flood
    code, message, _ = error_of(fetcher_for(server, max_bytes=500_000), server.url())
    assert code == "image_too_large" and "pictures.test" in message
    time.sleep(0.2)
    assert sum(sent) < 20 * 2**20


def test_a_declared_size_is_enough_to_refuse(server):
    server.routes["/p.png"] = b"HTTP/1.1 200 OK\r\nContent-Length: 999999999999\r\n\r\n"
    assert error_of(fetcher_for(server), server.url())[0] == "image_too_large"


def test_the_size_limit_is_exact(server):
    assert fetcher_for(server, max_bytes=len(PNG)).fetch(server.url()) == PNG
    assert error_of(fetcher_for(server, max_bytes=len(PNG) - 1), server.url())[0] == "image_too_large"


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", "status 404"),
        (b"HTTP/1.1 206 Partial\r\nContent-Length: 1\r\n\r\nx", "status 206"),
        (b"HTTP/1.1 302 Found\r\n\r\n", "to nowhere"),
        (b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 3\r\n\r\nxyz", "compressed"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\nxyz", "47 bytes before the end"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab", "cannot fetch"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "cannot fetch"),
        (b"garbage\r\n\r\n", "cannot fetch"),
        (b"", "cannot fetch"),
        (b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 1000 + b"\r\n", "cannot fetch"),
        (b"HTTP/1.1 200 OK\r\nA: " + b"b" * 100_000 + b"\r\n\r\n", "cannot fetch"),
    ],
)
def test_bad_answers(server, answer, text):
    server.routes["/p.png"] = answer
    code, message, _ = error_of(fetcher_for(server), server.url())
    assert code == "url_failed" and text in message


def test_chunked_bodies(server):
    server.routes["/p.png"] = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (
        len(PNG),
        PNG,
    )
    assert fetcher_for(server).fetch(server.url()) == PNG


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=pictures.test"]
    command += ["-addext", "subjectAltName=DNS:pictures.test", "-keyout", folder / "key", "-out", folder / "cert"]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no openssl")
    return folder / "cert", folder / "key"


@pytest.fixture
def tls_server(certificate):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    server = Server(context)
    yield server
    server.socket.close()


def test_self_signed_servers_are_refused(tls_server):
    url = tls_server.url().replace("http:", "https:")
    code, message, _ = error_of(fetcher_for(tls_server), url)
    assert code == "url_failed" and "certificate" in message and not tls_server.requests


def test_certificates_are_checked_against_the_name_not_the_address(tls_server, certificate):
    trusting = ssl.create_default_context(cafile=str(certificate[0]))
    policy = type("Policy", (TestPolicy,), {"port": tls_server.port})()
    ours = UrlFetcher(policy, resolve=Names(["127.0.0.1"]), tls=trusting)
    assert ours.fetch(tls_server.url().replace("http:", "https:")) == PNG
    code, message, _ = error_of(ours, tls_server.url(host="other.test").replace("http:", "https:"))
    assert code == "url_failed" and "certificate" in message
    tls_server.routes["/p.png"] = redirect("http://pictures.test/p.png")
    code, message, _ = error_of(ours, tls_server.url().replace("http:", "https:"))
    assert code == "url_not_allowed" and "https to http" in message


def test_the_real_policy_never_reaches_this_machine(server):
    for url in (server.url(), f"http://127.0.0.1:{server.port}/", f"http://localhost:{server.port}/"):
        assert error_of(UrlFetcher(UrlPolicy(), resolve=Names(["127.0.0.1"])), url)[0] == "url_not_allowed"
    assert not server.requests


def test_a_host_and_port_named_by_the_operator_may_be_private(server):
    policy = UrlPolicy((HostRule.parse(f"127.0.0.1:{server.port}"),))
    assert UrlFetcher(policy).fetch(f"http://127.0.0.1:{server.port}/p.png") == PNG
    server.routes["/p.png"] = redirect("http://127.0.0.1/x")
    assert error_of(UrlFetcher(policy), f"http://127.0.0.1:{server.port}/p.png")[0] == "url_not_allowed"


def test_the_next_address_is_tried_when_one_does_not_answer(server):
    names = Names(["93.184.216.34", "127.0.0.1"])
    real, tried = socket.create_connection, []

    def connect(address, timeout):
        tried.append(address[0])
        if address[0] != "127.0.0.1":
            raise ConnectionRefusedError
        return real(address, timeout)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("socket.create_connection", connect)
        assert fetcher_for(server, names).fetch(server.url()) == PNG
    assert tried == names.answers[0]


def test_closing_ends_what_waits(server):
    server.routes["/p.png"] = lambda client: time.sleep(8)
    ours = fetcher_for(server)
    threading.Timer(0.3, ours.close).start()
    code, _, took_s = error_of(ours, server.url())
    assert code == "url_failed" and took_s < 2
    assert "stopped" in error_of(ours, server.url())[1]


def test_off_by_default(tmp_path):
    for source in ("https://example.com/x.png", "HTTP://example.com/x.png"):
        with pytest.raises(LineError, match="--allow-url-images") as caught:
            read_source(source, tmp_path)
        assert caught.value.code == "remote_image"
