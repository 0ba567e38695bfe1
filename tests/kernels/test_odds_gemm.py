"""The Triton kernels: their arithmetic in the interpreter, and their machine code for sm_90."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from float64_oracle import ENTROPIES, Inputs, Result, error, truth
from torch import Tensor

from gapg.kernels import definition

ROOT = Path(__file__).parents[2]
CASES = [
    *(f"{nats} nats" for nats in ENTROPIES),
    "vocabulary of one",
    "one row",
    "several tiles",
    "phantom tail",
    "odd targets",
    "far",
]


def in_its_own_process(script: str, argument: Path, *, interpret: bool) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, str(ROOT / script), str(argument)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    path = tmp_path_factory.mktemp("interpreted") / "results.pt"
    in_its_own_process("tests/kernels/interpreted_cases.py", path, interpret=True)
    results: dict[str, dict[str, Any]] = torch.load(path, weights_only=True)
    return results


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("sass")
    in_its_own_process("bench/compile_report.py", folder, interpret=False)
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


def gradients(inputs: Inputs, got: dict[str, Tensor]) -> Result:
    """The backward of the definition on the kernel's own E, S and exp(-b)."""
    vocab = inputs.weight.shape[0]
    index, _ = definition.safe_targets(inputs.target, vocab)
    e = got["e"][:, :vocab]
    scales = definition.row_scales(inputs.grad, got["odds"], got["unit"], inputs.target, inputs.temperature)
    return Result(
        got["logprob"],
        definition.hidden_gradient(e, inputs.weight, index, scales, torch.float32),
        definition.add_weight_gradient(None, e, inputs.hidden, index, scales),
        definition.add_bias_gradient(None, e, index, scales),
    )


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_against_float64(interpreted: dict[str, dict[str, Any]], name: str) -> None:
    inputs = Inputs(**interpreted[name]["inputs"])
    if inputs.bias is None:
        inputs = inputs._replace(bias=torch.zeros(inputs.weight.shape[0]))
    got = interpreted[name]["stored"]
    fine = (inputs.target == -100) | ((inputs.target >= 0) & (inputs.target < inputs.weight.shape[0]))
    assert got["logprob"][~fine].isnan().all()
    inputs = inputs._replace(hidden=inputs.hidden[fine], target=inputs.target[fine], grad=inputs.grad[fine])
    ours = gradients(inputs, {key: value[fine] for key, value in got.items() if value is not None})
    want = truth(inputs)
    assert torch.allclose(ours.logprob.double(), want.logprob, rtol=2e-6, atol=2e-5)
    for mine, exact in zip(ours[1:], want[1:], strict=True):
        # exp2's argument is rounded at the size of the target's logit, about 1e4 in "far"
        assert error(mine, exact) < (2e-3 if name == "far" else 3e-5)


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_against_the_definition(interpreted: dict[str, dict[str, Any]], name: str) -> None:
    inputs, got = Inputs(**interpreted[name]["inputs"]), interpreted[name]["stored"]
    vocab = inputs.weight.shape[0]
    e = torch.empty(inputs.hidden.shape[0], vocab)
    want = definition.plain_odds(
        inputs.hidden, inputs.weight, inputs.bias, inputs.target, inputs.temperature, e
    )  # fmt: skip
    same_shift = (got["unit"] == definition.UNIT) == (want.unit == definition.UNIT)
    assert (~same_shift).sum() <= 1  # S >= 2^60 and gap > 118 ln 2 differ by the sum over V
    assert torch.allclose(got["logprob"], want.logprob, rtol=1e-5, atol=1e-5, equal_nan=True)
    broken = want.logprob.isnan()
    assert got["odds"][broken].isnan().all()
    rows = same_shift & ~broken
    tolerance = 2e-3 if name == "far" else 5e-5  # atol: float32's subnormals, which a GPU flushes
    assert torch.allclose(got["e"][rows, :vocab], e[rows], rtol=tolerance, atol=1e-37)


@pytest.mark.parametrize("name", CASES)
def test_padding_is_not_written_and_the_batch_does_not_matter(
    interpreted: dict[str, dict[str, Any]], name: str
) -> None:
    case = interpreted[name]
    vocab = len(case["inputs"]["weight"])
    assert (case["stored"]["e"][:, vocab:] == 7.0).all()
    assert (case["forward only"]["e"] == 7.0).all()
    for key in ("logprob", "odds", "unit"):
        whole = case["stored"][key]
        assert torch.allclose(case["forward only"][key], whole, rtol=1e-6, atol=0, equal_nan=True)
        assert torch.equal(case["first rows"][key].nan_to_num(), whole[:3].nan_to_num())
    assert torch.equal(case["first rows"]["e"][:, :vocab].nan_to_num(), case["stored"]["e"][:3, :vocab].nan_to_num())


def test_the_cases_reach_past_one_tile(interpreted: dict[str, dict[str, Any]]) -> None:
    assert list(interpreted) == CASES
    shapes = [(len(c["inputs"]["hidden"]), len(c["inputs"]["weight"])) for c in interpreted.values()]
    columns = interpreted["far"]["tile columns"]
    assert any(rows > 256 for rows, _ in shapes)
    assert any(vocab > 2 * columns and vocab % columns for _, vocab in shapes)
    repaired = interpreted["far"]["stored"]["unit"] != definition.UNIT
    assert 0 < repaired.sum() < len(repaired)


def test_machine_code_for_sm_90(compiled: dict[str, dict[str, Any]]) -> None:
    assert {"odds_gemm", "odds_gemm_store", "target_logit", "row_sum", "repair"} <= compiled.keys()
    for name, figures in compiled.items():
        assert figures["spill_store_bytes"] == figures["spill_load_bytes"] == figures["stack_bytes"] == 0, name
        assert figures["local_memory"] == 0, name
        assert figures["arithmetic_atomics"] == 0, name
        assert figures["shared_bytes"] <= 232_448, name
        if name.startswith("odds_gemm"):
            assert figures["hgmma"] > 0 and figures["tma_loads"] > 0, name
            assert (figures["tma_stores"] > 0) == ("store" in name), name


def test_the_committed_figures_are_of_these_kernels(compiled: dict[str, dict[str, Any]]) -> None:
    """Another triton makes other code; the same one must reproduce the record: `python bench/compile_report.py`."""
    committed = {p.stem: json.loads(p.read_text()) for p in (ROOT / "bench/results/sass").glob("*.json")}
    assert committed.keys() == compiled.keys()
    for name, figures in compiled.items():
        if committed[name]["triton"] == figures["triton"]:
            assert committed[name] == figures
