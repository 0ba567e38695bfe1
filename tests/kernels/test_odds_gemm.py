"""The fused GEMM's kernels: their arithmetic in the interpreter, and the machine code of all kernels for every card."""

from __future__ import annotations

import importlib.metadata
import json
from typing import Any

import pytest
import torch

from compile_report import CARDS, RESERVED, kernels, sources
from gapg_kernels import odds_gemm, reference, repair, row_kernels
from gapg_kernels.tiles import HOPPER, TILES, tile_for
from tests.kernels.odds_checks import (
    CASES,
    ROOT,
    SOFTCAP_CASES,
    Case,
    check_against_float64,
    check_against_the_reference,
    check_options,
    check_softcap,
    check_tiles_agree,
    in_its_own_process,
    inputs_of,
    interpreted_cases,
    temperature_matters,
)

COMMITTED = {path.stem: json.loads(path.read_text()) for path in (ROOT / "bench/results/sass").glob("*.json")}
INSTALLED = f"triton-{importlib.metadata.version('triton')}"


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    return interpreted_cases(tmp_path_factory.mktemp("interpreted") / "gemm.pt")


@pytest.fixture(scope="module")
def softcapped(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    return interpreted_cases(tmp_path_factory.mktemp("interpreted") / "softcap.pt", SOFTCAP_CASES)


SAMPLE = (
    "odds_gemm_pair_store_entropy_bias", "odds_gemm_wide_store_softcap", "policy_loss_every_option",
    "repair_sums_entropy_bias_softcap", "spread_entropy", "sm_80 odds_gemm_wide_store_entropy_bias_softcap",
    "sm_100 odds_gemm_wide_store_entropy_bias", "sm_120 odds_pass_store_entropy_bias_softcap",
)  # fmt: skip
"""Of a triton on record: what is compiled again, to see that it still makes that code. All of it takes a minute."""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """The installed triton's code, made now: the sample where it is on record, everything where it is not."""
    path = tmp_path_factory.mktemp("sass") / "figures.json"
    names = SAMPLE if INSTALLED in COMMITTED else [kernel.name for kernel in kernels()]
    path.write_text(json.dumps(names))
    in_its_own_process("tests.kernels.compiled_kernels", path, interpret=False)
    figures: dict[str, Case] = json.loads(path.read_text())
    assert figures.keys() == set(names)
    return figures


NEW = [] if INSTALLED in COMMITTED else [pytest.param(INSTALLED, marks=pytest.mark.slow)]


@pytest.fixture(params=[*sorted(COMMITTED), *NEW])
def figures(request: pytest.FixtureRequest) -> dict[str, Case]:
    """Of every triton on record, and of the installed one."""
    found = COMMITTED.get(request.param) or request.getfixturevalue("compiled")
    return {name: kernel for name, kernel in found.items() if name != "sources"}


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_against_float64(interpreted: dict[str, Case], name: str) -> None:
    check_against_float64(interpreted[name])


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_against_the_reference(interpreted: dict[str, Case], name: str) -> None:
    check_against_the_reference(interpreted[name])


@pytest.mark.parametrize("name", CASES)
def test_every_tile_gives_the_same(interpreted: dict[str, Case], name: str) -> None:
    """Those that TMA moves, and one that threads move."""
    case = interpreted[name]
    assert case["others"].keys() == {"sm_80", "sm_90 narrow" if case["tile"]["bn"] == 256 else "sm_90 wide"}
    for other in case["others"].values():
        check_against_float64(case | {"stored": other})
        check_tiles_agree(case, case["stored"], other)


@pytest.mark.parametrize("name", CASES)
def test_padding_is_not_written_and_the_batch_does_not_matter(interpreted: dict[str, Case], name: str) -> None:
    check_options(interpreted[name], rtol=0.0)


@pytest.mark.parametrize("name", SOFTCAP_CASES)
def test_a_softcap_against_float64_with_every_tile(softcapped: dict[str, Case], name: str) -> None:
    case = softcapped[name]
    vocab = len(case["inputs"]["weight"])
    first, *others = case["stored"].values()
    assert len(others) == (1 if "nats" in name else 2)
    check_softcap(case, first)
    for other in others:
        check_softcap(case, other)
        check_tiles_agree(case, first, other)
    assert (first["e"][:, vocab:] == 7.0).all()
    for alone in case["forward only"].values():
        assert torch.equal(alone["logprob"], case["stored"]["sm_90 narrow"]["logprob"]) and (alone["e"] == 7.0).all()
        assert torch.equal(alone["slope"], first["slope"])


def test_the_softcaps_cases_are_what_they_are_called(softcapped: dict[str, Case]) -> None:
    slope, vocab = (
        softcapped["saturated"]["stored"]["sm_90 wide"]["slope"],
        len(softcapped["saturated"]["inputs"]["weight"]),
    )
    assert slope.min() < 1e-4 and vocab % 16
    bias, e = (
        softcapped["forbidden tokens"]["inputs"]["bias"],
        softcapped["forbidden tokens"]["stored"]["sm_90 wide"]["e"],
    )
    assert (bias == -torch.inf).sum() > 100 and (e[:, :vocab][:, bias == -torch.inf] == 0).all()
    case = softcapped["phantom tail"]
    inputs = inputs_of(case)
    capped = case["cap"] * ((inputs.hidden @ inputs.weight.t() + inputs.bias) / case["cap"]).tanh()
    assert ((capped / inputs.temperature).logsumexp(1) < -10).all()


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
    biased = [case for case in interpreted.values() if case["inputs"]["bias"] is not None]
    assert any(case["inputs"]["hidden"].shape[1] > case["tile"]["bk"] for case in biased)
    repaired = interpreted["far"]["stored"]["unit"] != reference.UNIT
    assert 2 < repaired.sum() < len(repaired) - 2
    assert torch.equal(repaired, repaired.sort().values)  # the gaps of that case grow


def test_every_variant_is_compiled(figures: dict[str, Case]) -> None:
    """For sm_90; for the other cards the largest of each kernel, the GEMM's without a softcap and for an odd V too."""
    variants = {f"odds_gemm_{tile}{store}{entropy}{bias}" for tile in HOPPER
                for store in ("", "_store") for entropy in ("", "_entropy") for bias in ("", "_bias")}  # fmt: skip
    variants |= {f"odds_gemm_{tile}{rest}" for tile in HOPPER for rest in (
        "_softcap", "_store_softcap", "_store_entropy_bias_softcap", "_store_bias_float32_odd_vocab"
    )}  # fmt: skip
    others = {"target_logit", "row_sum", "row_sum_entropy", "odds_pass", "odds_pass_store", "policy_loss"}
    others |= {"repair_sums", "repair_store", "which_rows", "repair_finish", "spread_entropy", "spread_entropy_float32"}
    everything = {
        "target_logit_softcap", "row_sum_entropy", "policy_loss_every_option", "add_statistics", "which_rows",
        "odds_pass_store_entropy_bias_softcap", "repair_sums_entropy_bias_softcap", "spread_entropy",
    }  # fmt: skip
    for major, minor in TILES.keys() - {(9, 0)}:
        card = f"sm_{major}{minor}"
        largest = ("store_entropy_bias", "store_entropy_bias_softcap", "store_bias_float32_odd_vocab")
        tiles = {f"odds_gemm_{tile}_{rest}" for tile in TILES[major, minor] for rest in largest}
        others |= {f"{card} {name}" for name in tiles | everything}
    assert variants | others <= figures.keys()


def test_machine_code(figures: dict[str, Case]) -> None:
    for name, kernel in figures.items():
        assert kernel["spill_store_bytes"] == kernel["spill_load_bytes"] == kernel["stack_bytes"] == 0, name
        assert kernel["local_memory"] == 0, name
        assert kernel["arithmetic_atomics"] == 0, name
        assert kernel["shared_bytes"] <= CARDS[card_of(name)].shared - RESERVED, name
        assert kernel["registers"] <= 255, name
        assert not kernel["wgmma_serialized"], name
        if "odds_gemm" in name:
            major, minor = card_of(name)
            tma = tile_for(10**5, (major, minor)).tma
            assert kernel["tensor_core"] >= kernel["tensor_core_in_loop"] > 0, name
            # On sm_100 the products of the first step are issued before the loop.
            assert major == 10 or kernel["tensor_core"] == kernel["tensor_core_in_loop"], name
            assert (kernel["tma_loads"] > 0) == tma and (kernel["async_copies"] > 0) != tma, name
            assert (kernel["tma_stores"] > 0) == (tma and "store" in name), name


def card_of(name: str) -> tuple[int, int]:
    """The card a kernel of this name is compiled for."""
    card = name.partition(" ")[0].removeprefix("sm_")
    return (int(card[:-1]), int(card[-1])) if " " in name else (9, 0)


@pytest.mark.parametrize("tile", HOPPER)
def test_a_multiprocessor_holds_the_tiles_programs(figures: dict[str, Case], tile: str) -> None:
    """65,536 registers and 228 KiB, of which the system takes 1 KiB a program, are shared by those that run there."""
    threads, programs = 32 * HOPPER[tile].warps, HOPPER[tile].programs
    for name, kernel in figures.items():
        if name.startswith(f"odds_gemm_{tile}"):
            assert programs * threads * kernel["registers"] <= 65_536, name
            assert programs * (kernel["shared_bytes"] + 1024) <= 228 * 1024, name
            assert kernel["programs_per_multiprocessor"] == programs, name


@pytest.mark.parametrize("tile", HOPPER)
def test_an_exponential_an_element_and_no_more(figures: dict[str, Case], tile: str) -> None:
    """The epilogue's floor is the exponential unit: each thread its share of a tile, twice with a softcap."""
    share = HOPPER[tile].bm * HOPPER[tile].bn // (32 * HOPPER[tile].warps)
    for name, kernel in figures.items():
        if name.startswith(f"odds_gemm_{tile}"):
            assert kernel["exponentials"] == share * (2 if "softcap" in name else 1), name
            assert 4 * share < kernel["epilogue_instructions"] < kernel["instructions"], name


@pytest.mark.parametrize("version", sorted({"triton-3.6.0", "triton-3.7.1", *COMMITTED}))
def test_the_committed_figures_are_of_these_kernels(version: str) -> None:
    """Also those of a triton that is not installed. Made anew by `python bench/compile_report.py`, with each."""
    assert COMMITTED[version]["sources"] == sources()
    assert COMMITTED[version].keys() == {"sources", *(kernel.name for kernel in kernels())}


@pytest.mark.slow
def test_the_installed_triton_makes_the_committed_figures(compiled: dict[str, Case]) -> None:
    committed = COMMITTED.get(INSTALLED, compiled)
    assert {name: committed[name] for name in compiled} == compiled


def test_a_kernels_text_and_its_tiles_are_in_the_hash_and_the_lines_above_it_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before, kernel = sources(), odds_gemm.odds_gemm_kernel
    monkeypatch.setattr(kernel, "starting_line_number", kernel.starting_line_number + 3)
    assert sources() == before
    monkeypatch.setattr(kernel, "_src", kernel.src.replace("step + 1", "step + 2"))
    monkeypatch.setitem(TILES[9, 0], "pair", HOPPER["pair"]._replace(stages=2))
    changed = {name for name, value in sources().items() if value != before[name]}
    assert changed == {"gapg_kernels.odds_gemm.odds_gemm_kernel", "launches"}


@pytest.mark.parametrize(
    "kernel",
    [
        row_kernels.row_sum_kernel,
        odds_gemm.odds_gemm_kernel,
        repair.which_rows_kernel,
        repair.repair_sums_kernel,
        repair.repair_finish_kernel,
    ],
    ids=str,
)
def test_the_number_of_rows_never_chooses_the_order_of_a_rows_sums(kernel: Any) -> None:
    """Triton lays the sums of a tile out anew where C is 1 or a multiple of 16, unless it is told not to look at C."""
    (rows,) = [argument for argument in kernel.params if argument.name == "C"]
    assert rows.do_not_specialize
