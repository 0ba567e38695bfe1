"""Chains of arithmetic: problems, demonstrations and solver; and the study of other tasks on tables made by hand."""

import random
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest

from gapg.build import make_task
from gapg.config import load_config
from gapg.judge import parse
from gapg.tasks.base import HELP_PHRASE, Verdict
from studies.arms import Finished
from studies.by_problem import stacked
from studies.other_tasks import FRACTIONS, LOG_PROB, OTHER_TASKS, OURS, TASKS, Chains, other_arms
from studies.report import Record, Study


@pytest.fixture(scope="module")
def chains() -> Chains:
    return Chains(problems=1200)


def value(text: str) -> int:
    """From left to right, by hand."""
    first, *rest = text.split()
    total = int(first)
    for sign, number in zip(rest[::2], map(int, rest[1::2]), strict=True):
        total = {"+": total + number, "-": total - number, "*": total * number}[sign]
        assert 1 <= total <= 100
    return total


def test_problems_are_chains_and_the_solver_solves_them(chains: Chains) -> None:
    train, heldout = chains.prompts("train"), chains.prompts("heldout")
    assert (len(train), len(heldout)) == (900, 300) and not {p.id for p in train} & {p.id for p in heldout}
    assert {len(p.id.split()) for p in train} == {3, 5, 7, 9}
    tokenizer = chains.tokenizer()
    for prompt in heldout:
        assert prompt.answer == str(value(prompt.id)) and prompt.text == f"{prompt.id} ="
        answer = parse(chains.solve(prompt.id)).answer
        assert chains.verify(prompt, [answer or "", f" {prompt.answer} ", "0"]) == [
            Verdict.CORRECT, Verdict.CORRECT, Verdict.WRONG,
        ]  # fmt: skip
        assert tokenizer.unk_token_id not in chains.render(prompt, tokenizer)
    assert Chains(problems=1200).prompts("heldout") == heldout != Chains(problems=1200, seed=1).prompts("heldout")


def test_demonstrations_call_after_what_went_wrong(chains: Chains) -> None:
    shown = chains.demonstrations(5)
    tokenizer = chains.tokenizer()
    calls: dict[bool, list[bool]] = {True: [], False: []}
    for demo in shown:
        steps = demo.response.partition(" <")[0].split(" ; ")
        right = steps[-1].split()[-1] == demo.prompt.answer
        calls[right].append(demo.response.endswith(HELP_PHRASE))
        assert len(steps) == len(demo.prompt.id.split()) // 2
        # honest: each step goes on from the one before
        assert all(b.split()[0] == a.split()[-1] for a, b in pairwise(steps))
        assert tokenizer.unk_token_id not in tokenizer.encode(demo.response)
    assert sum(calls[True]) / len(calls[True]) == pytest.approx(0.03, abs=0.03)
    assert sum(calls[False]) / len(calls[False]) == pytest.approx(0.70, abs=0.1)
    assert len(calls[False]) / len(shown) == pytest.approx(0.20, abs=0.04)
    assert chains.demonstrations(5) == shown != chains.demonstrations(6)
    assert not any(HELP_PHRASE in d.response for d in Chains(problems=1200, help_shown=False).demonstrations(5))


def test_a_slip_is_wrong_also_beside_a_border() -> None:
    """At most 9: a slip upwards of 9, or downwards of 1, would stop at the right value."""
    chains = Chains(numbers=(2,), max_number=5, max_value=9, problems=40)
    rng = random.Random(0)
    values = [chains._with_slip(5, [("-", 4)], rng) for _ in range(50)]
    assert {first for first, _ in values} == {5} and {last for _, last in values} == set(range(2, 10))


@pytest.mark.parametrize("name", TASKS)
def test_a_task_is_the_same_whatever_the_config_says_of_another(name: str, tiny: str) -> None:
    of_quickstart, of_tiny = (load_config(base, TASKS[name]).task for base in ("quickstart", tiny))
    assert of_quickstart == of_tiny


def test_settings_without_problems_are_refused() -> None:
    with pytest.raises(ValueError, match="widen the ranges"):
        Chains(numbers=(2,), max_number=2, max_value=3, problems=100)
    with pytest.raises(ValueError, match="no chain"):
        Chains(problems=10).solve("3 / 4")


@pytest.mark.parametrize("name", TASKS)
def test_prompts_and_demonstrations_fit_the_studys_settings(name: str) -> None:
    config = load_config("quickstart", TASKS[name])
    task = make_task(config)
    tokenizer = task.tokenizer()  # type: ignore[attr-defined]
    prompts = task.prompts("train")[:300]
    assert max(len(task.render(p, tokenizer)) for p in prompts) <= config.rollout.max_prompt_tokens
    responses = [task.solve(p.id) for p in prompts]  # type: ignore[attr-defined]
    if isinstance(task, Chains):
        responses = [d.response for d in task.demonstrations(0)]
    assert max(len(tokenizer.encode(r)) for r in responses) <= config.rollout.max_new_tokens


def test_the_study_on_tables_made_by_hand(
    finish: Callable[..., Finished],
    predicted: Callable[..., dict[str, Any]],
    drawn: Callable[[Study, list[Finished]], Record],
) -> None:
    """Wrong alone on the first half; the marginal method calls these first, the others the last half; the mean log-prob
    tells them nothing, and the least one all."""

    def answered(ids: range, sign: int) -> list[dict[str, Any]]:
        wrong = len(ids) // 2
        return [
            predicted(
                i,
                "local_wrong" if i - ids.start < wrong else "local_correct",
                sign * (ids.start + wrong + 0.5 - i),
                answer_logprob_mean=-1.0,
                answer_logprob_min=-3.0 if i - ids.start < wrong else -2.0,
            )
            for i in ids
        ]

    runs = []
    for arm in (arm for seed in (20, 21) for arm in other_arms(seed)):
        sign = 1 if arm.label.startswith(OURS) else -1
        heldout, train = answered(range(40), sign), answered(range(100, 200), sign)
        files = {"heldout-masked": heldout, "heldout-sampled": heldout, "train-masked": train}
        runs.append(finish(arm, files))
    record = drawn(OTHER_TASKS, runs)
    at = {(row["task"], row["method"], row["seed"]): row for row in record["rows"]}
    assert len(at) == len(TASKS) * (5 + 4) * 2
    for task in TASKS:
        assert at[task, OURS, 20]["at_0.3"] == pytest.approx(0.8)
        assert at[task, LOG_PROB, 21]["at_0.3"] == pytest.approx(0.65)
        assert at[task, "GAPG", 20]["at_0.3"] == pytest.approx(0.5)
        assert at[task, stacked("GAPG"), 20]["at_0.3"] == pytest.approx(0.8)
        of_task = [d for d in record["comparisons"] if d["task"] == task]
        less = {(d["a"], d["b"], d["cloud_fraction"]): d["mean"] for d in of_task}
        assert less[OURS, "GAPG", 0.5] == pytest.approx(0.5) and less[OURS, LOG_PROB, 0.5] == pytest.approx(0.25)
        assert less[stacked(OURS), stacked("GAPG"), 0.5] == pytest.approx(0.0)
        assert len(less) == (4 + 3) * len(FRACTIONS)
