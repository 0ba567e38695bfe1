"""A small OpenAI-compatible HTTP server that misbehaves as it is told. Run: python fault_server.py [PORT]

PUT /plan/MODEL sets a list of steps; each chat request for MODEL takes the next one, and the last repeats. A step is
{"status": 200, "headers": {}, "sleep": 0, "kind": "ok" | "reset" | "malformed" | "empty", ...}. GET /seen/MODEL tells
how many requests came, how many were open at once, and when each arrived.
"""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import sys
import threading
import time
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

LOCK = threading.Lock()
PLANS: dict[str, list[dict[str, Any]]] = {}
SEEN: dict[str, dict[str, Any]] = defaultdict(
    lambda: {"requests": 0, "open": 0, "most_open": 0, "times": [], "auth": ""}
)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        """Silent."""

    def reply(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

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
        model = request["model"]
        with LOCK:
            seen, plan = SEEN[model], PLANS.get(model, [{}])
            step = plan[min(seen["requests"], len(plan) - 1)]
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
            self.misbehave(step, request)

    def misbehave(self, step: dict[str, Any], request: dict[str, Any]) -> None:
        status, kind = step.get("status", 200), step.get("kind", "ok")
        if status >= 400:
            error = {"message": step.get("message", f"injected {status}"), "code": step.get("code")}
            self.reply(status, json.dumps({"error": error}).encode(), step.get("headers"))
            return
        content = None if kind == "empty" else "answer to " + request["messages"][-1]["content"]
        usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
        choice = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"}
        if kind == "empty":
            choice["finish_reason"] = "length"
        reply = {"id": "x", "object": "chat.completion", "created": 0, "model": request["model"], "choices": [choice]}
        body = json.dumps({**reply, **({} if step.get("no_usage") else {"usage": usage})}).encode()
        if kind == "malformed":
            self.reply(200, body[: len(body) // 2])
        elif kind == "reset":
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            # Lingering for 0 seconds makes close() send RST instead of FIN.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
        else:
            self.reply(200, body)


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def handle_error(self, request: object, client_address: object) -> None:
        """Silent: most errors here are wanted."""


if __name__ == "__main__":
    server = Server(("127.0.0.1", int(sys.argv[1]) if len(sys.argv) > 1 else 0), Handler)
    print(server.server_port, flush=True)
    server.serve_forever()
