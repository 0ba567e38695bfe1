"""Figures of an evaluation: intervals, the paired test, and predictions from which one can judge again."""

import json
import math
import socket
from collections.abc import Callable
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gapg.config_sections import RewardConfig
from gapg.console import printable
from gapg.evaluation.evaluate import Result, as_result, prediction, respond
from gapg.evaluation.report import print_table
from gapg.evaluation.statistics import mcnemar, wilson
from gapg.evaluation.validate import validate
from gapg.jsonl import to_json
from gapg.judge import Group, Judge, Outcome
from gapg.runs.run import Run
from gapg.tasks.base import HELP_PHRASE, STOP
from gapg.tasks.countdown import Countdown
from gapg_rollout.engines.transformers import TransformersEngine
from gapg_rollout.oracle.solver import SolverOracle
from gapg_rollout.records import Completion, Sampling


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (300, 1000, 0.2724, 0.3291)],
)
def test_wilson_against_published_values(hits: int, n: int, low: float, high: float) -> None:
    assert wilson(hits, n) == (pytest.approx(low, abs=2e-4), pytest.approx(high, abs=2e-4))


@given(st.integers(0, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_its_point(case: tuple[int, int]) -> None:
    hits, n = case
    low, high = wilson(hits, n)
    assert -1e-12 <= low < high <= 1 + 1e-12
    if n:
        assert low - 1e-12 <= hits / n <= high + 1e-12
        mirrored = wilson(n - hits, n)
        assert mirrored == (pytest.approx(1 - high), pytest.approx(1 - low))


@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=40))
def test_mcnemar_is_the_exact_sign_test(pairs: list[tuple[bool, bool]]) -> None:
    a, b = [x for x, _ in pairs], [y for _, y in pairs]
    only_a, only_b, p = mcnemar(a, b)
    assert (only_a, only_b) == (sum(x > y for x, y in pairs), sum(y > x for x, y in pairs))
    n = only_a + only_b
    # the chance, under a fair coin, of a split at least as uneven
    exact = sum(math.comb(n, k) for k in range(n + 1) if abs(2 * k - n) >= abs(only_a - only_b)) / 2**n
    assert p == pytest.approx(exact)
    assert mcnemar(b, a) == (only_b, only_a, p)


def test_mcnemar_wants_the_same_problems() -> None:
    with pytest.raises(ValueError):
        mcnemar([True], [True, False])


def judged(countdown: Countdown, text: str, accuracy: float = 1.0, i: int = 0, thinking: bool = False) -> Group:
    oracle = SolverOracle(countdown.solve, accuracy=accuracy, wrong="0")
    completion = Completion((5, 6), (-0.5, -1.5), text, "stop", help_margin=-2.0)
    judge = Judge(countdown, oracle, ask_always=True, thinking=thinking)
    return judge.submit(countdown.prompts("heldout")[i], [completion]).result()


def test_a_result_counts_each_outcome_in_its_place(countdown: Countdown) -> None:
    gold = countdown.prompts("heldout")[0].answer
    groups = [
        judged(countdown, f"<answer> {gold} </answer>"),
        judged(countdown, "<answer> 1 </answer>"),
        judged(countdown, HELP_PHRASE),
        judged(countdown, HELP_PHRASE, accuracy=0.0),
    ]
    assert [g.outcomes[0] for g in groups] == [
        Outcome.LOCAL_CORRECT,
        Outcome.LOCAL_WRONG,
        Outcome.CLOUD_CORRECT,
        Outcome.CLOUD_WRONG,
    ]
    row = as_result("x", groups).row()
    assert (row["n"], row["accuracy"], row["local_accuracy"], row["call_fraction"]) == (4, 0.5, 0.25, 0.5)
    assert (row["accuracy_low"], row["accuracy_high"]) == wilson(2, 4)


def test_a_call_without_an_oracle_is_a_call_and_not_wrong(countdown: Countdown) -> None:
    def fails(_: str) -> str:
        raise OSError("down")

    pending = Judge(countdown, SolverOracle(fails, accuracy=1.0, wrong="0")).submit(
        countdown.prompts("heldout")[0], [Completion((5,), (-0.5,), HELP_PHRASE, "stop")]
    )
    group = pending.result()
    assert group.unknown
    row = as_result("x", [group, judged(countdown, HELP_PHRASE), judged(countdown, "<answer> 1 </answer>")]).row()
    assert (row["n"], row["call_fraction"], row["accuracy"]) == (3, pytest.approx(2 / 3), 0.5)
    assert (row["accuracy_low"], row["accuracy_high"]) == wilson(1, 2)
    assert (row["call_fraction_low"], row["call_fraction_high"]) == wilson(2, 3)
    line = prediction(group, RewardConfig())
    assert (line["outcome"], line["reward"]) == ("unknown", None)
    assert "down" in line["oracle_error"]
    assert prediction(judged(countdown, HELP_PHRASE), RewardConfig())["oracle_error"] is None


def test_nothing_judged_is_a_row_too(countdown: Countdown) -> None:
    """Every call of an evaluation failed: a report of nothing, not a division by zero."""
    row = as_result("x", []).row()
    assert row["n"] == 0
    assert json.loads(to_json(row))["accuracy"] is None, "and no accuracy of 0"


def test_the_table_says_how_many_are_unknown(capsys: pytest.CaptureFixture[str]) -> None:
    known, lost = Result("[b]known", [True], [True], [False]), Result("lost\x1b[2J", [True, True], [], [False, False])
    print_table([known.row()])
    assert "unknown" not in capsys.readouterr().out
    print_table([known.row(), lost.row() | {"unknown": 2}])
    out = capsys.readouterr().out
    assert "[b]known" in out
    assert out == printable(out)
    (line,) = [line for line in out.splitlines() if "lost" in line]
    assert [cell.strip() for cell in line.split("│")[2:-1]] == ["unknown", "0.000", "1.000", "2", "2"]


def test_a_prediction_can_be_judged_again(countdown: Countdown) -> None:
    """From its line of JSON alone: the problem's text, the response's text and the oracle's answers."""
    gold = countdown.prompts("heldout")[1].answer
    endings = (f"<answer> {gold} </answer>", "<answer> 1 </answer>", HELP_PHRASE)
    # a prompt may open a think block: what the response says before it closes that is no ending
    for text, thinking in product((*endings, f"</think> {endings[0]}"), (False, True)):
        group = judged(countdown, text, i=1, thinking=thinking)
        line = json.loads(json.dumps(prediction(group, RewardConfig(alpha_c=0.25))))
        prompt = next(p for p in countdown.prompts("heldout") if p.id == line["id"])
        assert (line["problem"], line["gold"], line["response"]) == (prompt.text, prompt.answer, text)
        replies = SolverOracle(lambda _, answers=line["oracle_answers"]: answers[0], 1.0, wrong="0")
        judge = Judge(countdown, replies, thinking=line["thinking"])
        again = judge.submit(prompt, [Completion((1,), (0.0,), line["response"], "stop")])
        assert again.result().outcomes[0].value == line["outcome"]
        assert line["thinking"] == thinking
        assert not thinking or text.startswith("</think>") or line["outcome"] == "local_wrong"
        assert line["reward"] == {"local_correct": 1.0, "local_wrong": 0.0, "cloud_correct": 0.25}[line["outcome"]]
        assert line["logprob_mean"] == -1.0
        assert line["oracle_score"] == 1.0


def test_respond_keeps_the_order_of_the_prompts(
    countdown: Countdown, make_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerBase
) -> None:
    began = []

    class Timed(Countdown):
        def start_step(self) -> None:
            began.append(self)

    task = Timed(max_number=8, max_target=30)
    prompts = task.prompts("heldout")[:30]
    engine = TransformersEngine(make_model(seed=31), tokenizer, max_rows=8)
    judge = Judge(task, SolverOracle(task.solve, 1.0, wrong="0"))
    groups = respond(engine, task, tokenizer, judge, prompts, Sampling(12, stop=STOP, seed=3))
    assert began == [task], "the time for verifying begins anew"
    assert [g.prompt for g in groups] == list(prompts)
    assert all(len(g.completions) == 1 for g in groups)


def test_an_evaluation_in_training_tells_of_a_cloud_that_fails(
    start: Callable[..., Run], nothing_said: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """It does not end the run: whether the cloud is away for good, the questions of training say."""
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}/v1"
        cloud = {
            "oracle__kind": "openai",
            "oracle__model": "cloud",
            "oracle__base_url": url,
            "oracle__max_retries": "0",
        }
        run = start(**cloud, rollout__temperature="1.5", eval__problems="30")
        figures = validate(run)
    lines = capsys.readouterr().err.splitlines()
    assert figures["eval/unknown"] > 0
    assert sum(line.startswith("the oracle failed: ") for line in lines) == 1, "its reason, once"
    (said,) = [line for line in lines if line.startswith("warning: the oracle failed ")]
    assert f" {figures['eval/unknown']} questions" in said


def test_a_row_is_made_of_plain_numbers() -> None:
    json.dumps(Result("x", [True, False], [True, True], [False, True]).row())
