"""Every study by its name: `gapg experiment NAME`."""

from __future__ import annotations

from gapg.studies.ablations import DEMONSTRATIONS, GROUP_SIZE, KL
from gapg.studies.baselines import BASELINES
from gapg.studies.budgets import BUDGETS
from gapg.studies.collapse import COLLAPSE
from gapg.studies.holding import FILTER_CONTROLLER, WRONG_RHO
from gapg.studies.oracle_swap import ORACLE
from gapg.studies.shift import SHIFT
from gapg.studies.study import Study

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
