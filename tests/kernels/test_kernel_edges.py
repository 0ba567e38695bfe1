"""Both GPU forwards in the interpreter on tensors as callers have them: strides, odd addresses, E beyond 2^31."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gapg_kernels import reference
from tests.kernels.odds_checks import in_its_own_process

Pair = list[dict[str, Tensor]]
FORWARDS = ["cp.async", "TMA", "cuBLAS"]
CASES = [
    "target and bias with strides",
    "one target for all",
    "an odd address",
    "one row with a stride of 1",
    "one token with a stride of 1",
]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    path = tmp_path_factory.mktemp("interpreted") / "edges.pt"
    in_its_own_process("tests.kernels.interpreted_edges", path, interpret=True)
    found: dict[str, Pair] = torch.load(path, weights_only=True)
    return found


@pytest.mark.parametrize("forward", FORWARDS)
@pytest.mark.parametrize("case", CASES)
def test_how_a_tensor_lies_in_memory_changes_nothing(pairs: dict[str, Pair], case: str, forward: str) -> None:
    plain, other = pairs[f"{case}, {forward}"]
    assert {"logprob", "odds", "unit", "entropy", "e"} <= plain.keys() == other.keys()
    assert plain["logprob"].isfinite().all()
    for name, x in plain.items():  # a product of another stride may be summed in another order
        assert torch.allclose(x, other[name], rtol=1e-5 if forward == "cuBLAS" else 0.0, atol=0.0), name


@pytest.mark.parametrize("forward", FORWARDS)
def test_a_masked_row_is_0_whatever_its_hidden_state(pairs: dict[str, Pair], forward: str) -> None:
    plain, other = pairs[f"a masked row of NaN, {forward}"]
    assert plain["logprob"][2] == 0 and plain["entropy"][2] == 0 and other["e"][2].isnan().any()
    for name in ("logprob", "odds", "unit", "entropy"):
        assert torch.equal(plain[name], other[name]), name


@pytest.mark.parametrize("forward", [*FORWARDS, "entropy's gradient"])
def test_rows_of_e_beyond_2_31_elements(pairs: dict[str, Pair], forward: str) -> None:
    """Elements of E are counted in 64 bits, where a row is stored, repaired, and changed for the entropy's gradient."""
    small, large = pairs[f"beyond 2^31 elements, {forward}"]
    assert (small["e"][128:] != 7.0).all() and torch.equal(small["e"], large["e"])
    if forward in FORWARDS:
        assert (small["unit"] != reference.UNIT).nonzero()[:, 0].tolist() == [29, 129]
        assert torch.equal(small["logprob"], large["logprob"])
