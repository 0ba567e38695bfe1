"""The contest of `method: marginal`: who takes part, on what, and the parts that are its own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gapg.config import load_config
from studies import arms
from studies.arms import FRESH_SEEDS, HEADLINE_SEEDS, Finished
from studies.by_problem import HELDOUT, VALIDATION, collect, validation_answers
from studies.marginal import CEILINGS, MARGINAL, MARGINAL_NUMBERS, MASKED, OURS, PLAIN, ROUTERS, VOTES, contest, sweeps
from studies.marginal_ablation import MARGINAL_ABLATION
from studies.predictions import CALIBRATION_SAMPLES, HELDOUT_SAMPLES
from studies.report import Record, Study
from studies.runs import place

SEED = FRESH_SEEDS[0]
STUDIES = (MARGINAL, MARGINAL_NUMBERS, MARGINAL_ABLATION)


@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.name)
def test_every_run_is_on_problems_and_seeds_that_nothing_was_tuned_on(study: Study) -> None:
    assert set(study.seeds) <= set(FRESH_SEEDS) and not set(FRESH_SEEDS) & {0, *HEADLINE_SEEDS, 31, 32, 33, 51, 52}
    made = study.arms(SEED)
    assert len({arm.label for arm in made}) == len(made)
    configs = [load_config("quickstart", {**arm.overrides, "seed": str(arm.seed)}) for arm in made]
    assert {config.task.args["seed"] for config in configs} == {9}
    by_numbers = {config.task.args.get("split") for config in configs}
    assert by_numbers == {"numbers" if study is MARGINAL_NUMBERS else None}
    # the same number of updates, from the same number of samples, for all that are trained; of one half are supervised
    updates = [config.steps for config in configs if config.steps]
    assert len(updates) >= len(configs) - 1
    assert sorted(set(updates)) == ([150, 300] if study is MARGINAL else [300]) and updates.count(150) <= 1
    sampled = {(c.rollout.prompts_per_step, c.rollout.samples_per_prompt) for c in configs}
    assert sampled == ({(64, 4), (32, 8)} if study is MARGINAL_ABLATION else {(64, 4)})


def test_what_two_studies_share_is_one_run(tmp_path: Path) -> None:
    def folders(study: Study) -> set[str]:
        return {place(arm, "quickstart", {}, tmp_path).folder.name for arm in study.arms(SEED)}

    both = folders(MARGINAL) & folders(MARGINAL_ABLATION)
    assert len(both) == 3, "marginal, GAPG, and masked rollouts alone"
    assert not folders(MARGINAL) & folders(MARGINAL_NUMBERS)
    assert len(folders(MARGINAL)) == len(MARGINAL.arms(SEED)) - 1, "GAPG is the run trained to 30%"


def test_the_arms_are_what_they_say() -> None:
    def config(arm: arms.Arm) -> Any:
        return load_config("quickstart", arm.overrides)

    masked = config(arms.without_help(arms.masked(0)))
    assert (masked.method, masked.marginal.weight, masked.marginal.trace_worth) == ("marginal", 0, (0, 1))
    assert masked.task.args == {"help_shown": False}
    alone, fixed = config(arms.reward_alone(0.2, 0)), config(arms.gapg_fixed(0.2, 0))
    assert (alone.reward.alpha_c, alone.budget.filter, alone.budget.controller) == (0.2, False, False)
    assert (fixed.reward.alpha_c, fixed.budget.filter, fixed.budget.controller) == (0.2, True, False)
    grpo = config(arms.da_grpo_at(0.1, 0.5, 0))
    assert (grpo.budget.cloud_fraction, grpo.reward.alpha_a - grpo.reward.alpha_c) == (0.1, 0.5)
    assert config(arms.da_grpo_at(0.3, 0.6, 0)) == config(arms.da_grpo(0)), "as the other studies have it"


TRAIN = 30
SMALL = contest(sweeps((0.3, 0.4), (0.3,), (0.5,)), PLAIN[:1], ())


@pytest.fixture
def runs(finish: Callable[..., Finished], predicted: Callable[..., dict[str, Any]]) -> list[Finished]:
    """All runs of a small contest: right on even problems, with margins that know it as far as the label is long."""

    def answered(i: int, label: str) -> dict[str, Any]:
        right = "local_correct" if i % 2 == 0 else "local_wrong"
        text = f"<answer> {i % 7} * 1 </answer>"
        return predicted(i, right, -float(i % 2 == 0) * len(label) + (i * 37 % 11), response=text)

    made = []
    for seed in FRESH_SEEDS[:2]:
        for entrant in dict.fromkeys((e.arm(seed).label, e.arm) for e in SMALL.entrants):
            arm = entrant[1](seed)
            heldout, train = ([answered(i, arm.label) for i in range(*r)] for r in ((0, 20), (100, 100 + TRAIN)))
            files = {"heldout-masked": heldout, "heldout-sampled": heldout, "train-masked": train}
            if arm.label == MASKED:
                files[HELDOUT_SAMPLES.name] = [row for row in heldout for _ in range(5)]
                # in another order than the training problems are
                files[CALIBRATION_SAMPLES.name] = [row for row in reversed(train) for _ in range(5)]
            steps = [{"step": 1, "call_fraction": 0.3, "alpha_c": 0.4, "grad_norm": 3.0, "clipped": 1}]
            made.append(finish(arm, files, steps))
    return made


def test_a_small_contest_from_its_runs_to_its_page(
    runs: list[Finished], drawn: Callable[[Study, list[Finished]], Record]
) -> None:
    from studies.marginal import contest_study

    record = drawn(contest_study("small", "?", SMALL, {}, ""), runs)
    methods = {row["method"] for row in record["rows"]}
    assert {OURS, *SMALL.goal, *CEILINGS, *SMALL.families} <= methods
    assert not {name for members in SMALL.families.values() for name in members} & methods
    perfect = [row for row in record["rows"] if row["method"] == CEILINGS[0]]
    assert all(row["at"]["0.5"] == 1 and row["auroc"] == 1 for row in perfect)
    assert {d["family"] for d in record["comparisons"] if d["b"] in SMALL.goal} == {"goal"}


def test_votes_are_of_the_problem_they_are_cast_on(runs: list[Finished]) -> None:
    (run,) = (run for run in runs if run.arm.label == MASKED and run.arm.seed == SEED)
    table = collect([run], [e for e in SMALL.entrants if e.name == MASKED], ROUTERS)
    for split, answers in ((VALIDATION, validation_answers(run)), (HELDOUT, run.rows("heldout-masked"))):
        votes = table[(table["arm"] == VOTES) & (table["split"] == split)]
        assert votes["id"].tolist() == [row["id"] for row in answers]
        assert votes["local"].tolist() == [float(row["outcome"] == "local_correct") for row in answers]


def test_the_ablation_counts_how_often_the_norm_is_clipped(
    finish: Callable[..., Finished], predicted: Callable[..., dict[str, Any]], drawn: Callable[..., Record]
) -> None:
    rows = [predicted(i, "local_correct" if i % 2 else "local_wrong", float(i % 2 == 0)) for i in range(10)]
    runs = []
    for arm in MARGINAL_ABLATION.arms(SEED):
        norms = [0.5, 2.0, 4.0, None]
        steps = [
            {"step": i, "call_fraction": 0.3, "alpha_c": 0.4, "grad_norm": n, "clipped": int(bool(n) and n > 1)}
            for i, n in enumerate(norms)
        ]
        runs.append(finish(arm, {"heldout-masked": rows, "heldout-sampled": rows}, steps))
    record = drawn(MARGINAL_ABLATION, runs)
    row = record["rows"][0]
    assert (row["clipped"], row["grad_norm"], row["at_50"], row["area"]) == (pytest.approx(2 / 3), 2.0, 1.0, 0.875)
    assert {row["grad_clip"] for row in record["rows"]} == {1.0, 10.0}
    assert (row["right"], row["otherwise wrong"], row["otherwise wrong, called"]) == (0.5, 0.5, pytest.approx(0.6))
    assert len(MARGINAL_ABLATION.tables(record)) == 4
