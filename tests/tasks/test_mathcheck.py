"""The maths checker's processes: limits, the time budget of a step, and processes that are killed, stopped or left."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gapg.judge import Judge
from gapg.tasks.base import Verdict
from gapg.tasks.mathcheck import MathChecker
from gapg.tasks.maths import Maths
from gapg_rollout.oracle.solver import SolverOracle

C, W, L = Verdict.CORRECT, Verdict.WRONG, Verdict.LIMIT
BOMB = "$9^{9^{9^{9}}}$"
"""Never ends, in one call of C code."""
SECONDS = 4.0
"""For the slow answers of a step: several times what one takes, since a busy or older processor takes longer."""


def slow(n: int) -> str:
    """Wrong, and read in about 0.6 s."""
    return f"$\\{{{','.join(map(str, range(n, n + 250)))}\\}}$"


def started(**settings: object) -> Iterator[MathChecker]:
    checker = MathChecker(seconds=SECONDS, slow_answers=1, **settings)  # type: ignore[arg-type]
    assert checker.pids == []  # nothing runs before it is needed
    checker.check("72", ["72", "73", "74", "75"])
    yield checker
    pids = checker.pids
    checker.close()
    wait_until(lambda: not any(map(group, pids)))
    checker.close()
    assert checker.pids == []


@pytest.fixture(scope="module")
def alone() -> Iterator[MathChecker]:
    """One worker, which tests may kill."""
    yield from started(workers=1)


@pytest.fixture(scope="module")
def shared() -> Iterator[MathChecker]:
    """Started by a process that has a key in its environment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENAI_API_KEY", "sk-secret")
        yield from started(workers=2)


def group(pgid: int) -> list[int]:
    """The processes of a group that are not zombies, oldest first."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[2]) == pgid and fields[0] != "Z":
                found.append((int(fields[19]), int(stat.parent.name)))  # when it started: a younger pid may be smaller
    return [pid for _, pid in sorted(found)]


def wait_until(done: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "a worker outlives its end"
        time.sleep(0.02)


@pytest.mark.parametrize("limit", [0, -1.0, float("nan"), float("inf"), "2"])
def test_a_limit_that_is_none_is_refused(limit: object) -> None:
    with pytest.raises(ValueError, match=r"^task\.args\.seconds: must be a number above 0, not "):
        MathChecker(seconds=limit)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^task\.args\.max_chars: must be a whole number, 1 or more, not "):
        MathChecker(max_chars=limit)  # type: ignore[arg-type]


def test_verdicts_come_in_the_order_of_the_answers(shared: MathChecker) -> None:
    answers = [str(n % 5) for n in range(20)]
    assert shared.check("3", answers) == [C if answer == "3" else W for answer in answers]
    assert shared.check("3", []) == []


@pytest.mark.parametrize("workers", ["alone", "shared"])
def test_the_first_slow_answers_of_a_step_have_more_time(
    request: pytest.FixtureRequest, tmp_path: Path, workers: str
) -> None:
    for split, question in (("train", "Twice 36?"), ("test", "Half of 144?")):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"question": question, "answer": "72"}) + "\n")
    task = Maths(str(tmp_path), {})
    task.checker = request.getfixturevalue(workers)
    prompt, judge = task.prompts("train")[0], Judge(task, SolverOracle(lambda _: "72", accuracy=1.0, wrong="0"))
    judge.start_step()
    assert task.verify(prompt, [slow(1), "72", slow(1), slow(2)]) == [W, C, W, L]
    assert task.verify(prompt, [slow(2), "72", "73"]) == [L, C, W]
    judge.start_step()
    assert task.verify(prompt, [slow(2)]) == [W]


def cpu_seconds(pgids: list[int]) -> float:
    """Of all processes of the groups, and of those that ended: a busy machine does not fail a test of these."""
    fields = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pgid in pgids for pid in group(pgid)]
    return sum(int(ticks) for found in fields for ticks in found[11:15]) / os.sysconf("SC_CLK_TCK")


def test_bombs_take_a_bounded_time_and_are_told_apart_from_wrong(shared: MathChecker) -> None:
    shared.start_step()
    before = cpu_seconds(shared.pids)
    assert shared.check("72", [BOMB, "$(10^9)!$", "7" * 30_000, "73"]) == [L, L, L, W]
    assert shared.check("72", [BOMB, "$8^{9^{9^{9}}}$", "72"]) == [L, L, C]
    used = cpu_seconds(shared.pids) - before
    assert SECONDS <= used < SECONDS + 4 * 0.2 + 1  # the last for forks, and for what the kernel's clock takes too much


def test_a_killed_worker_costs_no_verdict(alone: MathChecker) -> None:
    """First the process that made the fork, which goes on without it."""
    (pgid,) = alone.pids
    for pid in group(pgid):
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda pid=pid: pid not in group(pgid))
        assert alone.check("72", ["72", "73"]) == [C, W]
    assert alone.pids != [pgid]


def test_a_worker_killed_while_it_works_is_asked_once_more(alone: MathChecker) -> None:
    """The fork, whose parent ends with it."""
    alone.start_step()
    killer = threading.Timer(0.1, os.kill, (group(alone.pids[0])[-1], signal.SIGKILL))
    killer.start()
    assert alone.check("72", [slow(1), "72"]) == [W, C]
    killer.join()


def test_a_stopped_worker_is_replaced(alone: MathChecker) -> None:
    (pid,) = alone.pids
    os.killpg(pid, signal.SIGSTOP)  # it hangs where no limit on CPU time reaches it, and reads nothing
    (worker,) = alone._workers
    worker._socket.settimeout(1.0)  # its patience until it is started again
    assert alone.check("72", ["7" * 19_000, "72", "73"]) == [W, C, W]
    assert alone.pids != [pid]


def test_an_interrupt_does_not_shift_the_replies(alone: MathChecker) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(KeyboardInterrupt):
            alone.check("72", [BOMB])
    finally:
        signal.signal(signal.SIGALRM, before)
    assert [alone.check("72", [answer]) for answer in ("72", "73", "72")] == [[C], [W], [C]]


def test_workers_end_with_a_parent_that_is_killed() -> None:
    """One of them idle, one at work."""
    script = (
        "import threading, time\n"
        "from gapg.tasks.mathcheck import MathChecker\n"
        "checker = MathChecker(seconds=1.0, workers=2)\n"
        "checker.check('72', ['72', '73'])\n"
        f"threading.Thread(target=checker.check, args=('72', [{BOMB!r}])).start()\n"
        "print(*checker.pids, flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2 and all(len(group(pid)) == 2 for pid in pids)
        parent.kill()
    wait_until(lambda: not any(map(group, pids)))


def test_the_workers_see_no_secrets(shared: MathChecker) -> None:
    assert len(shared.pids) == 2
    for pid in [pid for pgid in shared.pids for pid in group(pgid)]:
        assert b"sk-secret" not in Path(f"/proc/{pid}/environ").read_bytes()


def test_threads_share_a_checker(shared: MathChecker) -> None:
    found = {}

    def work(n: int) -> None:
        found[n] = shared.check(str(n), [str(n), str(n + 1)])

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {n: [C, W] for n in range(8)}
