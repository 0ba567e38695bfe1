"""The spending cap over kills, over processes, over accounts: the server's own count of requests is the judge."""

from __future__ import annotations

import json
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from gapg_rollout.oracle.cache import AnswerCache
from gapg_rollout.records import OracleUsage
from tests.rollout.oracle_checks import PRICES, Make, ask, many, question, spend

BILLED = 15.0  # what the server bills a request at these prices
WORST = 110.0  # more than what is set aside for one
SETTINGS: dict[str, Any] = {**PRICES, "max_tokens": 20, "timeout_s": 5.0, "concurrency": 2}
PROGRAM = """
import json, sys
from gapg_rollout.oracle.openai import OpenAIOracle
from gapg_rollout.records import OracleQuestion
url, model, path, name, settings = sys.argv[1:]
oracle = OpenAIOracle(url, model, cache_path=path, **json.loads(settings))
print("ready", flush=True)
texts = [f"{name}{i:03}" for i in range(100)]
asked = [oracle.ask(OracleQuestion(t, ({"role": "user", "content": t},))) for t in texts]
for future in asked:
    future.result()
print(oracle.usage.cost)
oracle.close()
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "c.sqlite"


def start(server: Any, model: str, path: Path, name: str, settings: dict[str, Any]) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM, server.url, model, str(path), name, json.dumps(settings)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def spent(path: Path, account: str = "run") -> OracleUsage:
    with closing(AnswerCache(path)) as cache:
        return cache.spent(account)


def test_what_was_spent_before_a_kill_is_spent(server: Any, path: Path, make: Make) -> None:
    cap, model = 1500.0, "killed"
    settings = {**SETTINGS, "spending_cap": cap, "timeout_s": 1.0}
    server.plan(model, {"sleep": 0.02})
    processes = [start(server, model, path, name, settings) for name in "ab"]
    for process, until in zip(processes, (20, 40), strict=True):
        while server.seen(model)["requests"] < until:
            assert process.poll() is None
            time.sleep(0.005)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    with closing(sqlite3.connect(path)) as db:  # an answer in the file is an answer counted
        ((answers_cost, cost),) = db.execute("SELECT (SELECT sum(cost) FROM answers), cost FROM spend").fetchall()
    assert 0 < answers_cost <= cost

    last = make(model, cache_path=path, **settings)
    last.restore(OracleUsage())  # a checkpoint from before anything was asked
    answers = ask(last, *many(100, "a"), *many(100, "b"), *many(100, "c"))
    assert any(a.cached for a in answers)
    assert any(a.error is not None and "spending cap of 1500 reached" in a.error for a in answers)
    assert server.seen(model)["requests"] * BILLED <= spent(path).cost <= cap
    assert spent(path).cost > cap - WORST


def test_processes_and_objects_share_one_cap(server: Any, path: Path, make: Make) -> None:
    cap, model = 1200.0, "together"
    server.plan(model, {"sleep": 0.05})
    settings = {**SETTINGS, "spending_cap": cap}
    here = [make(model, cache_path=path, **settings) for _ in range(2)]
    there = start(server, model, path, "there", settings)
    assert there.stdout is not None and there.stdout.readline() == "ready\n"
    futures = [here[i % 2].ask(question(t)) for i, t in enumerate(many(100, "h"))]
    refused = [f for f in futures if f.result(30)[0].text is None]
    theirs = float(there.stdout.read())
    assert there.wait(timeout=30) == 0
    ours = [oracle.usage.cost for oracle in here]
    assert refused and min(theirs, *ours) > 0
    total = server.seen(model)["requests"] * BILLED
    assert cap - WORST < total == theirs + sum(ours) == spent(path).cost <= cap


def test_accounts_are_separate_and_answers_are_shared(server: Any, path: Path, make: Make) -> None:
    first, second = (
        make("apart", cache_path=path, spending_cap=150.0, account=account, **SETTINGS) for account in ("train", "eval")
    )
    assert {a.text is None for a in ask(first, *many(20, "a"))} == {True, False}
    assert 150 - WORST < spent(path, "train").cost <= 150
    assert spent(path, "eval") == spent(path) == spend()
    again, new = ask(second, "a000", "new")
    assert (again.text, again.cached, new.cached, new.cost) == ("answer to a000", True, False, BILLED)
    assert spent(path, "eval") == spend(BILLED, 1, 10, 5)


def test_billed_failures_stay_counted(server: Any, path: Path, make: Make) -> None:
    server.plan("gone", {"kind": "reset"}, {"status": 500}, {})
    settings = {**SETTINGS, "spending_cap": 250.0, "max_retries": 0}
    first = make("gone", cache_path=path, **settings)
    assert [a.text for a in ask(first, "q")] == [None]
    billed = first.usage.cost
    assert 80 < billed < WORST
    assert [a.text for a in ask(first, "q")] == [None]
    first.close()
    assert spent(path) == spend(billed, 2)
    second = make("gone", cache_path=path, **{**settings, "spending_cap": 150.0})
    (answer,) = ask(second, "q")
    assert answer.error is not None and f"150 reached: {billed:.6g} is spent" in answer.error
    assert (second.usage.cost, server.seen("gone")["requests"]) == (0, 2)


def test_what_a_checkpoint_knows_and_the_file_does_not_is_spent(server: Any, path: Path, make: Make) -> None:
    settings = {**SETTINGS, "spending_cap": 1000.0, "cache_path": path}
    resumed = make("lost-file", **settings)
    resumed.restore(OracleUsage(requests=60, cost=900.0))
    other = make("lost-file", **settings)
    assert ask(resumed, "a")[0].text == "answer to a"
    assert resumed.usage == OracleUsage(61, 0, 0, 10, 5, 915.0)
    assert ask(other, "b")[0].text is None  # 915 is spent, by whomever
    assert server.seen("lost-file")["requests"] == 1


def test_closing_counts_what_is_open(server: Any, path: Path, make: Make) -> None:
    server.plan("closed", {"sleep": 5})
    oracle = make("closed", cache_path=path, spending_cap=1000.0, **SETTINGS)
    oracle.ask(question())
    while server.seen("closed")["requests"] < 1:
        time.sleep(0.01)
    oracle.close()
    assert spent(path) == spend(oracle.usage.cost, 1)
    assert oracle.usage.cost > 80
