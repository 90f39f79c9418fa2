"""Lines whose pictures are on the web: their own threads, bounded waits, answers in order."""

import json
import time

import pytest

from batch.jsonl import RawLine
from batch.prepare import LinePreparer, PreparingSource
from tests.batch.front.web_server import OK, Server, drip, fetcher_for


@pytest.fixture
def server():
    server = Server()
    yield server
    server.socket.close()


def test_lines_with_pictures_from_the_web(front, server, tmp_path):
    """Slow servers do not hold up the preparing of other lines; every line has its answer, in order."""
    server.routes |= {
        "/slow": drip(b"", b"1"),
        "/gone": b"HTTP/1.1 404 N\r\n\r\n",
        "/html": b"HTTP/1.1 200 OK\r\n\r\n<html>",
    }
    ours = fetcher_for(server, total_s=1.5, stall_s=1)
    preparer = LinePreparer(front.arch, front.chat, front.tiles, front.defaults, tmp_path, 4, ours)
    lines = [{"prompt": "x", "images": [server.url(path)]} for path in ("/slow", "/p.png", "/gone", "/html")]
    lines += [{"prompt": f"line {i}"} for i in range(30)]
    seen, errors = [], {}
    raw = (RawLine(i, json.dumps(line).encode()) for i, line in enumerate(lines, 1))
    source = PreparingSource(
        raw,
        preparer,
        lambda info, request: seen.append(info.number),
        lambda info, error: errors.update({info.number: error.code}),
    )
    started_s = time.monotonic()
    assert source.take(wait=False) is None  # the first line waits for its server
    time.sleep(1)
    first, *others = source._queue
    assert not first.done() and all(pending.done() for pending in others), "the others are prepared meanwhile"
    while source.take(wait=True) is not None:
        pass
    source.close()
    assert time.monotonic() - started_s < 5
    assert errors == {1: "url_failed", 3: "url_failed", 4: "invalid_image"} and seen == [2, *range(5, 35)]


def test_many_slow_pictures_in_one_line_end_together(front, server, tmp_path, monkeypatch):
    monkeypatch.setattr("batch.prepare.LINE_FETCH_S", 0.8)

    def late(client):
        time.sleep(0.3)
        client.sendall(OK)

    server.routes["/p.png"] = late
    preparer = LinePreparer(front.arch, front.chat, front.tiles, front.defaults, tmp_path, 48, fetcher_for(server))
    started_s = time.monotonic()
    prepared = preparer.prepare(RawLine(1, json.dumps({"prompt": "x", "images": [server.url()] * 40}).encode()))
    assert prepared.error.code == "url_failed" and time.monotonic() - started_s < 2
