"""One method beside all others along the whole curve: accuracy at equal calls, over fresh seeds, corrected for looking
often. The figures; `studies.along_the_curve_shown` puts them on paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from studies.arms import Entrant, Finished, Rows
from studies.by_problem import HELDOUT, VALIDATION, Router, collect
from studies.prompt_router import auc
from studies.statistics import (
    Curve,
    Difference,
    at_threshold,
    compare_seeds,
    curve,
    holm,
    measures,
    p_value,
    threshold_for,
)  # fmt: skip
from studies.tuned import FINE, Families, best_curve, one_stacked_member

FRACTIONS = (0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
"""Call fractions at which the methods are compared."""
LANDED = (0.1, 0.3, 0.5)
"""Call fractions that thresholds are set to on the validation problems."""
GRID = np.linspace(0, 1, 21)


@dataclass(frozen=True)
class Contest:
    """Who is compared, said before any run is made."""

    ours: str
    """The method that is compared with each other one."""
    alone: str
    """Whose accuracy without a call, and the cloud's, are the ends of the gap that is recovered."""
    entrants: tuple[Entrant, ...]
    routers: Mapping[str, Mapping[str, Router]]
    """Label of an arm -> routers put on its runs, by name."""
    families: Families
    """Entrants that stand for one method, whose best member is chosen on validation problems."""
    goal: tuple[str, ...]
    """The methods that the goal is about: one family of comparisons for Holm's correction, all others another."""
    ceilings: tuple[str, ...] = ()
    """What no method can reach: shown, and compared with nothing."""
    picked: tuple[str, ...] = ()
    """Methods of the goal that the picture tells apart; the others are there in grey."""

    def collect(self, runs: Sequence[Finished]) -> pd.DataFrame:
        return one_stacked_member(collect(runs, self.entrants, self.routers), self.families)

    def figures(self, table: pd.DataFrame) -> tuple[Rows, list[Difference]]:
        """A row a method and seed; ours less each other method at `FRACTIONS` and in APGR.

        A comparison has the p-value of its t-test, `p`, and `holm`, the same corrected for all of its family at all of
        `FRACTIONS`; those in APGR are not corrected.
        """
        rows = [row for _, of_seed in table.groupby("seed") for row in self._rows_of_seed(of_seed)]
        methods = list(dict.fromkeys(row["method"] for row in rows))
        of = {name: [row for row in rows if row["method"] == name] for name in methods}
        if missing := {self.ours, *self.goal} - of.keys():
            raise ValueError(f"no runs of {', '.join(sorted(missing))}: the goal is about them")
        comparisons: list[Difference] = []
        for name in methods:
            if name in (self.ours, *self.ceilings):
                continue
            about = {"a": self.ours, "b": name, "family": "goal" if name in self.goal else "other"}
            for c in FRACTIONS:
                a, b = ([row["at"][f"{c:g}"] for row in of[which]] for which in (self.ours, name))
                d = compare_seeds(a, b)
                comparisons.append({**about, "cloud_fraction": c, **d, "p": p_value(d["per_seed"])})
            if all(row["apgr"] is not None for row in of[self.ours] + of[name]):
                a, b = ([row["apgr"] for row in of[which]] for which in (self.ours, name))
                comparisons.append({**about, "figure": "apgr", **compare_seeds(a, b)})
        for family in ("goal", "other"):
            mine = [d for d in comparisons if d["family"] == family and "p" in d]
            for d, corrected in zip(mine, holm([d["p"] for d in mine]), strict=True):
                d["holm"] = corrected
        return rows, comparisons

    def _rows_of_seed(self, table: pd.DataFrame) -> Rows:
        parts = {(split, arm): part for (split, arm), part in table.groupby(["split", "arm"], sort=False)}
        curves = {key: curve(part) for key, part in parts.items()}
        valid, held = ({a: c for (s, a), c in curves.items() if s == split} for split in (VALIDATION, HELDOUT))
        members = {member for of_family in self.families.values() for member in of_family}
        alone, rows = float(held[self.alone].accuracy[0]), []
        for name, line in held.items():
            if name not in members:
                about = _of_scores(parts[HELDOUT, name])
                rows.append(_row(name, line, alone, parts, dict.fromkeys(LANDED, name)) | about)
        for family, of_family in self.families.items():
            line, chosen = best_curve(valid, held, of_family)
            at = {c: chosen[int(np.abs(FINE - c).argmin())] for c in (*FRACTIONS, *LANDED)}
            row = _row(family, line, alone, parts, {c: at[c] for c in LANDED})
            trained = {member: _as_trained(parts[HELDOUT, member]) for member in of_family}
            rows.append(row | {"chosen": {f"{c:g}": at[c] for c in FRACTIONS}, "members": trained})
        seed = int(table["seed"].iat[0])
        return [{"method": row["method"], "seed": seed, **row} for row in rows]


def _row(
    name: str, line: Curve, alone: float, parts: Mapping[tuple[str, str], pd.DataFrame], landing: Mapping[float, str]
) -> dict[str, Any]:
    """parts: the problems by split and arm. landing: the arm whose threshold is set to each call fraction."""
    landed = {
        f"{c:g}": at_threshold(parts[HELDOUT, arm], threshold_for(parts[VALIDATION, arm]["score"].to_numpy(), c))
        for c, arm in landing.items()
    }
    return {
        "method": name,
        "problems": len(parts[HELDOUT, landing[LANDED[0]]]),
        "at": {f"{c:g}": float(line.at(c)) for c in (0.0, *FRACTIONS)},
        "curve": [round(float(line.at(c)), 5) for c in GRID],
        **measures(line, alone),
        "landed": landed,
    }


def _of_scores(part: pd.DataFrame) -> dict[str, float]:
    """AUROC of failures by the score; and of a trained model, what it does as trained."""
    return {"auroc": auc(part["score"].to_numpy(), (part["local"] == 0).tolist()), **_as_trained(part)}


def _as_trained(part: pd.DataFrame) -> dict[str, float]:
    if not part["called"].notna().all():
        return {}
    return {"trained_called": float(part["called"].mean()), "trained_accuracy": float(part["correct"].mean())}
