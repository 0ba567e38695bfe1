"""The connection against servers that send too much, elsewhere, or packed; and what of the key leaves by it."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import socketserver
import subprocess
import sys
import threading
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO

import openai
import pytest

from gapg_rollout.oracle.connection import ReplyTooLarge, connect, most_bytes, post
from gapg_rollout.oracle.endpoint import read_endpoint
from gapg_rollout.oracle.reply import ReplyError
from tests.rollout.oracle_checks import KEY

pytestmark = pytest.mark.usefixtures("bare_environment")

BODY = {"model": "m", "messages": [{"role": "user", "content": "q"}]}
MAX_BYTES = 200_000
Script = Callable[[BinaryIO], None]


class Server(socketserver.ThreadingTCPServer):
    """Reads a request, keeps its head in `heads`, and lets the script write what it likes."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, script: Script) -> None:
        self.script, self.heads = script, list[str]()
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: object, client_address: object) -> None:
        """Silent: clients that leave are wanted."""


class Handler(socketserver.StreamRequestHandler):
    server: Server

    def handle(self) -> None:
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += self.rfile.readline()
        self.server.heads.append(head.decode())
        length = next(line for line in head.decode().lower().splitlines() if line.startswith("content-length"))
        self.rfile.read(int(length.partition(":")[2]))
        self.server.script(self.wfile)


@pytest.fixture
def serve() -> Iterator[Callable[[Script], Server]]:
    running: list[Server] = []

    def start(script: Script) -> Server:
        running.append(Server(script))
        threading.Thread(target=running[-1].serve_forever, args=(0.02,), daemon=True).start()
        return running[-1]

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


def reply(body: bytes, status: str = "200 OK", *headers: str) -> Script:
    def write(wire: BinaryIO) -> None:
        lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers, "", ""]
        wire.write("\r\n".join(lines).encode("latin-1") + body)

    return write


def endless(head: str, piece: bytes) -> Script:
    def write(wire: BinaryIO) -> None:
        wire.write(head.encode() + b"\r\n")
        while True:
            wire.write(piece)

    return write


def ask(url: str, max_bytes: int = MAX_BYTES, timeout_s: float = 5.0) -> bytes:
    async def run() -> bytes:
        client = connect(read_endpoint(url, "OPENAI_API_KEY"), timeout_s=timeout_s, max_bytes=max_bytes)
        try:
            return await post(client, BODY)
        finally:
            await client.close()

    return asyncio.run(run())


def peak(call: Callable[[], object]) -> float:
    """Megabytes that the call took at most, where it began with none."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1] / 1e6
    finally:
        tracemalloc.stop()


def test_the_body_comes_back_byte_by_byte(serve: Callable[[Script], Server], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = serve(reply(b"\xff no json \x00", "200 OK", "Content-Type: text/plain; charset=utf-7", "Set-Cookie: a=b"))
    assert ask(server.url) == b"\xff no json \x00"
    head = server.heads[0]
    assert head.startswith("POST /v1/chat/completions ") and f"uthorization: Bearer {KEY}\r\n" in head
    assert "accept-encoding: identity\r\n" in head.lower()


@pytest.mark.parametrize(
    ("head", "piece"),
    [
        ("HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n", b" " * 65536),
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n", b"1000\r\n" + b"x" * 4096 + b"\r\n"),
        ("HTTP/1.1 200 OK\r\nContent-Length: 100000000000\r\n", b"x" * 65536),
        ("HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n", b"x" * 65536),
    ],
    ids=["until it closes", "chunked", "announced", "packed"],
)
def test_a_body_without_end_is_given_up(serve: Callable[[Script], Server], head: str, piece: bytes) -> None:
    server = serve(endless(head, piece))

    def call() -> None:
        with pytest.raises(ReplyTooLarge, match="longer than 200000 bytes") as failure:
            ask(server.url)
        assert failure.value.billed and not failure.value.retry

    assert peak(call) < 5


@pytest.mark.parametrize("pack", [gzip.compress, zlib.compress, lambda body: gzip.compress(gzip.compress(body))])
def test_a_bomb_is_not_unpacked(serve: Callable[[Script], Server], pack: Callable[[bytes], bytes]) -> None:
    bomb = pack(b" " * 50_000_000)
    encoding = "gzip, gzip" if len(bomb) < 5_000 else "gzip" if bomb[:2] == b"\x1f\x8b" else "deflate"
    server = serve(reply(bomb, "200 OK", f"Content-Encoding: {encoding}"))

    def call() -> None:
        with pytest.raises(ReplyTooLarge):
            ask(server.url)

    assert peak(call) < 5


def test_an_honest_body_is_unpacked_although_none_was_asked_for(serve: Callable[[Script], Server]) -> None:
    body = json.dumps({"choices": "x" * 1000}).encode()
    for encoding, packed in (("gzip", gzip.compress(body)), ("deflate", zlib.compress(body)), ("Identity", body)):
        assert ask(serve(reply(packed, "200 OK", f"Content-Encoding: {encoding}")).url) == body
    with pytest.raises(ReplyError, match=r"compressed \(br\), unasked") as failure:
        ask(serve(reply(b"??", "200 OK", "Content-Encoding: br")).url)
    assert failure.value.billed and not failure.value.retry
    with pytest.raises(ReplyError, match="cannot be unpacked"):
        ask(serve(reply(b"no gzip", "200 OK", "Content-Encoding: gzip")).url)


def long_error(wire: BinaryIO) -> None:
    wire.write(b"HTTP/1.1 429 Slow\r\nRetry-After: 7\r\nContent-Length: 10000000\r\n\r\n<html>")
    for _ in range(99):
        wire.write(b"x" * 100_000)


@pytest.mark.parametrize(
    "script",
    [
        long_error,
        endless("HTTP/1.1 429 Slow\r\nRetry-After: 7\r\n", b"x" * 65536),
        reply(gzip.compress(b" " * 20_000_000), "429 Slow", "Retry-After: 7", "Content-Encoding: gzip"),
        reply(b"??", "429 Slow", "Retry-After: 7", "Content-Encoding: br"),
        reply(b'{"error": {"message": "no"}}', "429 Slow", "Retry-After: 7", "Content-Type: a/b; charset=hex_codec"),
    ],
    ids=["long", "endless", "bomb", "packed", "charset"],
)
def test_a_status_says_what_it_says_whatever_its_body(serve: Callable[[Script], Server], script: Script) -> None:
    server = serve(script)

    def call() -> None:
        with pytest.raises(openai.RateLimitError) as failure:
            ask(server.url)
        assert failure.value.response.headers["retry-after"] == "7"
        assert len(failure.value.response.content) <= MAX_BYTES

    assert peak(call) < 5
    assert len(server.heads) == 1  # the client itself tries nothing again


@pytest.mark.parametrize(
    ("location", "where"),
    [
        ("https://api.example.com/v1/chat/completions?token=hunter2#hunter2", "to https://api.example.com;"),
        ("https://me:hunter2@other.example:444/x", "to https://other.example:444;"),
        ("/hunter2", "to http://127.0.0.1:"),
        ("//other.example/hunter2", "to http://other.example;"),
        ("", "without saying where"),
        ("https://[hunter2", "to what is no URL"),
        ("data:hunter2", "without saying where"),
    ],
)
def test_a_redirect_is_not_followed(serve: Callable[[Script], Server], location: str, where: str) -> None:
    status = f"30{1 + len(location) % 8} Elsewhere"
    server = serve(reply(b"hunter2", status, f"Location: {location}"))
    with pytest.raises(ReplyError) as failure:
        ask(server.url)
    error = failure.value
    assert where in error.words and "set base_url" in error.words and "hunter2" not in error.words
    assert (error.billed, error.retry, error.code) == (False, False, status[:3])
    assert len(server.heads) == 1


def test_headers_without_end_are_given_up(serve: Callable[[Script], Server]) -> None:
    server = serve(endless("HTTP/1.1 200 OK", b"X-Filler: " + b"x" * 1000 + b"\r\n"))

    def call() -> None:
        with pytest.raises(openai.APIConnectionError):
            ask(server.url)

    assert peak(call) < 5


def test_a_server_that_says_nothing_is_given_up(serve: Callable[[Script], Server]) -> None:
    server = serve(lambda wire: time.sleep(1.0))
    with pytest.raises(openai.APITimeoutError):
        ask(server.url, timeout_s=0.2)


def test_cookies_are_not_kept(serve: Callable[[Script], Server]) -> None:
    server = serve(reply(b"{}", "200 OK", "Set-Cookie: session=1; Path=/", "Connection: close"))

    async def twice() -> None:
        client = connect(read_endpoint(server.url, "OPENAI_API_KEY"), timeout_s=5, max_bytes=1000)
        for _ in range(2):
            await post(client, BODY)
        await client.close()

    asyncio.run(twice())
    assert len(server.heads) == 2 and "cookie:" not in server.heads[1].lower()


def test_an_answer_at_the_limit_is_read(serve: Callable[[Script], Server]) -> None:
    assert len(ask(serve(reply(b"x" * MAX_BYTES)).url)) == MAX_BYTES
    with pytest.raises(ReplyTooLarge):
        ask(serve(reply(b"x" * (MAX_BYTES + 1))).url)
    # a hundred thousand tokens of reasoning in Chinese, each character escaped
    assert most_bytes(1000) > 100_000 * 2 * 6


def test_what_openais_client_reads_by_itself_changes_no_request(
    serve: Callable[[Script], Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("BASE_URL", "ORG_ID", "PROJECT_ID", "ADMIN_KEY", "WEBHOOK_SECRET"):
        monkeypatch.setenv(f"OPENAI_{name}", "http://other.example/hunter2\r\nX-More: 1")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = serve(reply(b"{}"))
    assert ask(server.url) == b"{}"
    assert "hunter2" not in server.heads[0] and f"Bearer {KEY}\r\n" in server.heads[0]


def test_openais_own_log_holds_no_key(serve: Callable[[Script], Server]) -> None:
    program = """
import asyncio, os
from gapg_rollout.oracle.connection import connect, post
from gapg_rollout.oracle.endpoint import read_endpoint
client = connect(read_endpoint(os.environ["URL"], "CLOUD_KEY"), timeout_s=5, max_bytes=1000)
print(asyncio.run(post(client, {"model": "m", "messages": []})))
"""
    variables = {"OPENAI_LOG": "debug", "URL": serve(reply(b"{}")).url, "CLOUD_KEY": KEY}
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **variables}, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "b'{}'\n" and "DEBUG" in done.stderr
    assert KEY not in done.stderr and KEY[8:20] not in done.stderr
