"""The policy loss against float64 autograd, its op under compilers, its Triton kernel against the reference."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gapg_kernels.policy_loss import (
    STATS,
    PolicyLossOptions,
    RowLosses,
    group_advantages,
    policy_loss,
    row_losses,
    summarize,
)
from gapg_kernels.policy_loss_reference import Rows, plain_row_losses
from tests.kernels.odds_checks import in_its_own_process
from tests.kernels.policy_loss_oracle import (
    ALL,
    CHOICES,
    DENOMINATOR,
    assert_close,
    call,
    cases,
    edges,
    inputs_for,
    part,
    truth,
)

MODULE = "tests.kernels.interpreted_policy_loss"


@pytest.mark.parametrize("choice", CHOICES, ids=lambda c: " ".join(map(str, c)))
def test_every_option_crossed_against_autograd(choice: tuple[str, str, str, str, bool]) -> None:
    rows, options = inputs_for(choice)
    loss, grad, summary = truth(rows, options)
    got = call(rows, options)
    assert_close(got.loss, loss)
    assert_close(got.grad, grad)
    assert summarize(got.stats) == pytest.approx(summary, rel=1e-5, abs=1e-6)
    assert (summary["clip_low_fraction"] > 0 < summary["clip_high_fraction"]) == (choice[1] == "clip")
    assert (summary["tis_fraction"] > 0) == (choice[2] == "tis")

    logprob = rows.logprob.clone().requires_grad_()
    tensors = rows._replace(logprob=logprob)._asdict()
    whole = policy_loss(**tensors, denominator=DENOMINATOR, options=options)
    (2.5 * whole.loss).backward()
    assert_close(whole.loss.detach(), loss.sum(), rtol=1e-5)
    assert logprob.grad is not None
    assert_close(logprob.grad, 2.5 * grad)
    assert torch.equal(whole.stats, got.stats)


sizes = {"rows": st.integers(1, 60), "groups": st.integers(2, 7), "samples": st.integers(1, 12)}


@given(choice=st.sampled_from(CHOICES), seed=st.integers(0, 10**6), data=st.data(), **sizes)
@settings(max_examples=60)
def test_the_parts_of_a_batch_sum_to_the_whole(
    choice: tuple[str, str, str, str, bool], seed: int, data: st.DataObject, rows: int, groups: int, samples: int
) -> None:
    """Groups may be split over micro-batches in any way, for the table is whole in each."""
    whole, options = inputs_for(choice, rows=rows, groups=groups, samples=samples, seed=seed)
    bins = torch.tensor(data.draw(st.lists(st.integers(0, 2), min_size=rows, max_size=rows)))
    want = call(whole, options)
    got = [call(part(whole, bins == b), options) for b in range(3)]
    order = torch.cat([(bins == b).nonzero().flatten() for b in range(3)])
    assert_close(torch.cat([g.loss for g in got]), want.loss[order])
    assert_close(torch.cat([g.grad for g in got]), want.grad[order])
    assert_close(sum((g.loss.sum() for g in got), torch.zeros(())), want.loss.sum(), atol=1e-6)
    assert summarize([g.stats for g in got]) == pytest.approx(summarize(want.stats), rel=1e-4, abs=1e-6)
    assert summarize(torch.stack([g.stats for g in got])) == summarize([g.stats for g in got])


@given(choice=st.sampled_from(CHOICES), seed=st.integers(0, 10**6), **sizes)
@settings(max_examples=30)
def test_any_shape_against_autograd(
    choice: tuple[str, str, str, str, bool], seed: int, rows: int, groups: int, samples: int
) -> None:
    inputs, options = inputs_for(choice, rows=rows, groups=groups, samples=samples, seed=seed)
    if inputs.mask is not None:
        inputs.mask[0] = True
    loss, grad, _ = truth(inputs, options)
    got = call(inputs, options)
    assert_close(got.loss, loss)
    assert_close(got.grad, grad)


values = st.one_of(st.sampled_from([0.1, 0.3, 0.7, 1 / 3]), st.floats(-1e6, 1e6, width=32))


@given(reward=values, samples=st.integers(1, 40), kind=st.sampled_from(["gapg", "grpo"]), absent=st.booleans())
def test_equal_rewards_give_exactly_zero(reward: float, samples: int, kind: Any, absent: bool) -> None:
    rewards = torch.full((1, samples), reward)
    if absent:
        rewards[0, 1::3] = float("nan")
    advantages = group_advantages(rewards, kind)[~rewards.isnan()]
    assert torch.equal(advantages, torch.zeros_like(advantages))


def test_a_float_mean_would_not_give_zero() -> None:
    rewards = torch.full((1, 7), 0.1)
    assert (rewards - rewards.sum(1, keepdim=True) / 7 != 0).any()


@given(st.lists(st.lists(st.floats(0, 1), min_size=4, max_size=4), min_size=1, max_size=5))
def test_the_weight_of_a_response_is_the_estimators(table: list[list[float]]) -> None:
    """c_i = -(r_i - mean) / ((G - 1) |D|), the paper's; and A is the reward minus the mean of the others (RLOO)."""
    rewards = torch.tensor(table, dtype=torch.float64)
    P, G = rewards.shape
    group, sample = torch.arange(P * G) // G, torch.arange(P * G) % G
    got = call(Rows(torch.full((P * G,), -0.5, dtype=torch.float64), rewards, group, sample), denominator=P * G)
    weights = (rewards.mean(1, keepdim=True) - rewards) / ((G - 1) * P)
    torch.testing.assert_close(got.grad, weights.flatten(), rtol=1e-12, atol=1e-14)
    leave_one_out = rewards - (rewards.sum(1, keepdim=True) - rewards) / (G - 1)
    torch.testing.assert_close(group_advantages(rewards), leave_one_out, rtol=1e-12, atol=1e-14)


def test_a_common_offset_costs_no_precision() -> None:
    rewards = torch.tensor([[0.0, 0.25, 1.0]])
    for kind in ("gapg", "grpo"):
        assert torch.equal(group_advantages(rewards + 4096, kind), group_advantages(rewards, kind))  # type: ignore[arg-type]


# --- what must be refused, or be NaN ---------------------------------------------------------------------------------


def test_rows_without_a_reward_are_nan_and_masked_rows_are_nothing() -> None:
    """Whatever a masked row points at or holds, it is 0 and uncounted; an unmasked one shows up."""
    rewards = torch.tensor([[0.0, 1.0, float("nan")], [0.5, 0.25, 0.0]])
    group = torch.tensor([0, 0, 0, 2, -1, 1, 1, 2**40, 1])
    sample = torch.tensor([0, 1, 2, 0, 0, 3, -1, 0, 2])
    fine = torch.tensor([True, True, *[False] * 6, True])
    rows = Rows(torch.full((9,), -1.0), rewards, group, sample)
    for kind in ("gapg", "grpo"):
        got = call(rows, PolicyLossOptions(advantage=kind))  # type: ignore[arg-type]
        assert torch.equal(got.loss.isnan(), ~fine) and torch.equal(got.grad.isnan(), ~fine)
        assert math.isnan(summarize(got.stats)["loss"])
    rubbish = torch.where(fine, -1.0, float("nan"))
    garbage = rows._replace(
        mask=fine,
        logprob=rubbish,
        old_logprob=rubbish,
        rollout_logprob=-rubbish.abs(),
        entropy=rubbish,
        coefficient=rubbish,
    )
    options = PolicyLossOptions(clip=(0.2, 0.2), tis_cap=2.0)
    got, alone = call(garbage, options), call(part(garbage, fine), options)
    assert torch.equal(got.loss[fine], alone.loss) and torch.equal(got.grad[fine], alone.grad)
    assert (got.loss[~fine] == 0).all() and (got.grad[~fine] == 0).all()
    assert_close(got.stats, alone.stats)


def test_nan_logprobs_of_the_trainers_own_models_are_never_hidden() -> None:
    rows, options = inputs_for(("gapg", "clip", "tis", "k3", False), rows=20)
    for field in ("logprob", "old_logprob", "reference_logprob"):
        tensor = rows._asdict()[field].clone()
        tensor[3] = float("nan")
        got = call(rows._replace(**{field: tensor}), options)
        assert got.loss[3].isnan() and got.grad[3].isnan()
        assert not got.loss[:3].isnan().any() and not got.loss[4:].isnan().any()


def test_an_engine_without_logprobs_costs_its_statistics_only() -> None:
    rows, options = inputs_for(("gapg", "old", "rollout", "no reference", False), rows=20)
    none = rows._replace(rollout_logprob=torch.full((20,), float("nan")))
    got, want = call(none, options), call(rows, options)
    assert torch.equal(got.loss, want.loss) and torch.equal(got.grad, want.grad)
    assert summarize(got.stats) == summarize(want.stats) | {"ess": 0.0, "rollout_nan_fraction": 1.0}
    some = torch.where(torch.arange(20) < 5, none.rollout_logprob, rows.rollout_logprob)
    kept = summarize(call(part(rows, slice(5, 20)), options).stats)
    assert summarize(call(rows._replace(rollout_logprob=some), options).stats)["ess"] == pytest.approx(kept["ess"])


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"options": PolicyLossOptions(clip=(0.2, 0.2)), "old_logprob": None}, ValueError, "clip needs old_logprob"),
    ({"options": PolicyLossOptions(tis_cap=2.0), "rollout_logprob": None}, ValueError, "tis_cap needs rollout_logprob"),
    ({"options": PolicyLossOptions(kl_coef=0.1), "reference_logprob": None}, ValueError, "needs reference_logprob"),
    ({"options": PolicyLossOptions(clip=(1.2, 0.2))}, ValueError, "clip is .low, high."),
    ({"options": PolicyLossOptions(clip=(0.2, -0.1))}, ValueError, "clip is .low, high."),
    ({"options": PolicyLossOptions(clip=(0.2, float("nan")))}, ValueError, "clip is .low, high."),
    ({"options": PolicyLossOptions(tis_cap=0.0)}, ValueError, "tis_cap must be positive"),
    ({"options": PolicyLossOptions(kl_coef=-0.1)}, ValueError, "kl_coef must be"),
    ({"options": PolicyLossOptions(kl="k1")}, ValueError, "'k2' or 'k3', not 'k1'"),  # type: ignore[arg-type]
    ({"options": PolicyLossOptions(advantage="rloo")}, ValueError, "'gapg' or 'grpo'"),  # type: ignore[arg-type]
    ({"denominator": 0}, ValueError, "denominator must be positive"),
    ({"denominator": float("nan")}, ValueError, "denominator must be positive"),
    ({"rewards": torch.zeros(6)}, ValueError, "must be .P, G."),
    ({"rewards": torch.zeros(0, 4)}, ValueError, "is empty"),
    ({"rewards": torch.zeros(6, 5, dtype=torch.int64)}, TypeError, "rewards is torch.int64"),
    ({"logprob": torch.zeros(4, 5)}, ValueError, "must be .T."),
    ({"logprob": torch.zeros(20, dtype=torch.bfloat16)}, TypeError, "pass float32"),
    ({"group": torch.zeros(19, dtype=torch.int64)}, ValueError, r"group \(19,\) must be \[20\]"),
    ({"sample": torch.zeros(20)}, TypeError, "sample is torch.float32; pass torch.int64"),
    ({"mask": torch.ones(20)}, TypeError, "mask is torch.float32; pass torch.bool"),
    ({"old_logprob": torch.zeros(20, dtype=torch.bfloat16)}, TypeError, "pass torch.float32"),
    ({"coefficient": torch.zeros(())}, ValueError, "coefficient .* must be"),
    ({"entropy": torch.zeros(20, device="meta")}, ValueError, "move it to cpu"),
]


@pytest.mark.parametrize(("change", "error", "message"), WRONG, ids=[message for _, _, message in WRONG])
@pytest.mark.parametrize("function", [row_losses, policy_loss])
def test_errors_name_the_fix(function: Any, change: dict[str, Any], error: type[Exception], message: str) -> None:
    rows, options = inputs_for(ALL, rows=20)
    arguments = rows._asdict() | {"options": options, "denominator": 1.0}
    function(**arguments)
    with pytest.raises(error, match=message) as caught:
        function(**(arguments | change))
    assert "\n" not in str(caught.value)


# --- the op ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("advantage", ["gapg", "grpo"])
@pytest.mark.parametrize("kl", ["k2", "k3"])
def test_gradcheck(advantage: str, kl: str) -> None:
    """Finite differences of the loss itself: clip, cap, KL and coefficient act on loss and gradient alike."""
    rows, options = inputs_for((advantage, "clip", "tis", kl, True), dtype=torch.float64)
    tensors = rows._asdict()
    logprob = tensors.pop("logprob").requires_grad_()
    summary = summarize(call(rows, options).stats)
    assert 0 < summary["clip_fraction"] < 1 and 0 < summary["tis_fraction"] < 1

    def loss(x: Tensor) -> Tensor:
        return policy_loss(x, **tensors, denominator=DENOMINATOR, options=options).loss

    assert torch.autograd.gradcheck(loss, logprob, eps=1e-6, atol=1e-9)


def test_opcheck() -> None:
    for choice, rows in itertools.product([ALL, ("gapg", "no old", "no rollout", "no reference", False)], [0, 5]):
        tensors, options = inputs_for(choice, rows=rows)
        tensors.logprob.requires_grad_()
        torch.library.opcheck(torch.ops.gapg.policy_loss.default, (*tensors, 3.0, *options))


def test_torch_compile() -> None:
    rows, options = inputs_for(ALL)
    tensors = rows._asdict()
    start = tensors.pop("logprob")

    def run(function: Any, denominator: float) -> tuple[Tensor, Tensor, Tensor]:
        logprob = start.clone().requires_grad_()
        loss, stats = function(logprob * 1.5, **tensors, denominator=denominator, options=options)
        loss.backward()
        assert logprob.grad is not None
        return loss.detach(), stats, logprob.grad

    # without the cache on disk, which holds what an earlier revision compiled, with that one's statistics
    compiled = torch.compile(policy_loss, fullgraph=True, options={"fx_graph_cache": False})
    for denominator in (3.0, 7.0, 11.5):
        for got, want in zip(run(compiled, denominator), run(policy_loss, denominator), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-8)


def test_no_rows_and_no_batches() -> None:
    rows, options = inputs_for(ALL, rows=0)
    zeros = dict.fromkeys(summarize([]), 0.0)
    got = policy_loss(**rows._asdict(), denominator=1.0, options=options)
    assert got.loss == 0 and summarize(got.stats) == zeros == summarize([])
    empty = Rows(torch.zeros(0), torch.zeros(0, 8), torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long))
    assert summarize(call(empty).stats) == zeros
    masked, options = inputs_for(ALL, rows=9)
    nothing = call(masked._replace(mask=torch.zeros(9, dtype=torch.bool)), options).stats
    assert summarize(nothing) == zeros
    alone = call(masked, options).stats
    assert summarize([nothing, alone, nothing]) == summarize(alone)


def test_effective_sample_size() -> None:
    rows, options = inputs_for(("gapg", "no old", "rollout", "no reference", False), rows=8)
    for gaps, share in [([0.7] * 8, 1.0), ([0.0] * 4 + [-200.0] * 4, 0.5), ([80.0] + [0.0] * 7, 1 / 8)]:
        stats = call(rows._replace(rollout_logprob=rows.logprob - torch.tensor(gaps)), options).stats
        assert summarize(stats)["ess"] == pytest.approx(share, rel=1e-5)
    assert summarize(call(rows._replace(rollout_logprob=None)).stats)["ess"] == 1.0


# --- failures others have had ----------------------------------------------------------------------------------------


def test_the_coefficient_comes_after_everything() -> None:
    """Not before the clip, whose sides a negative factor would swap; not as a filter, which a tiny one would trip
    (and then loss and gradient part: the filter of one is not the filter of the other)."""
    rows, options = inputs_for(("gapg", "clip", "tis", "k3", False), rows=200)
    plain = call(rows, options)
    for factor in (-1.0, -3.0, 1e-12, 1e-30):
        scaled = call(rows._replace(coefficient=torch.full((200,), factor)), options)
        assert_close(scaled.loss / factor, plain.loss, rtol=1e-6)
        assert_close(scaled.grad / factor, plain.grad, rtol=1e-6)
        assert torch.equal(scaled.stats[2:], plain.stats[2:])


def test_a_truncated_weight_scales_the_clipped_surrogate() -> None:
    """w multiplies the min and is never in it: a row at the cap is neither dropped nor clipped differently, and its KL
    is not weighed."""
    rows, _ = inputs_for(("gapg", "clip", "tis", "k3", False), rows=200)
    free = call(rows, PolicyLossOptions(clip=(0.2, 0.28)))
    capped = call(rows, PolicyLossOptions(clip=(0.2, 0.28), tis_cap=0.01))  # every weight is at the cap
    assert summarize(capped.stats)["tis_fraction"] == 1.0
    assert_close(capped.loss, 0.01 * free.loss, atol=0)
    assert_close(capped.grad, 0.01 * free.grad, atol=0)
    no_kl, kl = (call(rows, PolicyLossOptions(tis_cap=cap, kl_coef=k)) for cap, k in [(0.01, 0.0), (0.01, 0.5)])
    other_no_kl, other_kl = (call(rows, PolicyLossOptions(tis_cap=3.0, kl_coef=k)) for k in (0.0, 0.5))
    assert_close(kl.loss - no_kl.loss, other_kl.loss - other_no_kl.loss, atol=1e-6)
    assert_close(kl.grad - no_kl.grad, other_kl.grad - other_no_kl.grad, atol=1e-6)


def test_a_small_kl_does_not_drown_in_rounding() -> None:
    """exp(d) - d - 1 in float32 is off by 100% below d = 1e-3."""
    rows, _ = inputs_for(("gapg", "no old", "no rollout", "k3", False), rows=40)
    rows = rows._replace(rewards=torch.zeros_like(rows.rewards), logprob=torch.zeros(40))
    gap = torch.logspace(-4, 0, 40)
    got = call(rows._replace(reference_logprob=gap), PolicyLossOptions(kl_coef=1.0), denominator=1.0)
    exact = gap.double().expm1() - gap.double()
    assert_close(got.loss, exact, rtol=2e-3, atol=0)
    assert_close(got.grad, -gap.double().expm1(), rtol=1e-6, atol=0)
    naive = gap.exp() - gap - 1
    assert ((naive - exact) / exact).abs().max() > 0.5


# --- the Triton kernel -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RowLosses]:
    path = tmp_path_factory.mktemp("interpreted") / "results.pt"
    in_its_own_process(MODULE, path, interpret=True)
    return {name: RowLosses(**result) for name, result in torch.load(path, weights_only=True).items()}


@pytest.mark.parametrize("name", cases())
def test_the_kernel_against_the_reference(kernel: dict[str, RowLosses], name: str) -> None:
    rows, options = cases()[name]
    got, want = kernel[name], plain_row_losses(rows, DENOMINATOR, options)
    assert_close(got.loss, want.loss, rtol=1e-5)
    assert_close(got.grad, want.grad, rtol=1e-5)
    assert_close(got.stats, want.stats, rtol=1e-5, atol=1e-5)
    counted = ("rows", "clipped_low", "clipped_high", "truncated", "rollout_nan", "kl_rows", "weight_rows")
    exact = [STATS.index(name) for name in counted]
    assert torch.equal(got.stats[exact], want.stats[exact])


@pytest.mark.parametrize("name", edges())
def test_a_row_of_the_kernel_is_the_same_in_any_batch(kernel: dict[str, RowLosses], name: str) -> None:
    for whole, alone in zip(kernel[name][:2], kernel[f"last rows of {name}"][:2], strict=True):
        assert torch.equal(whole[-3:].nan_to_num(), alone.nan_to_num())


@pytest.mark.slow
def test_machine_code_for_sm_90(tmp_path: Path) -> None:
    in_its_own_process(MODULE, tmp_path / "figures.json", interpret=False)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert len(figures) == 8
    for name, figure in figures.items():
        assert figure["spill_store_bytes"] == figure["spill_load_bytes"] == figure["stack_bytes"] == 0, name
        assert figure["local_memory"] == figure["arithmetic_atomics"] == 0, name
        assert figure["registers"] <= 128, name
