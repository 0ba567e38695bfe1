"""The embedded oracle: its accuracy, its stability over processes, its counting."""

from __future__ import annotations

import subprocess
import sys

import pytest

from gapg_rollout.oracle.solver import SolverOracle
from gapg_rollout.records import Oracle, OracleQuestion, OracleUsage


def question(name: str) -> OracleQuestion:
    return OracleQuestion(name, ({"role": "user", "content": f"solve {name}"},))


def test_accuracy_is_the_share_of_right_answers() -> None:
    oracle: Oracle = SolverOracle(lambda name: f"answer to {name}", accuracy=0.8, wrong="0")
    texts = [oracle.ask(question(f"q{i}")).result()[0].text for i in range(5000)]
    right = sum(text == f"answer to q{i}" for i, text in enumerate(texts))
    assert set(texts) - {f"answer to q{i}" for i in range(5000)} == {"0"}
    assert abs(right / 5000 - 0.8) < 4 * (0.8 * 0.2 / 5000) ** 0.5


@pytest.mark.parametrize("accuracy", [0.0, 1.0])
def test_the_extremes_are_exact(accuracy: float) -> None:
    oracle = SolverOracle(str, accuracy=accuracy, wrong="0")
    assert all(oracle.knows(f"q{i}") is bool(accuracy) for i in range(500))


def test_which_questions_are_known_is_the_same_in_another_process() -> None:
    program = (
        "from gapg_rollout.oracle.solver import SolverOracle\n"
        "print([SolverOracle(str, 0.5, '0', seed=3).knows(f'q{i}') for i in range(64)])"
    )
    there = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip()
    here = [SolverOracle(str, 0.5, "0", seed=3).knows(f"q{i}") for i in range(64)]
    other_seed = [SolverOracle(str, 0.5, "0", seed=4).knows(f"q{i}") for i in range(64)]
    assert there == str(here)
    assert here != other_seed


def test_usage_counts_every_question_and_continues_after_a_restore() -> None:
    """What was asked before a resume must not change what is counted after it."""
    oracle = SolverOracle(str, accuracy=1.0, wrong="0")
    first, again = oracle.ask(question("a")).result()[0], oracle.ask(question("a")).result()[0]
    assert first.text == again.text == "a"
    assert oracle.usage == OracleUsage(requests=2)
    resumed = SolverOracle(str, accuracy=1.0, wrong="0")
    resumed.restore(oracle.usage)
    resumed.ask(question("a"))
    assert resumed.usage == OracleUsage(requests=3)


def test_a_failing_solver_is_an_unknown_answer_that_is_asked_again() -> None:
    calls: list[str] = []

    def solve(name: str) -> str:
        calls.append(name)
        if len(calls) == 1:
            raise RuntimeError("no solution found")
        return "42"

    oracle = SolverOracle(solve, accuracy=1.0, wrong="0")
    failed = oracle.ask(question("a")).result()[0]
    assert failed.text is None
    assert failed.error is not None and "no solution found" in failed.error
    assert oracle.ask(question("a")).result()[0].text == "42"
    assert oracle.usage == OracleUsage(requests=2, failures=1)


@pytest.mark.parametrize("answer", [None, 42, b"42"])
def test_what_is_no_text_is_an_unknown_answer_too(answer: object) -> None:
    oracle = SolverOracle(lambda name: answer, accuracy=1.0, wrong="0")  # type: ignore[arg-type, return-value]
    (failed,) = oracle.ask(question("a")).result()
    assert failed.text is None and failed.error is not None
    assert f"the solver failed on 'a': TypeError: {answer!r} is no text" in failed.error
    assert oracle.usage == OracleUsage(requests=1, failures=1)


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        SolverOracle(str, accuracy=80, wrong="0")
    with pytest.raises(ValueError, match="samples must be 1 or more"):
        SolverOracle(str, accuracy=0.5, wrong="0", samples=0)


def test_each_sample_has_a_chance_of_its_own() -> None:
    """As many right samples a question as coin tosses give: their mean correctness is a fraction."""
    oracle = SolverOracle(str, accuracy=0.6, wrong="0", samples=4)
    answers = [[a.text for a in oracle.ask(question(f"q{i}")).result()] for i in range(4000)]
    right = [sum(text == f"q{i}" for text in texts) for i, texts in enumerate(answers)]
    assert all(len(texts) == 4 for texts in answers)
    assert right == [round(4 * oracle.score(f"q{i}")) for i in range(4000)]
    assert oracle.usage.requests == 16000
    for k, expected in enumerate((0.4**4, 4 * 0.6 * 0.4**3, 6 * 0.36 * 0.16, 4 * 0.6**3 * 0.4, 0.6**4)):
        assert abs(right.count(k) / 4000 - expected) < 4 * (expected * (1 - expected) / 4000) ** 0.5


def test_a_single_sample_is_the_first_of_several() -> None:
    one, four = SolverOracle(str, 0.5, "0"), SolverOracle(str, 0.5, "0", samples=4)
    for i in range(200):
        asked = question(f"q{i}")
        assert one.ask(asked).result()[0] == four.ask(asked).result()[0]
        assert one.score(asked.id) == float(four.knows(asked.id))
