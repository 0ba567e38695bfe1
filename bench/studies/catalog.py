"""Every study by its name."""

from __future__ import annotations

from studies.ablations import DEMONSTRATIONS, FILTER_CONTROLLER, GROUP_SIZE, KL, WRONG_RHO
from studies.baselines import BASELINES
from studies.budgets import BUDGETS
from studies.cloud import COLLAPSE, ORACLE
from studies.marginal import MARGINAL, MARGINAL_NUMBERS
from studies.marginal_ablation import MARGINAL_ABLATION
from studies.other_tasks import OTHER_TASKS
from studies.report import Study
from studies.shift import SHIFT
from studies.training_cost import TRAINING_COST
from studies.weak_cloud import WEAK_CLOUD
from studies.word_problems import WORD_PROBLEMS

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
        MARGINAL,
        MARGINAL_NUMBERS,
        MARGINAL_ABLATION,
        OTHER_TASKS,
        WEAK_CLOUD,
        TRAINING_COST,
        WORD_PROBLEMS,
    )
}
