"""Every study by its name."""

from __future__ import annotations

from studies.ablations import DEMONSTRATIONS, FILTER_CONTROLLER, GROUP_SIZE, KL, WRONG_RHO
from studies.baselines import BASELINES
from studies.budgets import BUDGETS
from studies.cloud import COLLAPSE, ORACLE
from studies.report import Study
from studies.shift import SHIFT

STUDIES: dict[str, Study] = {
    study.name: study
    for study in (
        BASELINES,
        BUDGETS,
        WRONG_RHO,
        FILTER_CONTROLLER,
        COLLAPSE,
        GROUP_SIZE,
        DEMONSTRATIONS,
        KL,
        ORACLE,
        SHIFT,
    )
}
