"""The packed marginal update against its definition: gradients, hazards and log-probs, however it is laid out."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import CohereConfig, Gemma2Config, PreTrainedModel

from gapg.batches.batching import Example, packed_batches
from gapg.config import RunConfig, load_config
from gapg.config_sections import LoraConfig
from gapg.examples import sampled_masked
from gapg.help_phrase import help_control, masked
from gapg.judge import Group, Outcome
from gapg.marginal_loss import MarginalLoss, Masked
from gapg.model.lora import add_adapters
from gapg.model.precision import adapter_tensors
from gapg.optim import make_optimizer
from gapg.tasks.base import Prompt
from gapg.update import policy_update
from gapg_rollout.engines.transformers import TransformersEngine
from gapg_rollout.records import HelpControl, HelpSpelling, Sampling
from tests.byte_pairs import byte_pairs
from tests.marginal_float64 import Defined, Step, defined, step_of
from tests.model.test_logits import scaled_and_capped, tiny

MakeModel = Callable[..., PreTrainedModel]
Gradients = dict[str, torch.Tensor]
VOCAB = 60
WORDS = [*range(3, 16), 40, 59, *[5, 6] * 4]
"""Of the responses; few, and the prefixes often."""
ONE_TOKEN = HelpControl((HelpSpelling(20),))
SEVERAL = HelpControl((HelpSpelling(7, (5,)), HelpSpelling(7, (6,)), HelpSpelling(8, (6,)), HelpSpelling(9, (5, 6))))
MIXED = HelpControl((HelpSpelling(20), HelpSpelling(7, (5,)), HelpSpelling(8, (6,)), HelpSpelling(9, (5, 6))))
CONTROLS = {"one token": ONE_TOKEN, "several": SEVERAL, "mixed": MIXED}
IGNORED, KNOWN = (1.0,) * 5, (1.0, 0.6, 0.0, 0.9, 0.3)


def config(**overrides: str) -> RunConfig:
    changed = {key.replace("__", "."): value for key, value in overrides.items()}
    settings = {"method": "marginal", "token_cap": "90", "optim.grad_clip": "1e9", "reward.alpha_a": "1.25"}
    return load_config("quickstart", {**settings, **changed})


def updated(
    model: PreTrainedModel, settings: RunConfig, step: Step, hazard_PG: torch.Tensor | None = None
) -> tuple[Gradients, dict[str, Any]]:
    """The gradients of one update, as they are at its step, and its metrics."""
    twin, found = copy.deepcopy(model), Gradients()
    optimizer = make_optimizer(twin, settings.optim)
    optimizer.register_step_pre_hook(
        lambda *_: found.update({n: p.grad.clone() for n, p in twin.named_parameters() if p.grad is not None})
    )
    if hazard_PG is None:
        hazard_PG = torch.full_like(step.right_PG, math.nan)
    row = policy_update(
        twin, optimizer, settings, 0, step.examples, step.right_PG, masked=Masked(step.cloud_P, hazard_PG)
    )
    return found, row


def assert_defined(got: Gradients, want: Defined, digits: float = 1e-5) -> None:
    assert got.keys() == want.gradients.keys()
    scale = max(float(g.abs().max()) for g in want.gradients.values())
    assert scale > 1e-2
    for name, gradient in want.gradients.items():
        torch.testing.assert_close(got[name].double(), gradient, atol=digits * scale, rtol=0, msg=name)


@pytest.fixture(scope="module")
def model(make_model: MakeModel) -> PreTrainedModel:
    return make_model(seed=5, vocab_size=VOCAB)


# --- what it learns --------------------------------------------------------------------------------------------------

OBJECTIVES = {
    "log": {},
    "log, other worths": {"marginal__trace": "[0.3, 2]", "marginal__weight": "4"},
    "log, worth of r alone": {"marginal__trace": "[0, 1]"},
    "log, no decision": {"marginal__weight": "0"},
    "brier": {"marginal__score": "brier", "marginal__cloud": "cached"},
    "brier, some prices": {"marginal__score": "brier", "marginal__prices": "[0.1, 0.85]", "marginal__cloud": "ask"},
    "a price": {"marginal__score": "price", "reward__alpha_c": "0.45", "marginal__cloud": "cached"},
    "at temperature 0.7": {"rollout__temperature": "0.7"},
    "importance weights": {"loss__tis_cap": "1.3"},
    "scaled by the group": {"loss__advantage": "grpo"},
}


EACH = [("mixed", o) for o in OBJECTIVES] + [(c, o) for c in ("one token", "several") for o in ("log", "brier")]


@pytest.mark.parametrize(("control", "objective"), EACH)
def test_the_gradient_is_the_definitions(model: PreTrainedModel, control: str, objective: str) -> None:
    settings = config(**OBJECTIVES[objective])
    step = step_of(CONTROLS[control], IGNORED if settings.marginal.cloud == "ignore" else KNOWN, WORDS)
    got, row = updated(model, settings, step)
    want = defined(model, settings, step)
    assert_defined(got, want)
    right, stays = step.right_PG.double(), (-want.hazard_PG).exp()
    together = right * stays + step.cloud_P.double()[:, None] * (1 - stays)
    assert row["call_fraction"] == pytest.approx(float((1 - stays).mean()), abs=1e-6)
    assert row["local_accuracy"] == pytest.approx(float((right * stays).mean()), abs=1e-6)
    assert row["accuracy"] == pytest.approx(float(together.mean()), abs=1e-6)
    assert row["marginal/brier"] == pytest.approx(float((stays - right).square().mean()), abs=1e-6)
    assert math.isnan(row["hazard_gap"])


def test_the_steps_are_of_every_sort() -> None:
    """Else the tests above would prove less than they say."""
    for name, control in CONTROLS.items():
        step = step_of(control, KNOWN, WORDS)
        kinds = {kind for e in step.examples for kind in e.deciding}
        wanted = {"one token": {(20,)}, "several": {(), (7,), (7, 8), (7, 8, 9)}, "mixed": {(20,), (7, 20), (8, 20)}}
        assert kinds >= wanted[name]
        assert {len(e.response_ids) for e in step.examples} >= {0, 1, 2, 13}
        never = [e for e in step.examples if e.response_ids and not any(e.deciding)]
        assert bool(never) == (name == "several")


# --- however it is laid out ------------------------------------------------------------------------------------------

LAYOUTS = {
    "one batch": {"token_cap": "2000"},
    "small batches": {"token_cap": "36"},
    "shared prompts": {"update__share_prompts": "always"},
    "shared, groups spread": {"update__share_prompts": "always", "token_cap": "40"},
    "padded": {"update__pack": "false"},
    "padded, groups spread": {"update__pack": "false", "token_cap": "40"},
    "every position": {"update__response_positions": "false"},
    "padded, every position": {"update__pack": "false", "update__response_positions": "false"},
}


@pytest.fixture(scope="module")
def brier_of(model: PreTrainedModel) -> dict[str, Defined]:
    """The definition does not know of layouts."""
    return {
        name: defined(model, config(**OBJECTIVES["brier"]), step_of(c, KNOWN, WORDS)) for name, c in CONTROLS.items()
    }


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("control", CONTROLS)
def test_no_layout_changes_it(model: PreTrainedModel, brier_of: dict[str, Defined], control: str, layout: str) -> None:
    settings = config(**OBJECTIVES["brier"], **LAYOUTS[layout])
    step, want = step_of(CONTROLS[control], KNOWN, WORDS), brier_of[control]
    got, row = updated(model, settings, step, want.hazard_PG.float())
    assert_defined(got, want)
    assert row["hazard_gap"] < 1e-5
    batches = packed_batches(step.examples, settings.token_cap, torch.device("cpu"), whole_groups=True)
    spread = not all(b.decisions.whole for b in batches if b.decisions is not None)
    assert spread == (layout != "one batch")


@pytest.mark.parametrize("control", CONTROLS)
def test_the_log_probs_are_those_among_the_other_tokens(model: PreTrainedModel, control: str) -> None:
    settings, step = config(rollout__temperature="0.7"), step_of(CONTROLS[control], KNOWN, WORDS)
    want, twin = defined(model, settings, step), copy.deepcopy(model)
    loss = MarginalLoss(twin, settings, step.right_PG, Masked(step.cloud_P, torch.zeros_like(step.right_PG)))
    for batch in packed_batches(step.examples, 90, torch.device("cpu"), whole_groups=True):
        got = loss(batch, 20.0).logprob
        for e, logprobs in zip(step.examples, want.logprobs, strict=True):
            mine = (batch.group == e.group) & (batch.sample == e.sample)
            if mine.any():
                torch.testing.assert_close(got[mine].double(), logprobs, atol=1e-5, rtol=0)
    torch.testing.assert_close(loss.log_x_PG.exp().double(), want.hazard_PG, atol=1e-6, rtol=1e-5)


# --- heads and parameters --------------------------------------------------------------------------------------------


def with_bias(make_model: MakeModel) -> PreTrainedModel:
    model = make_model(seed=5, vocab_size=VOCAB)
    model.lm_head = nn.Linear(32, VOCAB)
    nn.init.normal_(model.lm_head.bias)
    return model


def frozen_head(make_model: MakeModel) -> PreTrainedModel:
    model = make_model(seed=5, vocab_size=VOCAB)
    model.get_output_embeddings().requires_grad_(False)
    return model


def adapters(make_model: MakeModel) -> PreTrainedModel:
    model = make_model(seed=5, vocab_size=VOCAB)
    add_adapters(model, LoraConfig(rank=4, alpha=6), seed=3)
    for name, tensor in adapter_tensors(model).items():
        if "lora_B" in name:
            nn.init.normal_(tensor, std=0.1)
    return model


def gemma(_: MakeModel) -> PreTrainedModel:
    return tiny(Gemma2Config, final_logit_softcapping=1.5, attn_logit_softcapping=None)


MODELS: dict[str, Callable[[MakeModel], PreTrainedModel]] = {
    "tied": lambda make: make(seed=5, vocab_size=VOCAB, tie_word_embeddings=True),
    "bias": with_bias,
    "softcap": gemma,
    "logit scale": lambda _: tiny(CohereConfig, logit_scale=0.5),
    "scale and softcap": lambda _: scaled_and_capped(4.0),
    "frozen head": frozen_head,
    "adapters": adapters,
}


@pytest.mark.parametrize("name", MODELS)
def test_every_head(make_model: MakeModel, name: str) -> None:
    model, settings = MODELS[name](make_model), config(rollout__temperature="0.7")
    step = step_of(MIXED, IGNORED, WORDS)
    assert_defined(updated(model, settings, step)[0], defined(model, settings, step))


@pytest.mark.parametrize("control", CONTROLS)
def test_bfloat16_is_near(model: PreTrainedModel, control: str) -> None:
    """Its products have 8 bits; what is summed, the hazards and the coefficients are float32."""
    settings, step = config(model__dtype="bfloat16"), step_of(CONTROLS[control], IGNORED, WORDS)
    want = defined(model, settings, step)
    got, row = updated(model, settings, step, want.hazard_PG.float())
    norm = math.sqrt(sum(float(g.square().sum()) for g in want.gradients.values()))
    off = math.sqrt(sum(float((got[n].double() - g).square().sum()) for n, g in want.gradients.items()))
    assert off < 2e-2 * norm
    assert row["hazard_gap"] < 3e-2 * float(want.hazard_PG.max())


# --- what is exact ---------------------------------------------------------------------------------------------------


def test_twice_the_same_bits(model: PreTrainedModel) -> None:
    for layout in ("small batches", "shared, groups spread", "padded, every position"):
        settings, step = config(**LAYOUTS[layout]), step_of(MIXED, IGNORED, WORDS)
        (one, row), (other, again) = (updated(model, settings, step) for _ in range(2))
        assert all(torch.equal(one[n], other[n]) for n in one)
        assert {k: v for k, v in row.items() if v == v} == {k: v for k, v in again.items() if v == v}


def test_what_is_exactly_zero_stays_zero(model: PreTrainedModel) -> None:
    """Equal worths and no decision to learn: no gradient at all, to the last bit."""
    step = step_of(MIXED, IGNORED, WORDS)
    step.right_PG[:] = torch.tensor([[1.0], [0.0], [1.0], [0.0], [0.0]])
    settings = config(marginal__trace="[0, 1]", marginal__weight="0")
    got, row = updated(model, settings, step)
    assert row["grad_norm"] == 0 and not any(g.any() for g in got.values())
    # equal worths, but the decision learns
    got, _ = updated(model, config(marginal__trace="[0, 1]"), step)
    want = defined(model, config(marginal__trace="[0, 1]"), step)
    assert_defined(got, want)


def test_where_the_phrase_can_nowhere_begin_only_the_traces_learn(model: PreTrainedModel) -> None:
    """Beside any tokens' own the score's slope at S = 1, where a wrong answer's is infinite, is never asked for."""
    step = step_of(HelpControl((HelpSpelling(20, (50,)),)), IGNORED, WORDS)
    assert not any(any(e.deciding) for e in step.examples)
    for objective in ("log", "brier", "a price"):
        settings = config(**OBJECTIVES[objective])
        got, row = updated(model, settings, step)
        assert row["call_fraction"] == 0 and row["local_accuracy"] == pytest.approx(float(step.right_PG.mean()))
        assert_defined(got, defined(model, settings, step))


@pytest.mark.parametrize("odds", [-200.0, -80.0, 80.0, 200.0])
@pytest.mark.parametrize("objective", ["log", "brier", "a price"])
def test_a_phrase_that_is_all_but_impossible_or_certain(make_model: MakeModel, objective: str, odds: float) -> None:
    model = with_bias(make_model)
    with torch.no_grad():
        model.lm_head.bias[20] += odds
    settings, step = config(**OBJECTIVES[objective]), step_of(MIXED, IGNORED, WORDS)
    got, row = updated(model, settings, step)
    assert all(g.isfinite().all() for g in got.values()) and row["skipped"] == 0
    assert all(math.isfinite(row[key]) for key in row if key.startswith(("marginal/", "call", "local", "acc")))
    if odds < 80:  # beyond, float64's own S is 0, and log(1 - S) has no slope
        assert_defined(got, defined(model, settings, step))


def test_a_chance_below_float32s_last_bit_of_1_is_not_0(model: PreTrainedModel) -> None:
    loss = MarginalLoss(model, config(), torch.ones(1, 2), Masked(torch.ones(1), torch.zeros(1, 2)))
    loss.noted_PG.fill_(math.log(1e-9))
    assert loss.metrics()["call_fraction"] == pytest.approx(1e-9)


def test_an_empty_d_takes_no_step(model: PreTrainedModel) -> None:
    twin, settings = copy.deepcopy(model), config()
    nothing = Masked(torch.tensor([]), torch.tensor([]))
    row = policy_update(twin, make_optimizer(twin, settings.optim), settings, 0, [], torch.zeros(0, 4), masked=nothing)
    assert row["tokens/given"] == row["grad_norm"] == row["skipped"] == 0 and math.isnan(row["call_fraction"])
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def test_a_batch_of_an_empty_response_alone(model: PreTrainedModel) -> None:
    """It has no row, and a gradient of exactly 0."""
    examples = [Example([3], [5], group=0, sample=0, deciding=[(20,)]), Example([3] * 9, [], group=0, sample=1)]
    twin = copy.deepcopy(model)
    loss = MarginalLoss(twin, config(), torch.tensor([[0.0, 1.0]]), Masked(torch.ones(1), torch.zeros(1, 2)))
    batches = packed_batches(examples, 9, torch.device("cpu"), whole_groups=True)
    (empty,) = [b for b in batches if not len(b.target)]
    found = loss(empty, 2.0)
    found.loss.backward()
    assert found.loss == 0 and not any(p.grad.any() for p in twin.parameters() if p.grad is not None)


# --- from a real tokenizer and a real engine -------------------------------------------------------------------------


def test_from_an_engines_responses_in_every_spelling(make_model: MakeModel) -> None:
    """Sampled with help forbidden, judged, laid out and learned from, with the cloud's score of each prompt."""
    tokenizer = byte_pairs()
    control = help_control(tokenizer)
    prefixes = sorted({token for s in control.spellings for token in s.prefix_ids})
    assert len({s.prefix_ids for s in control.spellings}) >= 3
    model = make_model(seed=5, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    with torch.no_grad():  # of 420 tokens those that matter come up too seldom else
        model.lm_head.weight[[*prefixes, *{s.token_id for s in control.spellings}]] *= 10
    settings = config(marginal__score="brier", marginal__cloud="ask", rollout__temperature="0.7")
    prompts = {f"{p}": [p + 7, p + 9, p + 30] for p in range(4)}
    sampling = Sampling(12, temperature=0.7, help=masked(control), seed=3)
    found = dict(TransformersEngine(model, tokenizer).generate(list(prompts.values()), 4, sampling))
    scores = (None, 1.0, 0.4, 0.0)
    groups = [
        Group(Prompt(name, name, "", "toy"), tuple(found[p]), (Outcome.LOCAL_WRONG,) * 4, (True,) * 4, scores[p])
        for p, name in enumerate(prompts)
    ]
    examples, known = sampled_masked(groups, prompts, control)
    assert known.cloud_P.tolist() == [1.0, 1.0, pytest.approx(0.4), 0.0]
    right = torch.tensor([[0.0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 1], [1, 0, 0, 0]])
    step = Step(examples, right, known.cloud_P, control)
    got, row = updated(model.train(), settings, step, known.hazard_PG)
    assert_defined(got, defined(model, settings, step))
    assert row["hazard_gap"] < 1e-5 and row["logprob_gap"] < 1e-4
    assert (known.hazard_PG > 0).float().mean() > 0.5
