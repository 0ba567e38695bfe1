"""What happened on each problem: collected from runs made by hand, kept, and read again."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from gapg.data import split_validation
from gapg.errors import ConfigError
from gapg.jsonl import to_json
from gapg.tasks.base import Prompt
from studies.arms import Arm, Entrant, Finished, Predictions, predictions_path
from studies.by_problem import HELDOUT, VALIDATION, collect, read_problems, stacked, validation_answers, write_problems
from studies.marginal import MARGINAL
from studies.report import ByProblem, earlier_runs, measured
from studies.stacked import OF_ANSWER
from studies.statistics import Curve
from studies.tuned import best_members, one_stacked_member

N, TRAIN = 10, 50
Predicted = Callable[..., dict[str, Any]]
PROBE = Predictions("probe", lambda run: [])


def plain(seed: int) -> Arm:
    return Arm("plain", {}, seed)


ENTRANTS = (Entrant("plain", plain), Entrant("probe", plain, PROBE), Entrant("prompts", plain, PROBE, sees="prompt"))


@pytest.fixture
def run(finish: Callable[..., Finished], predicted: Predicted) -> Callable[..., Finished]:
    """A run that is wrong on every third problem, of margin i / 7 on problem i, and a probe that knows which."""

    def make(seed: int = 0, arm: Arm | None = None, **more: Any) -> Finished:
        def answered(i: int) -> dict[str, Any]:
            right = "local_correct" if i % 3 else "local_wrong"
            return predicted(i, right, i / 7 if i else None, oracle_score=float(i != 4), **more)

        heldout, train = [answered(i) for i in range(N)], [answered(i) for i in range(100, 100 + TRAIN)]
        sampled = [row | ({"outcome": "cloud_correct"} if i == 1 else {}) for i, row in enumerate(heldout)]
        kept = split_validation([Prompt(row["id"], "", "", "") for row in train], 1500, seed)[1]
        scores = [{"id": p.id, "split": VALIDATION, "score": float(int(p.id[1:]) % 3 == 0)} for p in kept]
        scores += [{"id": f"p{i}", "split": HELDOUT, "score": -float(i), "local": int(i > 7)} for i in range(N)]
        files = {"heldout-masked": heldout, "heldout-sampled": sampled, "train-masked": train, "probe": scores}
        return finish(arm or plain(seed), files)

    return make


def of(table: pd.DataFrame, name: str, split: str = HELDOUT) -> pd.DataFrame:
    return table[(table["arm"] == name) & (table["split"] == split)]


def test_every_entrant_has_its_rows(run: Callable[..., Finished]) -> None:
    def last_first(finished: Finished, split: str, answers: Any) -> Any:
        return np.arange(len(answers), dtype=float), np.ones(len(answers))

    made = run()
    table = collect([made], ENTRANTS, {"plain": {"last first": last_first}, "of another arm": {"none": last_first}})
    names = ["plain", stacked("plain"), "probe", stacked("probe"), "prompts", "last first"]
    assert list(dict.fromkeys(table["arm"])) == names, "what sees the prompt alone has no log-probs to stack"
    own = of(table, "plain")
    assert own["score"].tolist() == [-np.inf, *(i / 7 for i in range(1, N))]
    assert own["local"].tolist() == [float(i % 3 > 0) for i in range(N)]
    assert own["cloud"].tolist() == [float(i != 4) for i in range(N)]
    assert own["called"].tolist() == [float(i == 1) for i in range(N)]
    probe = of(table, "probe")
    assert probe["score"].tolist() == [-float(i) for i in range(N)] and probe["local"].sum() == 2
    assert probe["called"].isna().all(), "a router was never trained to call"
    assert of(table, "last first")["score"].tolist() == [float(i) for i in range(N)]
    # a fifth of the training problems, those that the run kept out of training
    valid = of(table, "probe", VALIDATION)
    kept = [row["id"] for row in validation_answers(made)]
    assert len(valid) == TRAIN // 5 and valid["id"].tolist() == kept
    assert valid["local"].tolist() == (1 - valid["score"]).tolist(), "without one of its own, the run's answer"
    best = of(table, stacked("probe"), VALIDATION)
    assert best.loc[best["local"] == 0, "score"].min() > best.loc[best["local"] == 1, "score"].max()


def test_a_model_of_its_own_is_judged_by_its_own_answers(run: Callable[..., Finished], predicted: Predicted) -> None:
    """The run's margins know which answers of the run are wrong; those of the other model are all alike."""
    made = run()
    alike = {key: predicted(0, "", 0.0)[key] for key in OF_ANSWER}
    write(made, "probe", [row | alike | {"score": 0.0} for row in made.rows("probe")])
    scores = of(collect([made], ENTRANTS, {}), stacked("probe"))["score"]
    assert scores.nunique() == 1
    assert of(collect([made], ENTRANTS, {}), stacked("plain"))["score"].nunique() > 1


def test_it_is_kept_and_read_again(run: Callable[..., Finished], tmp_path: Path) -> None:
    table = collect([run(0), run(1)], ENTRANTS, {})
    path = tmp_path / "a.problems.jsonl.xz"
    write_problems(path, table)
    by_split = {"by": ["seed", "split"], "kind": "stable", "ignore_index": True}
    read, table = read_problems(path).sort_values(**by_split), table.sort_values(**by_split)
    exact = [key for key in table.columns if key != "score"]
    pd.testing.assert_frame_equal(read[exact], table[exact])
    assert read["score"].tolist() == [float(f"{x:.3g}") for x in table["score"]]
    write_problems(tmp_path / "b.xz", read_problems(path))
    assert (tmp_path / "b.xz").read_bytes() == path.read_bytes(), "the same bytes of the same table"


def test_a_study_is_made_seed_by_seed(run: Callable[..., Finished], tmp_path: Path) -> None:
    def figures(table: pd.DataFrame) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        return [{"seed": int(x), "split": y, "n": len(part)} for (x, y), part in table.groupby(["seed", "split"])], []

    kept = ByProblem(lambda runs: collect(runs, ENTRANTS, {}), figures)
    study = replace(MARGINAL, name="s", measure=kept.measure, by_problem=kept)
    made = {"config": "quickstart", "overrides": {}, "seeds": [1], "study": "s", "own_seeds": [0, 1], "runs": []}
    assert earlier_runs(study, tmp_path, made) == []
    first, second = run(0), run(1)
    one, _ = measured(study, [second], tmp_path)
    (tmp_path / "s.json").write_text(json.dumps(made | {"runs": [{"seed": 1, "run": "abc"}]}))
    assert earlier_runs(study, tmp_path, made | {"seeds": [0]}) == [{"seed": 1, "run": "abc"}]
    assert earlier_runs(study, tmp_path, made) == [], "a seed that is made again is not kept"
    both, _ = measured(study, [first], tmp_path)
    assert both == kept.measure([first, second])[0] and one == both[2:]
    assert measured(study, [second], tmp_path)[0] == both
    with pytest.raises(ConfigError, match=r"of other settings \(.*study.py s.*choose another --output"):
        earlier_runs(study, tmp_path, made | {"overrides": {"optim.lr": "1e-4"}, "seeds": [0]})


def write(run: Finished, name: str, rows: list[dict[str, Any]]) -> None:
    predictions_path(run.folder, name).write_text("".join(to_json(row) + "\n" for row in rows))


def test_problems_that_the_cloud_failed_on_are_left_out_of_all(run: Callable[..., Finished]) -> None:
    runs = [run(0), run(1)]
    write(runs[1], "heldout-masked", [r | {"oracle_score": None} if r["id"] == "p2" else r
                                      for r in runs[1].rows("heldout-masked")])  # fmt: skip
    table = collect(runs, ENTRANTS, {})
    assert {len(part) for _, part in table[table["split"] == HELDOUT].groupby(["arm", "seed"])} == {N - 1}


def test_what_cannot_be_compared_is_refused(run: Callable[..., Finished]) -> None:
    made = run(0)
    probe = made.rows("probe")
    for rows in (probe[1:], [*probe[:-1], probe[-1] | {"id": "p99"}]):
        write(made, "probe", rows)
        with pytest.raises(ValueError, match="probe: its predictions are not of the 10 "):
            collect([made], ENTRANTS, {})
    write(made, "probe", [*probe[:-1], probe[-1] | {"score": None}])
    with pytest.raises(ValueError, match="probe: a score of its predictions is no finite number"):
        collect([made], ENTRANTS, {})
    other = run(0, Arm("other", {}, 0))
    both = (Entrant("plain", plain), Entrant("other", lambda seed: replace(other.arm, seed=seed)))
    assert len(collect([made, other], both, {})) == 4 * (N + TRAIN // 5)
    write(other, "train-masked", [row | {"oracle_score": 0.0} for row in other.rows("train-masked")])
    with pytest.raises(ValueError, match="the cloud answered the same problems differently"):
        collect([made, other], both, {})


# ---- the best of several runs


LOW, HIGH = Curve(np.array([0.0, 1.0]), np.array([0.9, 0.5])), Curve(np.array([0.0, 1.0]), np.array([0.4, 0.8]))


def test_a_member_is_chosen_for_each_fraction_and_the_first_of_equals() -> None:
    """.9 - .4 c against .4 + .4 c: equal at 62.5%."""
    chosen = best_members({"low": LOW, "high": HIGH, "low too": LOW}, ("low", "high", "low too"))
    assert chosen == ["low"] * 63 + ["high"] * 38


def test_one_stacked_score_a_family_by_the_validation_problems() -> None:
    """a is perfect on the validation problems and wrong way round on the held-out ones, b the reverse."""
    parts = []
    for arm, split, sign in (("a", VALIDATION, 1), ("b", VALIDATION, -1), ("a", HELDOUT, -1), ("b", HELDOUT, 1)):
        local = [0.0, 0.0, 1.0, 1.0]
        rows = {"id": list("wxyz"), "score": [sign * -x for x in local], "local": local, "cloud": 1.0}
        parts += [pd.DataFrame({"arm": name, "seed": 0, "split": split, **rows}) for name in (arm, stacked(arm))]
    table = one_stacked_member(pd.concat(parts, ignore_index=True), {"family": ("a", "b")})
    assert set(table["arm"]) == {"a", "b", stacked("family")}
    assert of(table, stacked("family"))["score"].tolist() == [0.0, 0.0, 1.0, 1.0], "a's, though b's would be better"
