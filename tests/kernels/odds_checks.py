"""What the tests of the two GPU routes to the odds share: running scripts, and holding their results to float64."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gapg_kernels import reference
from tests.kernels.float64_capped import capped_truth
from tests.kernels.float64_entropy import entropies, gaps
from tests.kernels.float64_oracle import ENTROPIES, Inputs, Result, error, truth

ROOT = Path(__file__).parents[2]
CASES = [
    *(f"{nats} nats" for nats in ENTROPIES),
    "vocabulary of one",
    "one row",
    "several narrow tiles",
    "several wide tiles",
    "targets at the ends of narrow tiles",
    "targets at the ends of wide tiles",
    "phantom tail",
    "phantom tail without a bias",
    "phantom tail of wide tiles",
    "odd targets",
    "all masked",
    "temperature of 0.3",
    "temperature of 4",
    "lifted by 250",
    "lifted by 10,000",
    "huge logits",
    "forbidden tokens",
    "every token twice",
    "far",
]
SOFTCAP_CASES = [*(f"{nats} nats" for nats in ENTROPIES), "saturated", "forbidden tokens", "phantom tail"]
Case = dict[str, Any]


def in_its_own_process(module: str, argument: Path | str, *, interpret: bool) -> None:
    """Runs `python -m module argument` with the helpers here, and the scripts of bench/, in its reach."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "bench"), environment.get("PYTHONPATH", "")])
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", module, str(argument)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def interpreted_cases(path: Path, names: list[str] = CASES) -> dict[str, Case]:
    """Every case through the interpreter, by the route that the file is named after."""
    in_its_own_process("tests.kernels.interpreted_cases", path, interpret=True)
    results: dict[str, Case] = torch.load(path, weights_only=True)
    assert list(results) == names
    return results


def inputs_of(case: Case) -> Inputs:
    """The case's inputs, with a bias of 0 for none, so that dbias can be compared."""
    inputs = Inputs(**case["inputs"])
    return inputs if inputs.bias is not None else inputs._replace(bias=torch.zeros(len(inputs.weight)))


def logit_rounding(inputs: Inputs) -> float:
    """What 8 units in the last place of the largest float32 logit come to: no kernel can know its logits better."""
    assert inputs.bias is not None
    logits = inputs.hidden.double() @ inputs.weight.double().t() + inputs.bias.double()
    return 8 * 2**-23 * logits[logits.isfinite()].abs().max().item() / inputs.temperature


def gradients(inputs: Inputs, got: dict[str, Tensor]) -> Result:
    """The backward of the reference on the kernel's own E, S and exp(-b)."""
    vocab = inputs.weight.shape[0]
    index, _ = reference.safe_targets(inputs.target, vocab)
    e = got["e"][:, :vocab]
    scales = reference.row_scales(
        inputs.grad, got["odds"], got["unit"], inputs.target, inputs.temperature, got.get("slope")
    )
    return Result(
        got["logprob"],
        reference.hidden_gradient(e, inputs.weight, index, scales, torch.float32),
        reference.add_weight_gradient(None, e, inputs.hidden, index, scales),
        reference.add_bias_gradient(None, e, index, scales),
    )


def check_against_float64(case: Case) -> None:
    """Log-probs, entropies and gradients; NaN exactly where the target is out of range."""
    inputs, got = inputs_of(case), case["stored"]
    fine = (inputs.target == -100) | ((inputs.target >= 0) & (inputs.target < inputs.weight.shape[0]))
    assert got["logprob"][~fine].isnan().all() and got["entropy"][~fine].isnan().all()
    inputs = inputs._replace(hidden=inputs.hidden[fine], target=inputs.target[fine], grad=inputs.grad[fine])
    rounding = logit_rounding(inputs)
    ours, want = gradients(inputs, {key: value[fine] for key, value in got.items()}), truth(inputs)
    assert torch.allclose(ours.logprob.double(), want.logprob, rtol=2e-6, atol=1e-6 + rounding)
    for mine, exact in zip(ours[1:], want[1:], strict=True):
        assert error(mine, exact) < 1e-5 + rounding
    entropy, gap = entropies(inputs), gaps(inputs)
    assert ((got["entropy"][fine] - entropy).abs() <= 1e-6 * (1 + gap) + rounding).all()
    assert (got["entropy"][fine] >= 0).all()
    best = gap == 0  # then both terms have one sign, and an entropy is right down to e^-47
    assert torch.allclose(got["entropy"][fine][best].double(), entropy[best], rtol=1e-5 + rounding, atol=1e-18)


def check_softcap(case: Case, got: dict[str, Tensor]) -> None:
    """What a forward with a softcap leaves, and the gradients made of it."""
    inputs = inputs_of(case)
    want, rounding = capped_truth(inputs, case["cap"]), 8 * 2**-23 * case["cap"] / inputs.temperature
    assert torch.allclose(got["logprob"].double(), want.logprob, rtol=2e-6, atol=1e-6 + rounding)
    assert ((got["entropy"] - want.entropy).abs() <= 1e-6 * (1 + want.gap) + rounding).all()
    assert torch.allclose(got["logit"].double(), want.logit, rtol=1e-5, atol=1e-5)
    assert torch.allclose(got["slope"].double(), want.slope, rtol=1e-4, atol=0.0)
    ours = gradients(inputs, got)
    for mine, exact in ((ours.hidden, want.hidden), (ours.weight, want.weight), (ours.bias, want.bias)):
        assert error(mine, exact) < 2e-5 + rounding


def check_against_the_reference(case: Case) -> None:
    """E and the row sums of plain PyTorch, except where the two judge differently that a row needs its own b."""
    inputs, got = Inputs(**case["inputs"]), case["stored"]
    vocab = inputs.weight.shape[0]
    e = torch.empty(inputs.hidden.shape[0], vocab)
    want = reference.plain_odds(*inputs[:2], inputs.bias, inputs.target, inputs.temperature, e, entropy=True)
    same_shift = (got["unit"] == reference.UNIT) == (want.unit == reference.UNIT)
    assert (~same_shift).sum() <= 1  # S >= 2^60 and gap > 118 ln 2 differ by the sum over V
    rounding = 1e-5 + logit_rounding(inputs_of(case))
    broken = want.logprob.isnan()
    for mine, exact in ((got["logprob"], want.logprob), (got["entropy"], want.entropy)):
        assert exact is not None
        assert torch.allclose(mine, exact, rtol=1e-5, atol=rounding, equal_nan=True)
    assert got["odds"][broken].isnan().all()
    rows = same_shift & ~broken
    # atol: float32's subnormals, which a GPU flushes, and what exp(l - max) flushes first in the reference
    assert torch.allclose(got["e"][rows, :vocab], e[rows], rtol=1e-5 + rounding, atol=1e-37)


def check_options(case: Case, *, rtol: float) -> None:
    """Options change nothing but what is asked for; padding is not written; a row hardly depends on its batch."""
    vocab, whole = len(case["inputs"]["weight"]), case["stored"]
    assert (whole["e"][:, vocab:] == 7.0).all()
    assert (case["forward only"]["e"] == 7.0).all() and (case["first rows, forward only"]["e"] == 7.0).all()
    assert "entropy" not in case["forward only"] and "entropy" not in case["first rows"]
    for run in ("forward only", "first rows", "first rows, forward only"):
        for key in case[run].keys() - {"e"}:
            got = case[run][key]
            assert torch.allclose(got, whole[key][: len(got)], rtol=rtol, atol=rtol, equal_nan=True)
    first = case["first rows"]["e"][:, :vocab]
    assert torch.allclose(first, whole["e"][:3, :vocab], rtol=rtol, atol=1e-37 if rtol else 0.0, equal_nan=True)


def check_tiles_agree(case: Case, one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """E to the rounding of its logits: every tile goes through H in the same steps, but in the interpreter a step is a
    product of the machine's BLAS, which may add up by the block's shape. S is added up in another order: its terms are
    positive and every one passes through fewer than 100 additions, each off by at most half a unit, so that two sums
    wander about 100^(1/2) * 2^-24 apart, 6e-7 of either. Log-probs follow S; entropies have float64 to follow."""
    rounding = 1e-5 + logit_rounding(inputs_of(case))
    assert torch.allclose(one["e"], other["e"], rtol=rounding, atol=1e-37, equal_nan=True)
    assert torch.equal(one["unit"], other["unit"])
    assert torch.allclose(one["odds"], other["odds"], rtol=rounding, atol=0.0, equal_nan=True)
    assert torch.allclose(one["logprob"], other["logprob"], rtol=1e-6, atol=rounding, equal_nan=True)


def temperature_matters(case: Case) -> None:
    """The truth without the temperature is far away: a kernel that forgot it could not pass."""
    inputs = inputs_of(case)
    wrong = truth(inputs._replace(temperature=1.0))
    assert (case["stored"]["logprob"] - wrong.logprob).abs().max() > 0.5
    assert error(gradients(inputs, case["stored"]).hidden, wrong.hidden) > 0.1
