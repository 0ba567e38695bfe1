"""A small OpenAI-compatible HTTP server that misbehaves as it is told. Run: python fault_server.py [PORT]

PUT /plan/MODEL sets a list of steps; each chat request for MODEL takes the next one, and the last repeats. A step is
{"status": 200, "headers": {}, "sleep": 0, "kind": "ok", ...}; the kinds are the names of `KINDS`. A step {"share": 0.2,
"seed": 1} answers that share of requests like one of `FAULTS` or `ODD`, but for those named in "without". GET
/seen/MODEL tells how many requests came, how many were open at once, when each arrived, what became of each question,
and the tokens that were billed.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import random
import socket
import struct
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

LOCK = threading.Lock()
PLANS: dict[str, list[dict[str, Any]]] = {}


class Seen(dict[str, Any]):
    def __init__(self) -> None:
        super().__init__(requests=0, open=0, most_open=0, times=[], auth="", billed=0, book=defaultdict(list))


SEEN: dict[str, Seen] = defaultdict(Seen)

USAGE = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
BILLED = 15
"""Tokens of a request that ran, whatever its reply says of them."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else head and body, two writes, are 40 ms apart

    def log_message(self, *args: object) -> None:
        """Silent."""

    def reply(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.begin(status, {"Content-Length": str(len(body)), **(headers or {})})
        self.wfile.write(body)

    def begin(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.end_headers()

    def body(self) -> Any:
        return json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"null")

    def do_PUT(self) -> None:
        with LOCK:
            PLANS[self.path.rpartition("/")[2]] = self.body()
        self.reply(200, b"{}")

    def do_GET(self) -> None:
        with LOCK:
            body = json.dumps(SEEN[self.path.rpartition("/")[2]]).encode()
        self.reply(200, body)

    def do_POST(self) -> None:
        request = self.body()
        model, question = request["model"], request["messages"][-1]["content"]
        with LOCK:
            seen, plan = SEEN[model], PLANS.get(model, [{}])
            step = plan[min(seen["requests"], len(plan) - 1)]
            if "share" in step:
                name, step = draw(step, seen["requests"])
                seen["book"][question].append(name)
            seen["billed"] += step.get("bills", BILLED if step.get("status", 200) == 200 else 0)
            seen["requests"] += 1
            seen["open"] += 1
            seen["most_open"] = max(seen["most_open"], seen["open"])
            seen["times"].append(time.time())
            seen["auth"] = self.headers.get("Authorization", "")
            seen["last"] = request
        try:
            time.sleep(step.get("sleep", 0))
        finally:
            with LOCK:
                seen["open"] -= 1
        with contextlib.suppress(OSError):  # the client has gone
            self.misbehave(step, question)

    def misbehave(self, step: dict[str, Any], question: str) -> None:
        status = step.get("status", 200)
        if status != 200:
            error = {"message": step.get("message", f"injected {status}"), "code": step.get("code")}
            error |= {"type": step["type"]} if "type" in step else {}
            self.reply(status, json.dumps({"error": error}).encode(), step.get("headers"))
            return
        message = {"role": "assistant", "content": "answer to " + question, **step.get("says", {})}
        choice = {"index": 0, "message": message, "finish_reason": step.get("finish", "stop")}
        reply = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
        if "usage" in step or not step.get("no_usage"):
            reply["usage"] = step.get("usage", USAGE)
        KINDS[step.get("kind", "ok")](self, json.dumps(reply).encode(), step)

    def hang_up(self, *, politely: bool) -> None:
        if not politely:  # lingering for 0 seconds makes close() send RST instead of FIN
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_WR) if politely else self.connection.close()
        self.close_connection = True

    def until_the_client_leaves(self) -> None:
        self.connection.settimeout(60)
        self.connection.recv(1)
        self.close_connection = True


def ok(handler: Handler, body: bytes, step: dict[str, Any]) -> None:
    handler.reply(200, body)


def empty(handler: Handler, body: bytes, step: dict[str, Any]) -> None:
    """Cut off in its reasoning."""
    reply = json.loads(body)
    reply["choices"][0] |= {"message": {"role": "assistant", "content": None}, "finish_reason": "length"}
    handler.reply(200, json.dumps(reply).encode())


def malformed(handler: Handler, body: bytes, step: dict[str, Any]) -> None:
    handler.reply(200, body[: len(body) // 2])


def raw(handler: Handler, body: bytes, step: dict[str, Any]) -> None:
    """Just this text."""
    handler.reply(200, step["text"].encode(errors="surrogatepass"), step.get("headers"))


def mirror(handler: Handler, body: bytes, step: dict[str, Any]) -> None:
    """What the question says, as {"status": 200, "text": ""}."""
    asked = json.loads(json.loads(body)["choices"][0]["message"]["content"].removeprefix("answer to "))
    handler.reply(asked["status"], asked["text"].encode(errors="surrogatepass"))


def cut(handler: Handler, body: bytes, step: dict[str, Any]) -> None:
    handler.begin(200, {"Content-Length": str(len(body))})
    handler.wfile.write(body[: len(body) // 2])
    handler.hang_up(politely=step.get("politely", False))


def gone(handler: Handler, body: bytes, step: dict[str, Any]) -> None:
    handler.hang_up(politely=step.get("politely", False))


def no_http(handler: Handler, body: bytes, step: dict[str, Any]) -> None:
    handler.wfile.write(b"220 smtp.example.com ready\r\n\r\n")
    handler.hang_up(politely=True)


def hang(handler: Handler, body: bytes, step: dict[str, Any]) -> None:
    handler.until_the_client_leaves()


def hang_midway(handler: Handler, body: bytes, step: dict[str, Any]) -> None:
    handler.begin(200, {"Content-Length": str(len(body))})
    handler.until_the_client_leaves()


def trickle(handler: Handler, body: bytes, step: dict[str, Any]) -> None:
    handler.begin(200, {"Content-Length": "100000"})
    while True:
        handler.wfile.write(b" ")
        time.sleep(0.05)


def endless(handler: Handler, body: bytes, step: dict[str, Any]) -> None:
    handler.begin(200, {"Transfer-Encoding": "chunked"})
    chunk = b"10000\r\n" + b" " * 65536 + b"\r\n"
    while True:
        handler.wfile.write(chunk)


def bomb(handler: Handler, body: bytes, step: dict[str, Any]) -> None:
    handler.reply(200, _bomb(), {"Content-Encoding": "gzip"})


@cache
def _bomb() -> bytes:
    return gzip.compress(bytes(64 * 2**20), 1)


def zipped(handler: Handler, body: bytes, step: dict[str, Any]) -> None:
    handler.reply(200, gzip.compress(body), {"Content-Encoding": "gzip"})


KINDS: dict[str, Callable[[Handler, bytes, dict[str, Any]], None]] = {
    "ok": ok, "empty": empty, "malformed": malformed, "raw": raw, "mirror": mirror, "reset": cut, "gone": gone,
    "no http": no_http, "hang": hang, "hang midway": hang_midway, "trickle": trickle, "endless": endless, "bomb": bomb,
    "zipped": zipped,
}  # fmt: skip

FAULTS: dict[str, dict[str, Any]] = {
    **{str(status): {"status": status} for status in (400, 404, 408, 409, 413, 422, 429)},
    **{str(status): {"status": status} for status in (500, 502, 503, 504, 520, 522, 524, 529)},
    "429 in a moment": {"status": 429, "headers": {"Retry-After-Ms": "60"}},
    "429 by a date": {"status": 429, "headers": {"Retry-After": "Thu, 01 Jan 1970 00:01:40 GMT"}},
    "503 soon": {"status": 503, "headers": {"Retry-After": "soon"}},
    "redirect": {"status": 307, "headers": {"Location": "http://127.0.0.1:9/v1"}},
    "hang": {"kind": "hang"},
    "hang midway": {"kind": "hang midway"},
    "trickle": {"kind": "trickle"},
    "reset": {"kind": "reset"},
    "cut": {"kind": "reset", "politely": True},
    "gone": {"kind": "gone"},
    "closed": {"kind": "gone", "politely": True},
    "no http": {"kind": "no http"},
    "nothing": {"kind": "raw", "text": ""},
    "page": {"kind": "raw", "text": "<html>Welcome</html>", "headers": {"Content-Type": "text/html"}},
    "stream": {"kind": "raw", "text": 'data: {"choices": []}\n\ndata: [DONE]\n\n'},
    "list": {"kind": "raw", "text": "[1, 2]"},
    "deep": {"kind": "raw", "text": "[" * 100_000},
    "malformed": {"kind": "malformed"},
    "endless": {"kind": "endless"},
    "bomb": {"kind": "bomb"},
    "no text": {"kind": "empty"},
    "refusal": {"says": {"content": None, "refusal": "I will not"}},
    "an error in a 200": {"kind": "raw", "text": '{"error": {"message": "overloaded", "code": 502}}', "bills": 0},
    "an error as a string": {"kind": "raw", "text": '{"error": "overloaded"}', "bills": 0},
    "no choices": {"kind": "raw", "text": json.dumps({"choices": [], "usage": USAGE})},
}
"""Ways to fail a request. "bills": the tokens that it costs nevertheless, where that is not what its status says."""

ODD: dict[str, dict[str, Any]] = {
    "no usage": {"no_usage": True},
    "usage of nulls": {"usage": dict.fromkeys(USAGE)},
    "negative usage": {"usage": {"prompt_tokens": -1000, "completion_tokens": -1000, "total_tokens": -2000}},
    "reasoning beside": {"usage": {**USAGE, "total_tokens": 1015}, "bills": 1015},
    "zipped": {"kind": "zipped"},
}
"""Replies that are odd and yet answers."""


def draw(step: dict[str, Any], number: int) -> tuple[str, dict[str, Any]]:
    """(name, step) of a request: with the chance `share` one of `FAULTS` and `ODD`, else "ok"."""
    chance = random.Random(f"{step['seed']}:{number}")
    if chance.random() >= step["share"]:
        return "ok", {}
    table = {**FAULTS, **ODD}
    name = chance.choice([name for name in table if name not in step.get("without", ())])
    return name, table[name]


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def handle_error(self, request: object, client_address: object) -> None:
        """Silent: most errors here are wanted."""


if __name__ == "__main__":
    server = Server(("127.0.0.1", int(sys.argv[1]) if len(sys.argv) > 1 else 0), Handler)
    print(server.server_port, flush=True)
    server.serve_forever()
