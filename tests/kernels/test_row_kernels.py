"""The launches over rows in the interpreter: the repair of far targets, the softcap, the entropy's gradient."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from gapg_kernels import entropy_gradient, reference, repair
from gapg_kernels.cublas_odds import cublas_odds
from tests.kernels.counting import beyond_torch_2_11, triton_launches
from tests.kernels.float64_capped import capped_truth, entropy_truth
from tests.kernels.float64_oracle import ENTROPIES, Inputs, error
from tests.kernels.odds_checks import Case, in_its_own_process

LADDER = [f"{nats} nats" for nats in ENTROPIES]
TILE = repair.TILES[torch.float32]


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Case]]:
    path = tmp_path_factory.mktemp("interpreted") / "rows.pt"
    in_its_own_process("tests.kernels.interpreted_rows", path, interpret=True)
    found: dict[str, dict[str, Case]] = torch.load(path, weights_only=True)
    return found


def check(case: Case, rows: Tensor | None = None) -> None:
    """Everything a forward leaves, and the gradients made of it, of rows ([T] bool) whose targets are in range."""
    inputs, cap = Inputs(**case["inputs"]), case["softcap"]
    rows = torch.ones(len(inputs.target), dtype=torch.bool) if rows is None else rows
    inputs = inputs._replace(hidden=inputs.hidden[rows], target=inputs.target[rows], grad=inputs.grad[rows])
    got: dict[str, Tensor] = {k: x[rows] for k, x in case.items() if isinstance(x, Tensor)}
    want, e = capped_truth(inputs, cap), got["e"][:, : len(inputs.weight)]
    bias = torch.zeros(1) if inputs.bias is None else inputs.bias[inputs.bias.isfinite()]
    largest = cap or (inputs.hidden @ inputs.weight.t()).abs().max().item() + bias.abs().max().item()
    rounding = 8 * 2**-23 * largest / inputs.temperature
    assert torch.allclose(got["logprob"].double(), want.logprob, rtol=2e-6, atol=1e-6 + rounding)
    assert ((got["entropy"] - want.entropy).abs() <= 1e-6 * (1 + want.gap) + rounding).all()
    far = got["unit"] != reference.UNIT
    assert ((got["entropy"] - want.entropy).abs() <= 1e-6 + rounding)[far].all(), (
        "an entropy of a repaired row is exact"
    )
    at = inputs.target != -100
    assert torch.allclose(got["logit"][at].double(), want.logit[at], rtol=1e-5, atol=1e-5)
    if cap is not None:
        assert torch.allclose(got["slope"][at].double(), want.slope[at], rtol=1e-4, atol=0)
    index, _ = reference.safe_targets(inputs.target, len(inputs.weight))
    assert (e.gather(1, index[:, None]) == 0).all()
    scales = reference.row_scales(
        inputs.grad, got["odds"], got["unit"], inputs.target, inputs.temperature, got.get("slope")
    )
    for mine, exact in (
        (reference.hidden_gradient(e, inputs.weight, index, scales, torch.float32), want.hidden),
        (reference.add_weight_gradient(None, e, inputs.hidden, index, scales), want.weight),
        (reference.add_bias_gradient(None, e, index, scales), want.bias),
    ):
        assert error(mine, exact) < 2e-5 + rounding


@pytest.mark.parametrize("name", LADDER)
def test_repaired_rows_over_the_ladder(interpreted: dict[str, dict[str, Case]], name: str) -> None:
    case = interpreted["ladder"][name]
    assert (case["unit"] != reference.UNIT).all()
    check(case)


@pytest.mark.parametrize("name", ["all", "one", "none", "all by two programs"])
def test_all_rows_one_and_none_are_repaired(interpreted: dict[str, dict[str, Case]], name: str) -> None:
    case = interpreted["far"][name]
    far = case["unit"] != reference.UNIT
    assert torch.equal(far, case["inputs"]["target"] == 7)
    check(case)


def test_a_row_does_not_depend_on_which_others_are_repaired(interpreted: dict[str, dict[str, Case]]) -> None:
    """But for rounding: the machine's BLAS, by which the interpreter multiplies, may add up by the number of rows."""
    cases = interpreted["far"]
    per_row = ("logprob", "odds", "unit", "entropy", "e")
    for name in ("one", "all by two programs"):
        far = cases[name]["inputs"]["target"] == 7
        for key in per_row:
            for rows, alike in ((far, cases["all"]), (~far, cases["none"])):
                assert torch.allclose(cases[name][key][rows], alike[key][rows], rtol=1e-5, atol=1e-6)
    for key in ("logprob", "odds", "unit"):
        assert torch.equal(cases["all, forward only"][key], cases["all"][key])
    assert (cases["all"]["e"][:, 530:] == 7).all() and (cases["all, forward only"]["e"] == 7).all()


def test_masked_rows_and_wrong_targets_are_left_alone(interpreted: dict[str, dict[str, Case]]) -> None:
    case = interpreted["far"]["all but masked and wrong"]
    assert case["logprob"][5] == case["entropy"][5] == case["odds"][5] == 0 and (case["e"][5, :530] == 0).all()
    for key in ("logprob", "odds", "entropy"):
        assert case[key][6:8].isnan().all()
    check(case, torch.tensor([i not in (6, 7) for i in range(40)]))


def test_the_products_are_those_of_the_far_rows_and_no_more(interpreted: dict[str, dict[str, Case]]) -> None:
    """FLOPs of every tl.dot that was executed: two products of the far rows, up to a multiple of the tile's."""
    vocab, width = (math.ceil(n / size) * size for n, size in ((530, TILE.bn), (24, TILE.bk)))

    def products(count: int) -> int:
        return 2 * 2 * math.ceil(count / TILE.bm) * TILE.bm * vocab * width

    cases = interpreted["far"]
    for name, count in (("all", 40), ("all by two programs", 40), ("one", 1), ("none", 0)):
        assert cases[name]["flops"] == products(count), name
    assert cases["all, forward only"]["flops"] == products(40) // 2


@beyond_torch_2_11
def test_without_far_rows_a_few_hundred_blocks_start_and_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """At real sizes, whatever the rows are: the launches cannot know. The meta device would refuse to wait for one."""
    hidden, weight = (torch.empty(n, 2048, dtype=torch.bfloat16, device="meta") for n in (8192, 151_936))
    target, e = torch.empty(8192, dtype=torch.int64, device="meta"), hidden.new_empty(8192, 151_936)
    with triton_launches() as launches:
        cublas_odds(hidden, weight, None, target, 1.0, e)
        stored = len(launches)
        cublas_odds(hidden, weight, None, target, 1.0, None)
    blocks = {x.kernel: math.prod(x.grid) for x in launches[:stored]}
    ours = [name for name in blocks if name.startswith("repair") or name == "which_rows_kernel"]
    assert ours == ["which_rows_kernel", "repair_sums_kernel", "repair_finish_kernel", "repair_store_kernel"]
    assert sum(blocks[name] for name in ours) == 8 + 2 * repair.PROGRAMS + 256
    assert len(launches) == 2 * stored - 1, "forward only there is no E to make again"


def test_the_list_of_far_rows_is_in_order(interpreted: dict[str, dict[str, Case]]) -> None:
    which = interpreted["which"]
    for name in ("scattered", "last", "none"):
        want = (which[name] >= 2.0**60).nonzero()[:, 0].int()
        found: Any = which[f"{name}, found"]
        assert found[0] == len(want) and torch.equal(found[1 : 1 + len(want)], want)
        assert (found[1 + len(want) :] == -1).all()
    assert which["scattered, found"][0] > 200 and which["last, found"][0] == 2


@pytest.mark.parametrize("name", [*LADDER, "hard", "far"])
def test_softcap(interpreted: dict[str, dict[str, Case]], name: str) -> None:
    case = interpreted["softcap"][name]
    check(case)
    inputs = Inputs(**case["inputs"])
    without, far = capped_truth(inputs, None), case["unit"] != reference.UNIT
    if name == "hard":
        assert case["slope"].min() < 1e-3
        assert (case["logprob"] - without.logprob).abs().max() > 0.5
    assert far.sum() == (5 if name == "far" else 0)


def test_softcap_forward_only(interpreted: dict[str, dict[str, Case]]) -> None:
    case = interpreted["softcap"]["forward only"]
    want = capped_truth(Inputs(**case["inputs"]), 5.0)
    assert torch.allclose(case["logprob"].double(), want.logprob, rtol=2e-6, atol=2e-5)
    assert (case["e"] == 7).all()


@pytest.mark.parametrize("name", ["plain", "softcap", "a forbidden target", "a forbidden target, softcap"])
def test_a_bias_of_minus_infinity_takes_a_column_out(interpreted: dict[str, dict[str, Case]], name: str) -> None:
    case = interpreted["masked"][name]
    inputs = Inputs(**case["inputs"])
    assert inputs.bias is not None
    assert (case["e"][:, :300][:, inputs.bias == -torch.inf] == 0).all()
    forbidden = inputs.bias[inputs.target] == -torch.inf
    assert forbidden.sum() == name.startswith("a forbidden target")
    assert (case["logprob"][forbidden] == -torch.inf).all()
    check(case, ~forbidden)


@pytest.mark.parametrize("name", LADDER)
def test_the_gradient_of_the_entropy(interpreted: dict[str, dict[str, Case]], name: str) -> None:
    """G_j = p_j (c + k (log p_j + H)) against autograd in float64, to the rounding of its terms; and the plain one."""
    case = interpreted["entropy"][name]
    inputs, k = Inputs(**case["inputs"]), case["grad_entropy"]
    vocab = len(inputs.weight)
    got, want = case["out"][:, :vocab].double(), -entropy_truth(inputs, k) / inputs.temperature
    column = torch.where(inputs.target == -100, 0, inputs.target)[:, None]
    logits = (inputs.hidden.double() @ inputs.weight.double().t() + inputs.bias) / inputs.temperature
    logp = logits.log_softmax(1)
    c, by_h, entropy = (x[:, None].double() for x in (inputs.grad, k, case["rest"][3]))
    terms = logp.exp() * (c.abs() + by_h.abs() * (logp.abs() + entropy)) / inputs.temperature
    off = (got - want).scatter(1, column, 0.0).abs()
    assert (off <= 3e-6 * terms * (1 + logits.abs().max()) + 1e-15).all()
    assert (got.gather(1, column) == 0).all() and (got[3] == 0).all()
    assert torch.equal(case["in place"][:, :vocab].double(), got)
    assert (case["in place"][:, vocab:] == 7).all() and (case["out"][:, vocab:] == 5).all()
    plain = torch.empty_like(case["narrow"])
    reference.plain_spread_entropy(case["narrow"], *case["rest"], plain)
    scale = 2**-7 * terms  # the interpreter cuts bfloat16 off where a GPU rounds
    assert ((case["narrow out"].double() - plain.double()).abs() <= scale + 1e-18).all()  # and its subnormals are wrong


@pytest.mark.parametrize("name", LADDER)
def test_the_entropys_gradient_with_the_targets_term(interpreted: dict[str, dict[str, Case]], name: str) -> None:
    """dH from what the kernel wrote and the scales that go with it: the sign and the share of every term."""
    case = interpreted["entropy"][name]
    inputs, k, (c, by_h, total, entropy, _) = Inputs(**case["inputs"]), case["grad_entropy"], case["rest"]
    index, valid = reference.safe_targets(inputs.target, len(inputs.weight))
    share = torch.where(valid, case["logprob"].exp(), 0.0)
    rest = torch.where(valid, -torch.expm1(case["logprob"]), 0.0)
    pull = c * rest - by_h * share * (case["logprob"] + entropy)
    scales = reference.RowScales(-torch.ones_like(pull), pull)
    got = reference.hidden_gradient(case["out"][:, : len(inputs.weight)], inputs.weight, index, scales, torch.float32)
    want = entropy_truth(inputs, k) @ inputs.weight.double() / inputs.temperature
    assert error(got, want) < 2e-5
    assert total.isfinite().all()


@pytest.mark.parametrize("nats", ["0.35", "0.1", "0.0"])
def test_a_nearly_certain_token_that_is_not_the_target(interpreted: dict[str, dict[str, Case]], nats: str) -> None:
    """The entropy's part alone, row by row. The log of a rounded E is off by 2^-9 there, far more than it is itself."""
    case = interpreted["entropy"][f"{nats} nats, aside"]
    inputs, rest = Inputs(**case["inputs"]), case["rest"]
    vocab = len(inputs.weight)
    assert entropy_gradient.CERTAIN == reference.CERTAIN
    want = -entropy_truth(inputs._replace(grad=torch.zeros(12)), case["grad_entropy"]) / inputs.temperature
    want.scatter_(1, torch.where(inputs.target == -100, 0, inputs.target)[:, None], 0.0)
    rows = want.norm(dim=1) > 1e-11  # below, float64 itself has no digits of 1 - p left
    assert rows.sum() >= (1 if nats == "0.0" else 10)
    alone = [torch.zeros(12), *rest[1:]]
    for e, bound in ((case["e"][:, :vocab], 1e-4), (case["narrow"], 2**-7)):
        out = torch.empty_like(e)
        reference.plain_spread_entropy(e, *alone, out)
        assert ((out.double() - want).norm(dim=1) <= bound * want.norm(dim=1))[rows].all()
        by_kernel = case["out, entropy alone" if e.dtype == torch.float32 else "narrow out, entropy alone"]
        assert ((by_kernel.double() - want).norm(dim=1) <= 2 * bound * want.norm(dim=1))[rows].all()
