"""One method beside others along the curve, on a table made by hand: what is chosen, compared, printed."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from studies import along_the_curve_shown
from studies.along_the_curve import FRACTIONS, Contest
from studies.by_problem import HELDOUT, VALIDATION, read_problems
from studies.catalog import STUDIES
from studies.report import ByProblem, Record, Study, measured, problems_path, redraw, write_study
from studies.statistics import compare_seeds, holm
from study import COMMITTED

N = 20
SEEDS = (0, 1, 2)


def part(name: str, seed: int, split: str, wrong: list[int], order: list[int]) -> pd.DataFrame:
    """Wrong alone on these problems; who is called first comes first in `order`, then all others at random."""
    score = [float(N - order.index(i)) if i in order else 0.0 for i in range(N)]
    rows = {"id": [f"{split}{i}" for i in range(N)], "score": score, "local": [float(i not in wrong) for i in range(N)]}
    return pd.DataFrame({"arm": name, "seed": seed, "split": split, **rows, "cloud": 1.0, "called": np.nan})


def table() -> pd.DataFrame:
    """All are wrong alone on problems 0 to 9. `ours` calls on wrong ones only, `other` on a right one in every two, on
    seed 0 on right ones only. Of the family a asks for the wrong ones on the validation problems and b does not; on
    the held-out ones it is the other way round."""
    wrong, right = list(range(10)), list(range(10, 20))
    mixed = [i for pair in zip(wrong, right, strict=True) for i in pair]
    parts = []
    for seed in SEEDS:
        for split in (VALIDATION, HELDOUT):
            a, b = (wrong, right) if split == VALIDATION else (right, wrong)
            orders = {"ours": wrong, "other": mixed if seed else right, "a": a, "b": b, "perfect": wrong}
            parts += [part(name, seed, split, wrong, order) for name, order in orders.items()]
    return pd.concat(parts, ignore_index=True).assign(correct=np.nan)


CONTEST = Contest("ours", "ours", (), {}, {"family": ("a", "b")}, ("other", "family"), ("perfect",))


@pytest.fixture(scope="module")
def record() -> Record:
    rows, comparisons = CONTEST.figures(table())
    made: Record = json.loads(json.dumps({"rows": rows, "comparisons": comparisons, "seeds": list(SEEDS)}))
    return made


def test_every_method_at_exactly_so_many_calls(record: Record) -> None:
    at = {(row["method"], row["seed"]): row["at"] for row in record["rows"]}
    assert {name for name, _ in at} == {"ours", "other", "family", "perfect"}
    # of 20 problems 10 are right alone; ten calls right all of them, twenty cost nothing more
    assert at["ours", 0] == pytest.approx({"0": 0.5, "0.1": 0.6, "0.2": 0.7, "0.3": 0.8, "0.5": 1, "0.7": 1, "0.9": 1})
    assert at["other", 0]["0.5"] == 0.5 and at["other", 1]["0.3"] == pytest.approx(0.65)


def test_the_held_out_problems_have_no_say_in_the_choice(record: Record) -> None:
    family = [row for row in record["rows"] if row["method"] == "family"]
    assert all(set(row["chosen"].values()) == {"a"} for row in family), "b would be right on the held-out ones"
    assert all(row["at"]["0.5"] == 0.5 for row in family)
    # a threshold for 30% on the validation problems, where a scores as on the held-out ones
    assert family[0]["landed"]["0.3"] == pytest.approx([0.3, 0.5])


def test_comparisons_are_paired_and_corrected_by_family(record: Record) -> None:
    found = {(d["b"], d.get("cloud_fraction", "apgr")): d for d in record["comparisons"]}
    assert set(found) == {(b, at) for b in ("other", "family") for at in (*FRACTIONS, "apgr")}, "no ceiling"
    d = found["other", 0.3]
    # ours .8; other none of six right on seed 0, three of six on the others
    assert d["per_seed"] == pytest.approx([0.3, 0.15, 0.15])
    assert {k: d[k] for k in ("mean", "low", "high", "wins")} == pytest.approx(
        {k: v for k, v in compare_seeds([0.8] * 3, [0.5, 0.65, 0.65]).items() if k != "per_seed"}
    )
    goal = [d for d in record["comparisons"] if "p" in d]
    assert [d["holm"] for d in goal] == holm([d["p"] for d in goal]) and len(goal) == 12
    assert "p" not in found["other", "apgr"]
    assert found["family", 0.3]["p"] == 0.0, "three times the same difference"


def test_a_goal_without_runs_is_refused() -> None:
    with pytest.raises(ValueError, match="no runs of family"):
        Contest("ours", "ours", (), {}, {}, ("other", "family")).figures(table())


def test_tables_say_where_it_wins_and_loses(record: Record) -> None:
    tables = along_the_curve_shown.tables(CONTEST, record)
    goal, _, less, _, chosen, members = tables
    assert all(len(cells) == len(t.columns) for t in tables for cells in t.cells)
    assert [cells[0] for cells in goal.cells] == ["10%", "20%", "30%", "50%", "70%", "90%"]
    assert goal.cells[2][1:4] == ["80.0%", "other (60.0%)", "+20.0 (-1.5 to +41.5)"]
    assert {cells[-1] for cells in goal.cells} == {"none"}
    lines = {cells[0]: cells for cells in less.cells}
    assert set(lines) == {"other", "family"}
    assert (
        lines["family"][-2] == "better at 10%, 20%, 30%, 50%, 70%, 90%" and lines["family"][-1] == lines["family"][-2]
    )
    assert "50%" not in lines["other"][-1], "three seeds that differ do not outlive twelve comparisons"
    assert chosen.cells == [["family", *["a; a; a"] * 6]]
    assert members.cells == [], "nothing is known of what they do as trained"


def test_what_a_family_s_runs_do_as_trained() -> None:
    made = table()
    of_b = (made["arm"] == "b") & (made["split"] == HELDOUT)
    made.loc[of_b, "correct"] = 1.0
    made.loc[of_b, "called"] = (np.arange(of_b.sum()) % N < 5 + made.loc[of_b, "seed"]).astype(float)
    rows, comparisons = CONTEST.figures(made)
    record: Record = {"rows": rows, "comparisons": comparisons, "seeds": list(SEEDS)}
    members = along_the_curve_shown.tables(CONTEST, record)[-1]
    assert members.cells == [["family", "b", "25.0 to 35.0%", "100.0%"]]


def test_the_picture_tells_some_methods_of_the_goal_apart(record: Record) -> None:
    figure = Figure(layout="constrained")
    along_the_curve_shown.draw(replace(CONTEST, picked=("family",)), figure, record)
    curves = figure.axes[0]
    assert [t.get_text() for t in curves.get_legend().get_texts()] == [
        "ours",
        "family",
        "the 1 other methods of the goal",
    ]
    assert len({line.get_color() for line in curves.get_lines()}) == 3


def test_it_is_said_where_the_goal_is_missed() -> None:
    swapped = table().replace({"arm": {"ours": "other", "other": "ours"}})
    rows, comparisons = CONTEST.figures(swapped)
    record: Record = {"rows": rows, "comparisons": comparisons, "seeds": list(SEEDS)}
    goal = along_the_curve_shown.tables(CONTEST, record)[0]
    (at_30,) = (cells for cells in goal.cells if cells[0] == "30%")
    assert at_30[3].startswith("-20.0") and at_30[-2:] == ["same", "none"]
    record["comparisons"] = [d | {"low": -0.3, "high": -0.1} if d["b"] == "other" else d for d in comparisons]
    assert along_the_curve_shown.tables(CONTEST, record)[0].cells[2][-1] == "other"


def nearly() -> pd.DataFrame:
    """Scores that differ where a kept one no longer does."""
    made = table()
    return made.assign(score=np.where(made["score"] > 0, 12 + np.arange(len(made)) * 1e-6, 0.0))


def test_all_figures_come_from_the_kept_problems(tmp_path: Path) -> None:
    """Written beside the JSON, and computed from there again by `--redraw`, whatever the JSON says."""
    kept = ByProblem(lambda runs: nearly(), CONTEST.figures)
    show = partial(along_the_curve_shown.tables, CONTEST)
    study = Study("one", "?", SEEDS, lambda seed: [], kept.measure, show, lambda *_: None, by_problem=kept)
    rows, comparisons = measured(study, [], tmp_path)
    assert problems_path(study, tmp_path).exists() and rows != kept.measure([])[0]
    revision, seeds = "0" * 40, list(SEEDS)
    made: Record = {
        "study": "one", "question": "?", "config": "quickstart", "overrides": {}, "seeds": seeds, "own_seeds": seeds,
        "revision": revision, "runs": [{"revision": revision, "measured": [revision], "unknown": 0}],
        "machine": {"device": "cpu", "cpu": "x"}, "rows": rows, "comparisons": comparisons,
    }  # fmt: skip
    write_study(study, made, tmp_path)
    first, json_text = (tmp_path / "one.md").read_text(), (tmp_path / "one.json").read_text()
    assert "computed by `--redraw` from [one.problems.jsonl.xz](one.problems.jsonl.xz)" in first
    wrong = json.loads(json_text)
    wrong["rows"][0]["at"]["0.3"] = 0.123
    (tmp_path / "one.json").write_text(json.dumps(wrong))
    assert redraw({"one": study}, tmp_path) == ["one"]
    again, whole = json.loads((tmp_path / "one.json").read_text()), json.loads(json_text)
    assert (again["rows"], again["comparisons"]) == (whole["rows"], whole["comparisons"])
    assert (tmp_path / "one.md").read_text() == first


COMMITTED_BY_PROBLEM = sorted(name for name, study in STUDIES.items() if problems_path(study, COMMITTED).exists())


@pytest.mark.parametrize("name", COMMITTED_BY_PROBLEM)
def test_committed_figures_are_those_of_the_committed_problems(name: str) -> None:
    study, record = STUDIES[name], json.loads((COMMITTED / f"{name}.json").read_text())
    assert study.by_problem is not None
    rows, comparisons = json.loads(json.dumps(study.by_problem.figures(read_problems(problems_path(study, COMMITTED)))))
    for ours, kept in ((rows, record["rows"]), (comparisons, record["comparisons"])):
        assert len(ours) == len(kept)
        for mine, its in zip(map(flat, ours), map(flat, kept), strict=True):
            close = {
                k: pytest.approx(v, rel=1e-9, abs=1e-12) if isinstance(v, int | float) else v for k, v in its.items()
            }
            assert mine == close


def near(value: Any) -> Any:
    return pytest.approx(value, rel=1e-9, abs=1e-12) if isinstance(value, int | float) else value


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """A tree as one level, for `approx`."""
    if isinstance(value, dict | list):
        inner = value.items() if isinstance(value, dict) else enumerate(value)
        return {key: v for k, x in inner for key, v in flat(x, f"{name}.{k}").items()}
    return {name: value}
