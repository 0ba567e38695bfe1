"""A method that has to be set to a budget, at its best: of several runs the one that does best on validation problems.

The choice is made for each seed and each call fraction apart, by accuracy with exactly that part of the validation
problems called, the cloud's own answers counted. Held-out problems have no say in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from studies.by_problem import VALIDATION, stacked
from studies.statistics import Curve, area, curve

Families = Mapping[str, Sequence[str]]
"""The name of a family -> its members' names, each an arm of the table."""
FINE = np.linspace(0, 1, 101)
"""Call fractions at which a member is chosen."""
Curves = Mapping[str, Curve]
"""By the arm's name."""


def best_members(on_validation: Curves, members: Sequence[str]) -> list[str]:
    """The member chosen at each fraction of `FINE`; of equally good ones the first."""
    accuracy = np.stack([on_validation[name].at(FINE) for name in members])
    return [members[i] for i in accuracy.argmax(0)]


def best_curve(on_validation: Curves, on_heldout: Curves, members: Sequence[str]) -> tuple[Curve, list[str]]:
    """(what the members chosen on the validation problems do on the held-out ones, which they are); at `FINE`."""
    chosen = best_members(on_validation, members)
    accuracy = [on_heldout[name].at(c) for name, c in zip(chosen, FINE, strict=True)]
    return Curve(FINE, np.array(accuracy)), chosen


def one_stacked_member(table: pd.DataFrame, families: Families) -> pd.DataFrame:
    """The table with one stacked score a family: that of the member whose stacked score does best on validation
    problems, by the area under its curve, under the family's name."""
    names = {stacked(member): stacked(family) for family, members in families.items() for member in members}
    others, mine = table[~table["arm"].isin(names)], table[table["arm"].isin(names)]
    kept = [others]
    for _, of_seed in mine.groupby("seed", sort=False):
        for family in dict.fromkeys(names.values()):
            members = of_seed[of_seed["arm"].map(names) == family]
            on_validation = members[members["split"] == VALIDATION].groupby("arm", sort=False)
            areas = {arm: area(curve(part)) for arm, part in on_validation}
            kept.append(members[members["arm"] == max(areas, key=areas.__getitem__)].assign(arm=family))
    return pd.concat(kept, ignore_index=True)
