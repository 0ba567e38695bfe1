"""The control's kernels in the interpreter: a plain GEMM's logits, read once and turned into odds."""

from __future__ import annotations

import pytest

from gapg_kernels import reference
from tests.kernels.odds_checks import (
    CASES,
    Case,
    check_against_float64,
    check_against_the_reference,
    check_options,
    inputs_of,
    interpreted_cases,
    logit_rounding,
    temperature_matters,
)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    return interpreted_cases(tmp_path_factory.mktemp("interpreted") / "pass.pt")


@pytest.mark.parametrize("name", CASES)
def test_the_pass_against_float64(interpreted: dict[str, Case], name: str) -> None:
    check_against_float64(interpreted[name])


@pytest.mark.parametrize("name", CASES)
def test_the_pass_against_the_reference(interpreted: dict[str, Case], name: str) -> None:
    check_against_the_reference(interpreted[name])


@pytest.mark.parametrize("name", CASES)
def test_padding_is_not_written_and_options_change_nothing_else(interpreted: dict[str, Case], name: str) -> None:
    """The GEMM may take another order for other shapes, so a row agrees with its other batch to rounding only."""
    case = interpreted[name]
    check_options(case, rtol=1e-5 + logit_rounding(inputs_of(case)))


def test_verl_2656_no_phantom_vocabulary_in_the_last_block(interpreted: dict[str, Case]) -> None:
    case = interpreted["phantom tail of wide tiles"]
    assert 1 < len(case["inputs"]["weight"]) / case["block"] < 2
    check_against_float64(case)


def test_trl_4159_the_temperature_is_in_the_forward_and_in_the_gradient(interpreted: dict[str, Case]) -> None:
    for name in ("temperature of 0.3", "temperature of 4"):
        check_against_float64(interpreted[name])
        temperature_matters(interpreted[name])


def test_rows_are_repaired(interpreted: dict[str, Case]) -> None:
    repaired = interpreted["far"]["stored"]["unit"] != reference.UNIT
    assert 2 < repaired.sum() < len(repaired) - 2
