"""GAPG, top to bottom (arXiv 2509.24050).

    prompts -> engine.generate(G) -> judge (parse, verify, oracle) -> filter (D1, D2) -> pack -> policy loss
            -> backward -> step -> engine.sync

What is left out of GRPO, and why: no std scaling and no length mean (log pi(y|x) is the sum over the response's tokens,
so the estimator is the true policy gradient of the expected reward), no ratio and no clip (one update per fresh batch),
no KL to a reference; `loss` in the config brings each of them back. What is added: a response may end by calling the
cloud, which pays alpha_c < alpha_a if the cloud is right; the filter chooses which prompts a step learns from; the
controller moves alpha_c to hold the cloud budget.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from gapg.batching import Example, packed_batches
from gapg.config import LossConfig
from gapg.filtering import Selection, select
from gapg.judge import Group, Outcome
from gapg.kernels.policy_loss import PolicyLossOptions, group_advantages, summarize
from gapg.optim import clip_and_step, learning_rate
from gapg.policy import response_logprobs, response_loss
from gapg.run import Run, Validate
from gapg.seeding import derive
from gapg.tracking import Display, warn

COLLAPSED_AFTER = 20
UNKNOWN_STEPS = 3


class OracleDown(RuntimeError):
    """The oracle failed every group of several steps in a row; the run was saved and can be resumed."""


def train(run: Run, validate: Validate) -> None:
    """Runs to `config.steps`, checkpointing on the way. Raises OracleDown, after saving, when the oracle stays away."""
    config, state = run.config, run.state
    if state.step == 0 and config.eval.every:
        run.tracker.log({"step": 0, **validate(run)})
    with Display("gapg", config.steps, state.step) as display:
        while state.step < config.steps:
            row = train_step(run)
            state.step += 1
            last = state.step == config.steps
            if config.eval.every and (state.step % config.eval.every == 0 or last):
                with run.phases("evaluate"):
                    row |= validate(run)
            best = _is_best(run, row)
            _warn_if_collapsed(run, row)
            row |= {f"seconds/{name}": seconds for name, seconds in run.phases.take().items()}
            run.tracker.log({"step": state.step, **row})
            lost = state.all_unknown >= UNKNOWN_STEPS
            # after the row: a kill between the two repeats a step, the other way round its row would be lost
            if state.step % config.checkpoint_every == 0 or last or best or lost:
                run.save()
            if lost:
                raise OracleDown(f"the oracle failed all of {UNKNOWN_STEPS} steps; saved: mend it, then --resume")
            display.advance(
                f"local {row['local_accuracy']:.2f}  called {row['call_fraction']:.2f}  "
                f"together {row['accuracy']:.2f}  alpha_c {row['alpha_c']:.2f}  "
                f"log-prob gap {row['logprob_gap']:.0e}"
            )


def train_step(run: Run) -> dict[str, Any]:
    """One update from fresh responses: the method."""
    config = run.config
    prompts = run.queue.next(config.rollout.prompts_per_step)
    ids_of = {p.id: run.task.render(p, run.tokenizer) for p in prompts}

    with run.phases("rollout"):
        pending = {
            i: run.judge.submit(prompts[i], completions)
            for i, completions in run.engine.generate(
                [ids_of[p.id] for p in prompts], config.rollout.samples_per_prompt, run.sampling("rollout")
            )
        }
    with run.phases("oracle"):
        groups = [pending[i].result() for i in range(len(prompts))]
    run.queue.give_back(g.prompt for g in groups if g.unknown)

    rng = random.Random(derive(config.seed, "filter", run.state.step))
    selection = select(groups, config.budget.exact_rho if config.budget.filter else None, rng)

    alpha_c = run.controller.alpha_c if config.budget.controller else config.reward.alpha_c
    rewards_PG = torch.tensor(
        [run.reward(g, config.reward.alpha_a, alpha_c, config.reward.alpha_f) for g in selection.kept]
    )
    with run.phases("update"):
        examples = _examples(config.loss, selection.kept, rewards_PG, ids_of)
        tokens = sum(len(c.token_ids) for g in selection.kept for c in g.completions)
        update = _update(run, examples, rewards_PG, tokens)
    with run.phases("sync"):
        run.engine.sync(run.model.state_dict())

    run.state.empty_steps += not selection.kept
    run.state.all_unknown = run.state.all_unknown + 1 if selection.unknown == len(groups) else 0
    row = _metrics(run, groups, selection) | update | {"alpha_c": alpha_c}
    if config.budget.controller:
        run.controller.observe(row["call_fraction"])
    return row


def _examples(
    loss: LossConfig, kept: Sequence[Group], rewards_PG: torch.Tensor, ids_of: Mapping[str, Sequence[int]]
) -> list[Example]:
    """The responses of D that have a gradient: all under a KL penalty, else those whose advantage is not exactly 0."""
    if not kept:
        return []
    matters = (group_advantages(rewards_PG, loss.advantage) != 0) | bool(loss.kl_coef)
    return [
        Example(ids_of[g.prompt.id], c.token_ids, rollout_logprobs=c.logprobs, group=p, sample=i)
        for p, g in enumerate(kept)
        for i, c in enumerate(g.completions)
        if matters[p, i]
    ]


def _update(run: Run, examples: list[Example], rewards_PG: torch.Tensor, tokens: int) -> dict[str, Any]:
    """The loss over packed micro-batches and one optimizer step an epoch (none for an empty D)."""
    config, loss = run.config, run.config.loss
    forward = {"temperature": config.rollout.temperature, "compute": getattr(torch, config.model.dtype)}
    denominator = max(1, tokens if loss.aggregation == "token_mean" else rewards_PG.numel())
    batches = packed_batches(examples, config.token_cap, run.model.device)
    with torch.no_grad():
        reference = [None if run.reference is None else response_logprobs(run.reference, b, **forward) for b in batches]
    old: list[torch.Tensor | None] = [None] * len(batches)
    lr, norms, stats = learning_rate(config.optim, run.state.step, config.steps), [0.0], []
    gaps = [torch.zeros((), device=run.model.device)]
    for epoch in range(loss.epochs if len(rewards_PG) else 0):
        for i, batch in enumerate(batches):
            clip = loss.clip if epoch else None  # the first epoch's ratio is 1
            options = PolicyLossOptions(loss.advantage, clip, loss.tis_cap, loss.kl, loss.kl_coef)
            out = response_loss(
                run.model, batch, rewards_PG, denominator, options, **forward,
                old_logprob=old[i], reference_logprob=reference[i], with_entropy=loss.entropy,
            )  # fmt: skip
            out.loss.backward()
            stats.append(out.stats)
            if epoch == 0:
                old[i] = out.logprob if loss.epochs > 1 else None
                gaps.append((out.logprob - batch.rollout_logprob).abs().max())
        for param in run.model.parameters():
            if param.requires_grad and param.grad is None:  # every advantage was zero: a step with a zero gradient
                param.grad = torch.zeros_like(param)
        norms.append(float(clip_and_step(run.optimizer, lr, config.optim.grad_clip)))
    return {
        "lr": lr,
        "grad_norm": norms[-1],
        "clipped": sum(norm > config.optim.grad_clip for norm in norms),
        "logprob_gap": float(torch.stack(gaps).max()),
        "tokens_trained": sum(len(e.prompt_ids) + len(e.response_ids) for e in examples),
        **{f"policy/{name}": value for name, value in summarize(stats).items() if name in _shown(loss)},
    }


def _shown(loss: LossConfig) -> set[str]:
    """The loss's statistics that say something; ratio and ess are to the engine's log-probs in a step's first epoch."""
    clip = {"clip_fraction"} if loss.clip else set()
    return (
        {"loss", "ratio_min", "ratio_max", "ess", "kl", "entropy"}
        | clip
        | ({"tis_fraction"} if loss.tis_cap else set())
    )


def _metrics(run: Run, groups: list[Group], selection: Selection) -> dict[str, Any]:
    """What happened in the rollouts of a step; fractions are of all samples, before filtering."""
    outcomes = [o for g in groups for o in g.outcomes]
    lengths = [len(c.token_ids) for g in groups for c in g.completions]
    share = {o: outcomes.count(o) / len(outcomes) for o in Outcome}
    usage = run.oracle.usage
    return {
        "accuracy": share[Outcome.LOCAL_CORRECT] + share[Outcome.CLOUD_CORRECT],
        "local_accuracy": share[Outcome.LOCAL_CORRECT],
        "call_fraction": sum(g.calls for g in groups) / len(outcomes),
        **{f"outcome/{o.value}": part for o, part in share.items()},
        "both_endings": sum(g.both_endings for g in groups) / len(outcomes),
        "verifier_limits": sum(g.limits for g in groups),
        "response_tokens": sum(lengths) / len(lengths),
        "tokens_sampled": sum(lengths),
        "groups/d1": selection.d1,
        "groups/d2": selection.d2,
        "groups/d2_kept": selection.d2_kept,
        "groups/unsolved": selection.unsolved,
        "groups/unknown": selection.unknown,
        "groups/trained": len(selection.kept),
        "empty_steps": run.state.empty_steps,
        "oracle/requests": usage.requests,
        "oracle/cache_hits": usage.cache_hits,
        "oracle/failures": usage.failures,
        "oracle/tokens": usage.prompt_tokens + usage.completion_tokens,
        "oracle/cost": usage.cost,
    }


def _is_best(run: Run, row: dict[str, Any]) -> bool:
    """Best on validation so far: accuracy together, less what the call fraction is over the budget."""
    if "eval/accuracy" not in row or row.get("eval/unknown"):
        return False
    score = row["eval/accuracy"] - max(0.0, row["eval/call_fraction"] - run.config.budget.cloud_fraction)
    if run.state.best_score is not None and score <= run.state.best_score:
        return False
    run.state.best_score, run.state.best_step = score, run.state.step
    return True


def _warn_if_collapsed(run: Run, row: dict[str, Any]) -> None:
    state, f = run.state, row["call_fraction"]
    pays = row["alpha_c"] > 0  # task-tuning only is meant never to call
    state.never_called = state.never_called + 1 if f == 0 and pays else 0
    state.always_called = state.always_called + 1 if f == 1 else 0
    if COLLAPSED_AFTER in (state.never_called, state.always_called):
        what = "never called the cloud" if state.never_called else "always called the cloud"
        fix = "raise reward.alpha_c" if state.never_called else "lower reward.alpha_c"
        warn(f"policy collapsed: it {what} for {COLLAPSED_AFTER} steps; {fix} or lengthen the warm start")
