"""The baselines' comparison on tables made by hand: ten problems, of which everything can be counted."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from gapg.config import load_config
from gapg.studies import baselines, units
from gapg.studies.curves import curve
from gapg.studies.methods import Method, interval, points, prices, sides
from gapg.studies.paired import Difference
from gapg.studies.runs import place
from gapg.studies.study import Finished, Table

N = 10
MAKE = Callable[..., Finished]


def outcomes(right: set[int]) -> list[str]:
    return ["local_correct" if i in right else "local_wrong" for i in range(N)]


@pytest.fixture
def runs(finish: MAKE, predicted: Callable[..., dict[str, Any]]) -> Callable[..., list[Finished]]:
    """All runs of a seed. Alone everyone solves problems 4 to 9; the cloud solves all but problem 9.

    GAPG asks for 0, 1, 2 first. Its log-prob is lowest on problems it solves, those of the others have no order; with
    help in it, it is as its help phrase says.
    """

    def make(
        seed: int, ours: tuple[int, ...] = (0, 1, 2), metrics: list[dict[str, Any]] | None = None
    ) -> list[Finished]:
        found = []
        for unit in baselines.baseline_units(seed):
            right = {4, 5, 6, 7, 8, 9}
            first = ours if unit.label == "GAPG" else (9, 8, 7)
            margin = [5.0 - first.index(i) if i in first else -5.0 - i for i in range(N)]
            logprob = [-float(i) for i in range(N)] if unit.label == "GAPG" else [-1.0] * N
            cloud = [float(i != 9) for i in range(N)]
            rows = [
                predicted(i, outcomes(right)[i], margin[i], oracle_score=cloud[i], logprob_mean=-margin[i])
                | {"answer_logprob_mean": logprob[i]}
                for i in range(N)
            ]
            sampled = [row | {"outcome": "cloud_correct"} if row["id"] in ("p0", "p5") else row for row in rows]
            products = {"heldout-masked": rows, "train-masked": rows, "heldout-sampled": sampled}
            if unit.products:
                agree = [
                    row | {"response": f"<answer>{k * (int(row['id'][1:]) < 4)}</answer>"}
                    for row in rows
                    for k in range(5)
                ]
                products |= {"heldout-samples": agree, "calibration-samples": agree}
                scores = [
                    {"id": f"p{i}", "score": float(-i), "split": s}
                    for s in ("calibration", "heldout")
                    for i in range(N)
                ]
                products[unit.products[-1]] = scores
            found.append(finish(unit, products, metrics or []))
        return found

    return make  # fmt: skip


def cells(table: Table, method: str) -> list[str]:
    return list(next(row for row in table.cells if row[0] == method))


def test_every_run_is_one_of_those_the_studies_share() -> None:
    found = baselines.baseline_units(20)
    overrides = [u.overrides for u in found]
    assert units.gapg(20).overrides in overrides
    assert units.collaboration_aware(20).overrides in overrides
    for unit in found:
        load_config("quickstart", unit.overrides)
    assert load_config("quickstart", found[0].overrides).steps == 0
    assert load_config("quickstart", found[1].overrides).reward.alpha_c == 0


def test_at_equal_calls(runs: Callable[..., list[Finished]]) -> None:
    finished = runs(20) + runs(21, ours=(0, 1, 9))
    measured = baselines.measure(finished)
    assert measured.cloud_fraction == 0.3
    # 6 alone and 3 from the cloud; on seed 21 one call goes to the problem that the cloud gets wrong and GAPG right
    assert measured.at_budget("GAPG") == pytest.approx([0.9, 0.7])
    # three tenths of each problem: 0.7 * 6 + 0.3 * 9
    assert measured.at_budget("+ random offloading") == pytest.approx([0.69, 0.69])
    # problems 9, 8, 7: one right answer is lost
    assert measured.at_budget("DA-GRPO") == pytest.approx([0.5, 0.5])
    assert measured.at_budget("+ prompt-only router") == pytest.approx([0.9, 0.9])
    # 0 to 3 have five answers in five samples, and nobody can say which three of the four are called
    assert measured.at_budget("+ self-consistency of 5") == pytest.approx([0.9, 0.9])
    # GAPG's least likely responses are 9, 8, 7
    assert measured.at_budget("GAPG, its log-prob") == pytest.approx([0.5, 0.5])
    # and with help in it 0, 1, 2 as the help phrase has it
    assert measured.at_budget("GAPG, its log-prob with help in it") == pytest.approx([0.9, 0.7])
    d = measured.differences[0.3]["+ prompt-only router"]
    assert d.per_seed == pytest.approx((0.0, -0.2))
    assert d.wins == 0
    table = baselines.equal_calls(measured)
    assert cells(table, "DA-GRPO")[1:3] == ["50.0%", "50.0 to 50.0%"]
    assert cells(table, "DA-GRPO")[4] == "2 of 2"
    assert cells(table, "task-tuning only (no calls)")[1] == "60.0%"
    assert cells(table, "cloud only (all calls)")[1] == "90.0%"
    assert table.cells[0][0].startswith("task-tuning")
    assert "over 2 seeds (Student's t), the held-out problems are the same in all" in table.title


def test_a_method_that_beats_gapg_elsewhere_is_named_with_where(runs: Callable[..., list[Finished]]) -> None:
    """GAPG wastes its first call on a problem that it solves and the cloud does not, the prompt router no call."""
    finished = runs(20, ours=(9, 0, 1, 2)) + runs(21, ours=(9, 0, 1, 2))
    measured = baselines.measure(finished)
    less = {f: d["+ prompt-only router"] for f, d in measured.differences.items()}
    assert list(less) == [0.1, 0.2, 0.3, 0.5]
    # alone 6 are right; one, two, three calls by the router: 7, 8, 9; by GAPG: 5, 6, 7; at five both lose none or one
    assert [less[f].per_seed for f in (0.1, 0.2, 0.3)] == [pytest.approx((-0.2, -0.2))] * 3
    # the gap is 3 of 10 problems; APGR is the area between the curves over it
    area = [float(np.mean([curve(m.routed).at(c) for c in np.linspace(0, 1, 10001)])) for name in
            ("GAPG", "+ prompt-only router") for m in measured.methods[name][:1]]  # fmt: skip
    assert measured.apgr["+ prompt-only router"].mean == pytest.approx((area[0] - area[1]) / 0.3, abs=1e-3)
    said = baselines.conclusions(measured)[1]
    assert "prompt-only router at 10% called (-20.0 (-20.0 to -20.0) points), at 20% called (" in said
    assert "and in APGR (" in said and said.startswith("GAPG is worse than ")
    assert "DA-GRPO" not in said
    row = cells(baselines.differences_table(measured), "+ prompt-only router")
    assert row[1] == "-20.0 (-20.0 to -20.0)" and len(row) == 6
    kept = [c for c in baselines.analyse(finished).comparisons if c["b"] == "+ prompt-only router"]
    assert [c.get("cloud_fraction", c.get("figure")) for c in kept] == [0.1, 0.2, 0.3, 0.5, "apgr"]


def test_how_often_the_better_ones_call_is_said(runs: Callable[..., list[Finished]]) -> None:
    """All others ask for 9, 8, 7; where GAPG asks for 9 and then for what it solves it is worse than their second."""
    finished = runs(20, ours=(9, 4, 5, 6, 7, 8)) + runs(21, ours=(9, 4, 5, 6, 7, 8))
    measured = baselines.measure(finished)
    better = replace(measured.methods["GAPG"][0].routed, score=-np.arange(10.0))
    measured.methods["DA-GRPO"][:] = [replace(m, routed=better) for m in measured.methods["DA-GRPO"]]
    measured = replace(measured, differences={0.3: baselines.at_fraction(measured.methods, 0.3)})
    said = baselines.beaten(measured)
    assert "DA-GRPO at 30% called" in said
    assert "; as trained GAPG calls 20.0%, " in said
    assert "DA-GRPO 20.0%" in said


def test_thresholds_come_from_calibration_problems(runs: Callable[..., list[Finished]]) -> None:
    finished = runs(20)
    found = {m.name: m for m in baselines.seed_methods({f.unit.label: f for f in finished}, set())}
    result = found["+ prompt-only router"].at_threshold(0.3)
    assert result is not None
    assert result.called == [True] * 3 + [False] * 7
    # where the calibration problems score two ranks higher, two problems fewer are called
    found["+ prompt-only router"].calibration[:] += 2  # type: ignore[index]
    result = found["+ prompt-only router"].at_threshold(0.3)
    assert result is not None
    assert result.called == [True] + [False] * 9
    assert found["+ random offloading"].at_threshold(0.3) is None
    # no order among equal log-probs: of no call and all calls no call is nearer to three
    assert found["+ mean log-prob"].at_threshold(0.3).called == [False] * N  # type: ignore[union-attr]
    table = baselines.operating_points(baselines.measure(finished))
    assert cells(table, "GAPG")[1:] == ["30.0%", "30.0%", "90.0%", "20.0%", "20.0%", "70.0%"]
    assert cells(table, "+ random offloading")[1:] == ["–"] * 6


def test_gap_and_money(runs: Callable[..., list[Finished]]) -> None:
    measured = baselines.measure(runs(20))
    # 60% alone, 90% the cloud: 20, 50, 80% of the gap are 0.6, 1.5 and 2.4 more right answers, one a call
    assert cells(baselines.gap_table(measured), "GAPG")[3:] == ["6.0%", "15.0%", "24.0%"]
    assert cells(baselines.gap_table(measured), "+ random offloading")[2:] == ["0.500", "20.0%", "50.0%", "80.0%"]
    assert measured.prices.call == 1 and measured.prices.local == 0.01
    ours, chance, votes = (
        next(m for m in measured.methods[name]) for name in ("GAPG", "+ random offloading", "+ self-consistency of 5")
    )
    # 0.11 buys a local response and a tenth of the calls
    assert baselines.accuracy_for_money(ours, 0.11, measured) == pytest.approx(0.7)
    # what is called needs no local response: 0.01 (1 - f) + f = 0.1
    assert baselines.accuracy_for_money(chance, 0.1, measured) == pytest.approx(0.6 + 0.3 * 0.09 / 0.99)
    assert baselines.accuracy_for_money(votes, 0.04, measured) is None, "five responses cost more"
    assert baselines.accuracy_for_money(votes, 0.05, measured) == pytest.approx(0.6)
    # at the money, not at the best point below it: the last call loses the right answer to problem 9
    assert baselines.accuracy_for_money(ours, 1.01, measured) == pytest.approx(0.9)
    table = baselines.money_table(measured)
    assert cells(table, "task-tuning only")[1:] == ["60.0%"] * 4
    assert cells(table, "cloud only")[1:] == ["–", "–", "–", "90.0%"]


def test_the_devices_share_of_a_call_comes_from_the_config(runs: Callable[..., list[Finished]], tmp_path: Path) -> None:
    at = [place(units.gapg(20), "quickstart", {"oracle.local_share": x}, tmp_path).folder for x in ("0.01", "0.2")]
    assert at[0] == at[1], "it is the same run"
    dear = [
        Finished(f.unit, f.folder, load_config("quickstart", {**f.unit.overrides, "oracle.local_share": "0.2"}))
        for f in runs(20)
    ]
    found = prices(dear)
    assert (found.local, found.call) == (0.2, 1.0)
    assert "taken to cost 0.2 of it" in found.text
    # a fifth of a call buys the device's answers to all problems, and less buys nobody's
    table = baselines.money_table(baselines.measure(dear))
    assert cells(table, "task-tuning only")[1:] == ["–", "60.0%", "60.0%", "60.0%"]
    assert cells(table, "GAPG")[1:3] == ["–", "70.0%"]


def test_the_report_says_who_wins(runs: Callable[..., list[Finished]], tmp_path: Path) -> None:
    finished = runs(20) + runs(21)
    report = baselines.analyse(finished)
    first, second, third = report.conclusions
    assert first.startswith("With 30% of the problems called GAPG is right on 90.0% of them, more than")
    assert "DA-GRPO +40.0 points (2 of 2 seeds)" in first
    assert "random offloading +21.0 points (2 of 2 seeds)" in first
    assert "no difference is shown there from prompt-only router (+0.0 (+0.0 to +0.0))" in first
    assert second == "Nothing here is shown to be better than GAPG at 10%, 20%, 30% and 50% called, nor in APGR."
    assert "lambda starts at alpha_a - alpha_c = 0.6" in third
    others = len({c["b"] for c in report.comparisons})
    assert len({(r["method"], r["seed"]) for r in report.rows}) == len(report.rows) == 2 * (others + 3)
    ours = next(r for r in report.rows if r["method"] == "GAPG" and r["seed"] == 20)
    assert ours["calls_for_50"] == pytest.approx(0.15)
    assert ours["trained_called"] == 0.2
    figure = Figure(layout="constrained")
    report.draw(figure)
    figure.savefig(tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 20_000


def test_one_seed_has_an_interval_too(runs: Callable[..., list[Finished]]) -> None:
    d = baselines.measure(runs(20)).differences[0.3]["DA-GRPO"]
    assert d.low < d.mean < d.high


def test_wording() -> None:
    assert points(-0.0004) == "+0.0"
    assert interval(Difference(0.051, 0.04, 0.0624, (0.051,), 1)) == "+5.1 (+4.0 to +6.2)"
    zero = Difference(0.0, 0.0, 0.0, (0.0,), 0)
    lose, tie, win = sides([("a", Difference(1, 0.5, 2, (), 0)), ("b", zero), ("c", Difference(-1, -2, -0.5, (), 0))])
    assert (lose, tie, win) == (["a"], ["b"], ["c"])


def test_a_method_that_is_never_reachable_calls_nothing() -> None:
    routed = baselines.routed(
        "never",
        [{"outcome": "local_correct", "oracle_score": 1.0}] * 3,
        np.full(3, -math.inf),
    )
    result = Method("never", 0, routed, calibration=np.full(3, -math.inf)).at_threshold(0.3)
    assert result is not None
    assert result.called == [False] * 3
