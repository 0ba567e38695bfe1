"""A real HTTP server, in a process of its own, that injects real faults; and prompts for the engine."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from gapg.tasks.countdown import Countdown

sys.path.insert(0, str(Path(__file__).parent))  # importlib mode leaves it out


class FaultServer:
    """A running fault_server.py. Tests keep apart by using a model name each."""

    def __init__(self, port: int = 0) -> None:
        command = [sys.executable, str(Path(__file__).with_name("fault_server.py")), str(port)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def plan(self, model: str, *steps: dict[str, Any]) -> None:
        """Sets what the chat requests for `model` get, one after another; the last step repeats."""
        self._call("PUT", f"/plan/{model}", json.dumps(steps).encode())

    def seen(self, model: str) -> dict[str, Any]:
        """What the server saw of `model`: requests, most_open, times, auth, last."""
        seen: dict[str, Any] = self._call("GET", f"/seen/{model}", None)
        return seen

    def _call(self, method: str, path: str, body: bytes | None) -> Any:
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", body, method=method)
        with self._opener.open(request, timeout=5) as reply:
            return json.load(reply)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def server() -> Iterator[FaultServer]:
    running = FaultServer()
    yield running
    running.kill()


@pytest.fixture
def make_server() -> Iterator[type[FaultServer]]:
    """For tests that kill their server, or start one on a chosen port."""
    made: list[FaultServer] = []

    class Tracked(FaultServer):
        def __init__(self, port: int = 0) -> None:
            super().__init__(port)
            made.append(self)

    yield Tracked
    for one in made:
        one.kill()


@pytest.fixture(scope="module")
def prompts(countdown: Countdown, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Of three to nine tokens, in no order of length."""
    rendered = [countdown.render(p, tokenizer) for p in countdown.prompts("train")[:24]]
    return [ids[-3 - i % 4 :] + ids[: i % 3] for i, ids in enumerate(rendered)]
