"""From judged groups to the examples that an update learns from, as the engine sampled them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from gapg.batches.batching import Example
from gapg.help_phrase import deciding_tokens, masked_logprobs
from gapg.judge import Group
from gapg.marginal_loss import Masked
from gapg_rollout.records import HelpControl


def sampled(groups: Sequence[Group], ids_of: Mapping[str, Sequence[int]]) -> list[Example]:
    """All responses of the groups. ids_of: each prompt's token ids."""
    return [
        Example(ids_of[g.prompt.id], c.token_ids, rollout_logprobs=c.logprobs, group=p, sample=i)
        for p, g in enumerate(groups)
        for i, c in enumerate(g.completions)
    ]


def sampled_masked(
    groups: Sequence[Group], ids_of: Mapping[str, Sequence[int]], help: HelpControl
) -> tuple[list[Example], Masked]:
    """The same where help was forbidden: with where it could have begun; and how right the cloud would be.

    A cloud that was not asked counts as right.
    """
    examples, hazards = [], [[math.nan] * len(g.completions) for g in groups]
    for e in sampled(groups, ids_of):
        deciding = deciding_tokens(help, e.prompt_ids, e.response_ids, groups[e.group].thinking)
        logprobs, hazards[e.group][e.sample] = masked_logprobs(groups[e.group].completions[e.sample], deciding)
        examples.append(replace(e, rollout_logprobs=logprobs, deciding=deciding))
    cloud = [1.0 if g.oracle_score is None else g.oracle_score for g in groups]
    return examples, Masked(torch.tensor(cloud), torch.tensor(hazards, dtype=torch.float32))


def equal_once(examples: Sequence[Example], rewards_PG: torch.Tensor, masked: Masked) -> tuple[list[Example], Masked]:
    """Of responses to a prompt that are equal, and of one reward, the first, weighted by their number.

    They have one log-prob, hazard and advantage, so the gradient is the same.
    """
    rewards, first = rewards_PG.tolist(), dict[tuple[int, tuple[int, ...], float], Example]()
    number, first_PG = Counter[tuple[int, int]](), torch.arange(rewards_PG.shape[1]).repeat(len(rewards), 1)
    for e in examples:
        same = first.setdefault((e.group, tuple(e.response_ids), rewards[e.group][e.sample]), e)
        first_PG[e.group, e.sample] = same.sample
        number[same.group, same.sample] += 1
    once = [replace(e, weight=e.weight * number[e.group, e.sample]) for e in first.values()]
    return once, replace(masked, first_PG=first_PG)
