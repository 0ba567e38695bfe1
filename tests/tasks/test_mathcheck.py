"""The maths checker's processes: limits, the time budget of a step, and processes that are killed, stopped or left."""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gapg.judge import Judge
from gapg.rollout.oracle_solver import SolverOracle
from gapg.tasks.base import Verdict
from gapg.tasks.mathcheck import MathChecker
from gapg.tasks.maths import Maths

C, W, L = Verdict.CORRECT, Verdict.WRONG, Verdict.LIMIT
BOMB = "$9^{9^{9^{9}}}$"
"""Never ends, in one call of C code."""


def slow(n: int) -> str:
    """Wrong, and read in about 0.6 s."""
    return f"$\\{{{','.join(map(str, range(n, n + 250)))}\\}}$"


@pytest.fixture
def make() -> Iterator[Callable[..., MathChecker]]:
    made: list[MathChecker] = []

    def make(**settings: object) -> MathChecker:
        made.append(MathChecker(**settings))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for checker in made:
        checker.close()


@pytest.fixture(scope="module")
def shared() -> Iterator[MathChecker]:
    """Started by a process that has a key in its environment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENAI_API_KEY", "sk-secret")
        checker = MathChecker(seconds=0.5, slow_answers=1, workers=3)
        checker.check("72", ["72", "73", "74", "75", "76"])
    yield checker
    checker.close()


def group(pgid: int) -> list[int]:
    """The processes of a group that are not zombies, oldest first."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, of = stat.read_text().rpartition(")")[2].split()[:3]
            if int(of) == pgid and state != "Z":
                found.append(int(stat.parent.name))
    return sorted(found)


def wait_until_gone(pgids: list[int], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while any(group(pgid) for pgid in pgids):
        assert time.monotonic() < end, "a worker outlives its parent"
        time.sleep(0.02)


@pytest.mark.parametrize("seconds", [0, -1.0, float("nan"), float("inf"), "2"])
def test_a_time_limit_that_is_none_is_refused(make: Callable[..., MathChecker], seconds: object) -> None:
    with pytest.raises(ValueError, match=r"^task\.args\.seconds: must be a number above 0, not "):
        make(seconds=seconds)
    with pytest.raises(ValueError, match=r"^task\.args\.max_chars: must be a whole number, 1 or more, not "):
        make(max_chars=seconds)


def test_verdicts_come_in_the_order_of_the_answers(shared: MathChecker) -> None:
    answers = [str(n % 5) for n in range(20)]
    assert shared.check("3", answers) == [C if answer == "3" else W for answer in answers]
    assert shared.check("3", []) == []


def test_time_and_memory_limits_are_told_apart_from_wrong(shared: MathChecker) -> None:
    assert shared.check("72", [BOMB, "$(10^9)!$", "7" * 30_000, "73"]) == [L, L, L, W]


@pytest.mark.parametrize("workers", [1, 3])
def test_the_first_slow_answers_of_a_step_have_more_time(
    make: Callable[..., MathChecker], tmp_path: Path, workers: int
) -> None:
    for split, question in (("train", "Twice 36?"), ("test", "Half of 144?")):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"question": question, "answer": "72"}) + "\n")
    task = Maths(str(tmp_path), {})
    task.checker = make(slow_answers=1, workers=workers)
    prompt, judge = task.prompts("train")[0], Judge(task, SolverOracle(lambda _: "72", accuracy=1.0, wrong="0"))
    assert task.verify(prompt, [slow(1), "72", slow(1), slow(2)]) == [W, C, W, L]
    assert task.verify(prompt, [slow(2), "72", "73"]) == [L, C, W]
    judge.start_step()
    assert task.verify(prompt, [slow(2)]) == [W]


def test_bombs_take_a_bounded_time(make: Callable[..., MathChecker]) -> None:
    """CPU time, all processes included, so that a busy machine does not fail it."""

    def children() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    checker, before = make(seconds=1.0, slow_answers=1, workers=2), children()
    for k in range(2):
        assert checker.check("72", [f"${n}^{{9^{{9^{{9}}}}}}$" for n in range(3 * k + 2, 3 * k + 5)]) == [L] * 3
    checker.close()
    start_s = 3.0  # of two workers; it is about 1 s
    assert children() - before < 6 * 0.2 + 1 * 1.0 + start_s < 6 * 1.0


def test_a_killed_worker_is_replaced(make: Callable[..., MathChecker]) -> None:
    checker = make(workers=1)
    assert checker.pids == []  # nothing runs before it is needed
    assert checker.check("72", ["72"]) == [C]
    for which in (0, -1):  # the process, its fork
        (pid,) = checker.pids
        os.kill(group(pid)[which], signal.SIGKILL)
        assert checker.check("72", ["72", "73"]) == [C, W]
    (pid,) = checker.pids
    checker.close()
    wait_until_gone([pid])
    checker.close()
    assert checker.pids == []


def test_a_worker_killed_while_it_works_is_asked_once_more(make: Callable[..., MathChecker]) -> None:
    checker = make(workers=1)
    checker.check("72", ["72"])
    killer = threading.Timer(0.1, os.kill, (group(checker.pids[0])[-1], signal.SIGKILL))
    killer.start()
    assert checker.check("72", [slow(1), "72"]) == [W, C]
    killer.join()


def test_a_stopped_worker_is_replaced(make: Callable[..., MathChecker]) -> None:
    checker = make(seconds=0.15, workers=1)
    checker.check("72", ["72"])
    (first,) = checker.pids
    os.killpg(first, signal.SIGSTOP)  # it hangs where no limit on CPU time reaches it, and reads nothing
    assert checker.check("72", ["7" * 19_000, "72", "73"]) == [W, C, W]
    assert checker.pids != [first]


def test_an_interrupt_does_not_shift_the_replies(make: Callable[..., MathChecker]) -> None:
    checker = make(workers=1)
    checker.check("72", ["72"])

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(KeyboardInterrupt):
            checker.check("72", [BOMB])
    finally:
        signal.signal(signal.SIGALRM, before)
    assert [checker.check("72", [answer]) for answer in ("72", "73", "72")] == [[C], [W], [C]]


def test_workers_end_with_a_parent_that_is_killed() -> None:
    """One of them idle, one at work."""
    script = (
        "import threading, time\n"
        "from gapg.tasks.mathcheck import MathChecker\n"
        "checker = MathChecker(seconds=3.0, workers=2)\n"
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
    wait_until_gone(pids)


def test_the_workers_see_no_secrets(shared: MathChecker) -> None:
    assert len(shared.pids) == 3
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
