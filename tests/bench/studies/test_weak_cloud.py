"""A cloud that errs on a kind of problem: the same by its task's solver, and in the study, on tables made by hand."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gapg.build import make_oracle, make_task
from gapg.config import load_config
from gapg.errors import ConfigError
from gapg.tasks.base import Verdict
from gapg.tasks.countdown import Countdown
from studies.arms import Finished
from studies.report import Record, Study
from studies.weak_cloud import (
    ASK,
    CLOUDS,
    HARD,
    IGNORE,
    METHODS,
    OURS,
    WEAK_CLOUD,
    CountdownWithBlindCloud,
    weak_arms,
)


@pytest.mark.parametrize("blind", HARD)
def test_a_blind_cloud_is_wrong_on_its_kind_alone(blind: str) -> None:
    small = {"max_number": 8, "max_target": 50}
    task, plain = CountdownWithBlindCloud(blind=blind, **small), Countdown(**small)
    assert task.prompts("heldout") == plain.prompts("heldout")
    hard = {p: HARD[blind](p.id, 100) for p in task.prompts("heldout")}
    assert 0.05 < sum(hard.values()) / len(hard) < 0.95
    for prompt, wrong in list(hard.items())[:200]:
        (verdict,) = task.verify(prompt, [task.solve(prompt.id).split("<answer>")[1].split("</answer>")[0]])
        assert verdict is (Verdict.WRONG if wrong else Verdict.CORRECT)
    with pytest.raises(ValueError, match="blind"):
        CountdownWithBlindCloud(blind="all")


@pytest.mark.parametrize("cloud", CLOUDS[2::2], ids=lambda cloud: cloud.name)
def test_the_studys_scores_are_those_of_a_runs_own_oracle(cloud: Any) -> None:
    config = load_config("quickstart", {"task.args": "{max_number: 6, max_target: 50}", **cloud.overrides})
    task = make_task(config)
    oracle, prompts = make_oracle(config, task, Path("unused")), task.prompts("heldout")
    scores = cloud.scores([p.id for p in prompts], 100)
    for prompt in prompts:
        (answer,) = oracle.ask(task.question(prompt)).result()
        text = (answer.text or "").removeprefix("<answer>").removesuffix("</answer>")
        assert scores[prompt.id] == float(task.verify(prompt, [text]) == [Verdict.CORRECT])


def test_the_study_on_tables_made_by_hand(
    finish: Callable[..., Finished],
    predicted: Callable[..., dict[str, Any]],
    drawn: Callable[[Study, list[Finished]], Record],
) -> None:
    """Of 40 problems the first 20 are wrong alone. Ten of these have a large target, and come first by every margin
    but of the method that asked: there they come last."""
    runs = []
    for arm in (arm for seed in (20, 21) for arm in weak_arms(seed)):
        knows = arm.label.startswith(ASK)
        rows = []
        for i in range(40):
            large = i < 10
            margin = -100.0 - i if knows and large else 100.0 - i
            outcome = "local_wrong" if i < 20 else "local_correct"
            rows.append(predicted(i, outcome, margin) | {"id": f"2 3 {i + 5} = {50 if large else 20}"})
        run = finish(arm, {"heldout-masked": rows, "heldout-sampled": rows})
        (run.folder / "done.json").write_text('{"oracle": {"requests": 7}}')
        runs.append(run)
    assert len(runs) == 2 * (2 * len(CLOUDS) + 2)
    record = drawn(WEAK_CLOUD, runs)
    at = {(row["cloud"], row["method"], row["seed"]): row for row in record["rows"]}
    assert len(at) == len(CLOUDS) * len(METHODS) * 2
    perfect, blind = at["right on 100%", OURS, 20], at["blind to large targets", OURS, 20]
    assert (perfect["at_0.3"], perfect["in_vain"], perfect["requests"]) == (pytest.approx(0.5 + 0.3), 0.0, 7)
    asked = at["blind to large targets", ASK, 20]
    # the first ten calls of twelve are for nothing
    assert blind["in_vain"] >= 10 / 12 and asked["in_vain"] < 0.3
    assert asked["at_0.3"] > blind["at_0.3"] + 0.1
    less = {(d["cloud"], d["a"], d["b"], d["cloud_fraction"]): d for d in record["comparisons"]}
    assert less["blind to large targets", ASK, IGNORE, 0.3]["low"] > 0.1
    cells = {tuple(row[:3]): row[-1] for row in WEAK_CLOUD.tables(record)[1].cells}
    assert cells["blind to large targets", ASK, OURS].endswith("same"), "at 50% called it has to ask in vain too"


def test_other_tasks_and_real_clouds_are_refused() -> None:
    config, check = load_config("quickstart"), WEAK_CLOUD.check
    assert check is not None
    for arm in weak_arms(20):
        check(load_config("quickstart", arm.overrides))
    with pytest.raises(ConfigError, match=r"task\.name=countdown"):
        check(config.model_copy(update={"task": config.task.model_copy(update={"name": "maths"})}))
    with pytest.raises(ConfigError, match=r"--oracle\.kind solver"):
        check(config.model_copy(update={"oracle": config.oracle.model_copy(update={"kind": "openai"})}))
