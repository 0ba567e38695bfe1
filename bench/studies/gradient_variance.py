"""The variance of the group estimator at fixed prompts, measured on real groups and computed by its formula.

At a fixed prompt the estimator of G responses is a U-statistic. Along a direction v, with s = v . d log pi(y),
mu = E r and g = E[r s]:

    Var = [4 (G - 2) zeta_1 + 2 zeta_2] / (G (G - 1))
    zeta_1 = (E[(r - mu)^2 s^2] - g^2) / 4        zeta_2 = (E[(r - mu)^2 s^2] + Var(r) E[s^2]) / 2
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from scipy import stats
from transformers import PreTrainedModel

from gapg.batches.batching import Example, packed_batches
from gapg.console import Display
from gapg.judge import Group, Judge
from gapg.model.policy import response_logprobs
from gapg.reward import group_rewards
from gapg.runs.run import Run
from gapg.seeding import derive
from gapg.tasks.base import STOP, Prompt
from gapg_rollout.records import Sampling
from studies.arms import Finished, Predictions, Rows
from studies.drawing import COLOURS, SMALL
from studies.report import Row, Table, grouped
from studies.statistics import FloatArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GROUP_SIZES = (2, 4, 8, 16)
PROMPTS, DIRECTIONS = 4, 32
PILOT_PROMPTS, PILOT_SAMPLES = 64, 16
BLOCKS = 8
"""A prompt's responses fall into blocks, each of two training steps' responses. Both variances are taken over the same
block, so that a rare response with a large score weighs on both alike; the blocks tell the error of their ratio."""
PARTITIONS = 32
"""Random partitions of a block into groups, over which its variance is averaged."""


def formula(r_N: FloatArray, s_NK: FloatArray, group_size: int) -> FloatArray:
    """[k] the estimator's variance along each direction by the formula, its moments estimated from these responses.

    r_N [n]: rewards of responses to one prompt. s_NK [n, k]: their scores along the directions.

    Mean and variance of the rewards are those of the other responses, and g^2 is of pairs: the moments' own noise,
    squared, would make the estimate too large or too small by some parts in n.
    """
    n = len(r_N)
    mean_N = (r_N.sum() - r_N) / (n - 1)
    variance_N = ((r_N**2).sum() - r_N**2 - (n - 1) * mean_N**2) / (n - 2)
    apart_N = (r_N - mean_N) ** 2 - variance_N / (n - 1)
    both_K = (apart_N[:, None] * s_NK**2).mean(0)
    product_K = (variance_N[:, None] * s_NK**2).mean(0)
    g_NK = (r_N - r_N.mean())[:, None] * s_NK
    g_squared_K = (g_NK.sum(0) ** 2 - (g_NK**2).sum(0)) / (n * (n - 1))
    zeta_1 = (both_K - g_squared_K) / 4
    zeta_2 = (both_K + product_K) / 2
    return np.asarray((4 * (group_size - 2) * zeta_1 + 2 * zeta_2) / (group_size * (group_size - 1)))


def measured(
    r_N: FloatArray, s_NK: FloatArray, group_size: int, rng: np.random.Generator, partitions: int = PARTITIONS
) -> FloatArray:
    """[k] the variance over disjoint groups of these responses, averaged over random partitions into groups."""
    groups = len(r_N) // group_size
    total = np.zeros(s_NK.shape[1])
    for _ in range(partitions):
        chosen = rng.permutation(len(r_N))[: groups * group_size].reshape(groups, group_size)
        r = r_N[chosen]
        advantages = (r - r.mean(1, keepdims=True)) / (group_size - 1)
        total += np.einsum("ng,ngk->nk", advantages, s_NK[chosen]).var(0, ddof=1)
    return total / partitions


def gradient_variance(run: Run) -> Rows:
    """One row a (prompt, G) on the prompts whose rewards vary most, under the trained policy.

    `measured` and `formula` are means over blocks, one a direction; `measured_blocks` and `formula_blocks` sums over
    directions, one a block. The directions are random unit vectors in the space of all weights.
    """
    rollout = run.config.rollout
    pilot = run.validation[:PILOT_PROMPTS]
    spread = [float(_rewards(run, g).std()) for g in _responses(run, pilot, PILOT_SAMPLES, "pilot")]
    varied = sorted(range(len(pilot)), key=lambda i: -spread[i])[:PROMPTS]
    prompts = [pilot[i] for i in sorted(varied)]
    block = max(2 * GROUP_SIZES[-1], 2 * rollout.prompts_per_step * rollout.samples_per_prompt)
    run.model.eval()
    params = [p for p in run.model.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(derive(run.config.seed, "directions"))
    directions = torch.randn(DIRECTIONS, sum(p.numel() for p in params), generator=generator)
    directions = (directions / directions.norm(dim=1, keepdim=True)).to(params[0].device)
    rng = np.random.default_rng(derive(run.config.seed, "partitions"))
    rows = []
    with Display("gradient variance", len(prompts)) as display:
        for prompt, group in zip(prompts, _responses(run, prompts, BLOCKS * block, "variance"), strict=True):
            found = variance_rows(_rewards(run, group), _scores(run, group, params, directions), rng)
            rows += [{"prompt": prompt.id, **row} for row in found]
            display.advance()
    run.model.train()
    return rows


def variance_rows(r_N: FloatArray, s_NK: FloatArray, rng: np.random.Generator) -> Rows:
    """One row a group size. The number of responses must be a multiple of BLOCKS."""
    blocks = list(zip(np.split(r_N, BLOCKS), np.split(s_NK, BLOCKS), strict=True))
    rows = []
    for size in GROUP_SIZES:
        row: dict[str, Any] = {"group_size": size, "reward_std": float(r_N.std())}
        of_blocks = {
            "measured": np.array([measured(r, s, size, rng) for r, s in blocks]),
            "formula": np.array([formula(r, s, size) for r, s in blocks]),
        }
        for key, found in of_blocks.items():
            row |= {key: found.mean(0).tolist(), f"{key}_blocks": found.sum(1).tolist()}
        rows.append(row)
    return rows


def _responses(run: Run, prompts: Sequence[Prompt], n: int, label: str) -> list[Group]:
    """n judged responses a prompt, sampled as in training."""
    rollout = run.config.rollout
    seed = derive(run.config.seed, "gradient variance", label)
    sampling = Sampling(rollout.max_new_tokens, rollout.temperature, STOP, seed, thinking=run.judge.thinking)
    judge = Judge(run.task, run.oracle, ask_always=True, thinking=run.judge.thinking)
    judge.start_step()
    ids = [run.task.render(p, run.tokenizer) for p in prompts]
    found = {i: judge.submit(prompts[i], c).result() for i, c in run.engine.generate(ids, n, sampling)}
    return [found[i] for i in range(len(prompts))]


def _rewards(run: Run, group: Group) -> FloatArray:
    reward = run.config.reward
    alpha_c = run.controller.alpha_c if run.config.budget.controller else reward.alpha_c
    return np.array(group_rewards(run.reward, reward.function, group, reward.alpha_a, alpha_c, reward.alpha_f))


def _scores(run: Run, group: Group, params: Sequence[torch.nn.Parameter], directions_KD: torch.Tensor) -> FloatArray:
    """[n, K] float64: d log pi(response) along each direction; a backward pass for each distinct response."""
    prompt = run.task.render(group.prompt, run.tokenizer)
    of_response: dict[tuple[int, ...], list[float]] = {}
    for completion in group.completions:
        ids = completion.token_ids
        if ids not in of_response:
            grad_D = score(run.model, params, Example(prompt, ids), run.config.rollout.temperature)
            of_response[ids] = (directions_KD @ grad_D).tolist()
    return np.array([of_response[c.token_ids] for c in group.completions])


def score(
    model: PreTrainedModel, params: Sequence[torch.nn.Parameter], example: Example, temperature: float
) -> torch.Tensor:
    """[D] d log pi(response) / d weights, all weights in one vector."""
    (batch,) = packed_batches([example], len(example), model.device, padded=True)
    logprob = response_logprobs(model, batch, temperature).sum()
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(logprob, list(params))])


def agreements(rows: Sequence[Row]) -> list[dict[str, float]]:
    """Of each group size, summed over prompts, directions and policies: `measured`, `formula`, their `ratio` and its
    95% interval `low` to `high`, for which the blocks of responses are the sample."""
    found = []
    for (size,), chosen in sorted(grouped(rows, "group_size").items()):
        m_B, f_B = (np.sum([row[f"{key}_blocks"] for row in chosen], axis=0) for key in ("measured", "formula"))
        m, f = float(m_B.mean()), float(f_B.mean())
        # a ratio of means: its error is that of the residuals' mean (delta method)
        low, high = stats.ttest_1samp(m_B - m / f * f_B, 0).confidence_interval()
        found.append({"group_size": size, "measured": m, "formula": f, "ratio": m / f}
                     | {"low": m / f + float(low) / f, "high": m / f + float(high) / f})  # fmt: skip
    return found


def variance_table(rows: Sequence[Row]) -> Table:
    """Variances relative to the formula's at the smallest G, and at an equal number of responses."""
    found = agreements(rows)
    smallest, unit = found[0]["group_size"], found[0]["formula"]
    cells = [
        [
            str(a["group_size"]),
            f"{a['measured'] / unit:.3f}",
            f"{a['formula'] / unit:.3f}",
            f"{a['ratio']:.3f} ({a['low']:.3f} to {a['high']:.3f})",
            f"{a['formula'] * a['group_size'] / (unit * smallest):.3f}",
            "same" if a["low"] <= 1 <= a["high"] else "more" if a["low"] > 1 else "less",
        ]
        for a in found
    ]
    title = f"Variance of one group's gradient at fixed prompts (formula at G = {smallest} is 1)"
    columns = ("G", "measured", "formula", "measured / formula (95%)", "formula at equal responses", "measured is")
    return Table(title, columns, cells)


def draw_variance(axis: Axes, rows: Sequence[Row]) -> None:
    """A dot a (prompt, direction): the formula's variance against the measured one, a colour a G."""
    for size, colour in zip(GROUP_SIZES, COLOURS, strict=False):
        chosen = [row for row in rows if row["group_size"] == size]
        x, y = (np.concatenate([row[key] for row in chosen]) for key in ("formula", "measured"))
        axis.scatter(x, y, s=8, alpha=0.6, color=colour, linewidth=0, label=f"G = {size}")
    axis.set(xscale="log", yscale="log", xlabel="by the formula", ylabel="measured")
    axis.axline((1e-4, 1e-4), (1e-3, 1e-3), color="black", linewidth=0.8, linestyle="--")
    axis.set_title("variance at one prompt, along one direction")
    axis.legend(fontsize=SMALL)


def draw_sizes(axis: Axes, rows: Sequence[Row]) -> None:
    """Both variances over G, summed over prompts and directions."""
    found = pd.DataFrame(agreements(rows))
    at = found["group_size"]
    axis.plot(at, found["formula"], color="black", linewidth=1, label="formula")
    axis.plot(at, found["measured"], "o", color=COLOURS[0], label="measured")
    axis.set(xscale="log", yscale="log", xlabel="G", title="variance of a group's gradient, summed")
    axis.minorticks_off()
    axis.set_xticks(at, [str(g) for g in at])
    axis.legend(fontsize=SMALL)


def measured_rows(runs: Sequence[Finished]) -> Rows:
    """The rows of runs that measured it, each with the arm's label and seed."""
    return [
        {"label": run.arm.label, "seed": run.arm.seed, **row}
        for run in runs
        for row in run.rows(GRADIENT_VARIANCE.name)
    ]


GRADIENT_VARIANCE = Predictions("gradient_variance", gradient_variance)
