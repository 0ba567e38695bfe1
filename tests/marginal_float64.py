"""The marginal update as its definition has it: float64, one response at a time, whole logits, autograd through all."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import PreTrainedModel

from gapg.batches.batching import Example
from gapg.config import RunConfig
from gapg.help_phrase import deciding_tokens
from gapg_rollout.records import HelpControl


class Step(NamedTuple):
    """What an update is given."""

    examples: list[Example]
    right_PG: Tensor
    cloud_P: Tensor
    control: HelpControl


def step_of(control: HelpControl, cloud: Sequence[float], vocabulary: Sequence[int], seed: int = 0) -> Step:
    """A group of four to each of the prompts: responses of 0 to 14 tokens, as if sampled with help forbidden.

    The last group has no right answer, the first no wrong one. One response is empty, one has a token.
    """
    rng = random.Random(seed)
    right = torch.tensor([[float(rng.random() < 0.5) for _ in range(4)] for _ in cloud])
    right[0], right[-1] = 1.0, 0.0
    examples = []
    for p in range(len(cloud)):
        prompt = [rng.choice(vocabulary) for _ in range((1, 9, 20, 4, 13)[p % 5])]
        for i in range(4):
            length = {(1, 0): 0, (1, 1): 1}.get((p, i), rng.randint(2, 14))
            ids: list[int] = []
            while len(ids) < length:
                token = rng.choice(vocabulary)
                if token not in deciding_tokens(control, [], [*ids, token])[-1]:
                    ids.append(token)
            logprobs = [-5 * rng.random() for _ in ids]
            deciding = deciding_tokens(control, [], ids)
            examples.append(Example(prompt, ids, rollout_logprobs=logprobs, group=p, sample=i, deciding=deciding))
    return Step(examples, right, torch.tensor(cloud), control)


class Defined(NamedTuple):
    gradients: dict[str, Tensor]
    hazard_PG: Tensor
    logprobs: list[Tensor]
    """log pi~ of each response's tokens"""


def defined(model: PreTrainedModel, config: RunConfig, step: Step) -> Defined:
    """loss = -1/(P G) sum over responses of [A log pi~ + score], A the worth less the mean of the group's others."""
    twin = copy.deepcopy(model).double()
    twin.set_attn_implementation("eager")
    prompts, samples = step.right_PG.shape
    hazards = torch.zeros(prompts, samples, dtype=torch.float64)
    log_pi, hazard_of, logprobs = [], {}, []
    for e in step.examples:
        each, hazard = _response(twin, config.rollout.temperature, e)
        log_pi.append(_weighed(each, e.rollout_logprobs, config.loss.tis_cap))
        hazard_of[e.group, e.sample] = hazard
        hazards[e.group, e.sample] = hazard.detach()
        logprobs.append(each.detach())
    right, cloud = step.right_PG.double(), step.cloud_P.double()[:, None].expand_as(step.right_PG)
    a, b = config.marginal.trace or ((1.0, 0.5) if config.marginal.score == "log" else (1.0, 0.0))
    worth = a * _score(hazards, right, cloud, config, trace=True) + b * config.reward.alpha_a * right
    advantage = (worth - worth.mean(1, keepdim=True)) * samples / (samples - 1)
    if config.loss.advantage == "grpo":
        advantage = advantage * (samples - 1) / samples / (worth.std(1, keepdim=True) + 1e-4)
    loss = torch.zeros((), dtype=torch.float64)
    for e, score_of_y in zip(step.examples, log_pi, strict=True):
        at = e.group, e.sample
        decision = config.marginal.weight * _score(hazard_of[at], right[at], cloud[at], config, trace=False)
        loss = loss - (advantage[at] * score_of_y + decision) / (prompts * samples)
    loss.backward()
    return Defined({n: p.grad for n, p in twin.named_parameters() if p.grad is not None}, hazards, logprobs)


def _response(model: PreTrainedModel, temperature: float, e: Example) -> tuple[Tensor, Tensor]:
    """(log pi~ of each token, the hazard) of a response."""
    ids = torch.tensor([[*e.prompt_ids, *e.response_ids]])
    logits = model(input_ids=ids).logits[0, len(e.prompt_ids) - 1 : -1] / temperature
    each, hazard = [], logits.new_zeros(())
    for row, token, deciding in zip(logits, e.response_ids, e.deciding, strict=True):
        calls = torch.tensor(deciding, dtype=torch.int64)
        rest = row.index_fill(0, calls, -torch.inf)
        each.append(rest.log_softmax(0)[token])
        if deciding:
            hazard = hazard - logsigmoid(rest.logsumexp(0) - row[calls].logsumexp(0))
    return torch.stack(each) if each else logits.new_zeros(0), hazard


def _weighed(each: Tensor, rollout: Sequence[float], cap: float | None) -> Tensor:
    """log pi~ of the response, its tokens truncated importance samples."""
    if cap is None:
        return each.sum()
    given = torch.tensor(rollout, dtype=torch.float64)
    weight = (each.detach() - given).exp().clamp(max=cap)
    return (torch.where(given.isnan(), 1.0, weight) * each).sum()


def _score(hazard: Tensor, right: Tensor, cloud: Tensor, config: RunConfig, *, trace: bool) -> Tensor:
    """What S is scored by; of a trace, Brier's where the decision's is the log score."""
    settings, reward, stays = config.marginal, config.reward, (-hazard).exp()
    if settings.score == "price":
        return reward.alpha_a * right * stays + reward.alpha_c * cloud * (1 - stays)
    if settings.score == "log" and not trace:
        wrong = torch.log(-torch.expm1(-torch.where(right > 0, 1.0, hazard)))
        return reward.alpha_a * torch.where(right > 0, -hazard, wrong)
    low, high = settings.prices
    s = stays.clamp(low, high)
    return reward.alpha_a * (right * (s - low) + cloud * (high**2 - s**2) / 2) / (high - low)
