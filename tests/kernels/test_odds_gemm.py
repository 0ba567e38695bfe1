"""The fused GEMM's kernels: their arithmetic in the interpreter, and the machine code of all kernels for sm_90."""

from __future__ import annotations

import json

import pytest
import torch
from odds_checks import (
    CASES,
    ROOT,
    Case,
    check_against_float64,
    check_against_the_definition,
    check_options,
    in_its_own_process,
    inputs_of,
    interpreted_cases,
    temperature_matters,
)

from gapg.kernels import definition


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    return interpreted_cases(tmp_path_factory.mktemp("interpreted") / "gemm.pt")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    folder = tmp_path_factory.mktemp("sass")
    in_its_own_process("bench/compile_report.py", folder, interpret=False)
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_against_float64(interpreted: dict[str, Case], name: str) -> None:
    check_against_float64(interpreted[name])


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_against_the_definition(interpreted: dict[str, Case], name: str) -> None:
    check_against_the_definition(interpreted[name])


@pytest.mark.parametrize("name", CASES)
def test_padding_is_not_written_and_the_batch_does_not_matter(interpreted: dict[str, Case], name: str) -> None:
    check_options(interpreted[name], rtol=0.0)


@pytest.mark.parametrize("tail", ["phantom tail", "phantom tail without a bias", "phantom tail of wide tiles"])
def test_verl_2656_no_phantom_vocabulary_in_the_last_tile(interpreted: dict[str, Case], tail: str) -> None:
    """Beyond V the descriptors read zeros: as logits they would carry nearly all of the mass, E' = e^30."""
    case = interpreted[tail]
    inputs, columns = inputs_of(case), case["tile"]["bn"]
    assert len(inputs.weight) % columns
    check_against_float64(case)
    logits = inputs.hidden @ inputs.weight.t() + inputs.bias
    assert (
        logits.logsumexp(1) / inputs.temperature < -10
    ).all()  # so one phantom column would be 20,000 times the rest


def test_liger_sm90_the_target_logit_keeps_more_than_16_bits(interpreted: dict[str, Case]) -> None:
    """At logits of 250, bfloat16 is a unit apart; the kernel's target logit must be as fine as its others."""
    case = interpreted["lifted by 250"]
    check_against_float64(case)
    inputs = inputs_of(case)
    logits = inputs.hidden @ inputs.weight.t() + inputs.bias
    at = logits.gather(1, inputs.target[:, None])
    assert (at - at.bfloat16().float()).abs().max() > 0.1  # what the failure looks like


@pytest.mark.parametrize("name", ["temperature of 0.3", "temperature of 4", "several narrow tiles"])
def test_trl_4159_the_temperature_is_in_the_forward_and_in_the_gradient(
    interpreted: dict[str, Case], name: str
) -> None:
    check_against_float64(interpreted[name])
    temperature_matters(interpreted[name])


def test_the_cases_reach_past_one_tile(interpreted: dict[str, Case]) -> None:
    def tiles(case: Case) -> tuple[float, float]:
        rows, vocab = len(case["inputs"]["hidden"]), len(case["inputs"]["weight"])
        return rows / case["tile"]["bm"], vocab / case["tile"]["bn"]

    for name, columns in (("several narrow tiles", 128), ("several wide tiles", 256)):
        rows, cols = tiles(interpreted[name])
        assert interpreted[name]["tile"]["bn"] == columns
        assert rows > 1 and cols > 2 and cols % 1
    repaired = interpreted["far"]["stored"]["unit"] != definition.UNIT
    assert 2 < repaired.sum() < len(repaired) - 2
    assert torch.equal(repaired, repaired.sort().values)  # the gaps of that case grow


def test_machine_code_for_sm_90(compiled: dict[str, Case]) -> None:
    variants = {f"odds_gemm_{tile}{store}{entropy}{bias}" for tile in ("wide", "narrow")
                for store in ("", "_store") for entropy in ("", "_entropy") for bias in ("", "_bias")}  # fmt: skip
    others = {"target_logit", "row_sum", "row_sum_entropy", "repair", "odds_pass", "odds_pass_store", "policy_loss"}
    assert variants | others <= compiled.keys()
    for name, figures in compiled.items():
        assert figures["spill_store_bytes"] == figures["spill_load_bytes"] == figures["stack_bytes"] == 0, name
        assert figures["local_memory"] == 0, name
        assert figures["arithmetic_atomics"] == 0, name
        assert figures["shared_bytes"] <= 232_448, name
        assert figures["registers"] <= 255, name
        assert not figures["wgmma_serialized"], name
        if name.startswith("odds_gemm"):
            assert figures["hgmma"] == figures["hgmma_in_loop"] > 0 and figures["tma_loads"] > 0, name
            assert (figures["tma_stores"] > 0) == ("store" in name), name


def test_an_exponential_an_element_and_no_more(compiled: dict[str, Case]) -> None:
    """The epilogue's floor is the exponential unit: 256 threads, each its share of a tile; other uses are few."""
    for name, figures in compiled.items():
        if name.startswith("odds_gemm"):
            share = 128 * (256 if "wide" in name else 128) // 256
            assert figures["exponentials"] == share, name


def test_the_committed_figures_are_of_these_kernels(compiled: dict[str, Case]) -> None:
    """Another triton makes other code; the same one must reproduce the record: `python bench/compile_report.py`."""
    committed = {p.stem: json.loads(p.read_text()) for p in (ROOT / "bench/results/sass").glob("*.json")}
    assert committed.keys() == compiled.keys()
    for name, figures in compiled.items():
        if committed[name]["triton"] == figures["triton"]:
            assert committed[name] == figures
