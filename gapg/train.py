"""GAPG, top to bottom (arXiv 2509.24050).

    prompts -> engine.generate(G) -> judge (parse, verify, oracle) -> filter (D1, D2) -> pack -> policy loss
            -> backward -> step -> engine.sync

What is left out of GRPO, and why: no std scaling and no length mean (log pi(y|x) is the sum over the response's tokens,
so the estimator is the true policy gradient of the expected reward), no ratio and no clip (one update per fresh batch),
no KL to a reference; `loss` in the config brings each of them back. What is added: a response may end by calling the
cloud, which pays alpha_c < alpha_a if the cloud is right; the filter chooses which prompts a step learns from; the
controller moves alpha_c to hold the cloud budget.

`method: marginal` is the other half of the story: nobody decides while training. Responses are sampled with help
forbidden, so each is right or wrong; the policy's own chance of calling instead is scored against that for every price
of a call at once (`gapg.marginal`). It needs no cloud, no filter and no controller: a budget is a threshold, set later.
"""

from __future__ import annotations

import math
import random
import time
from typing import Any

import torch

from gapg.console import Display
from gapg.examples import sampled, sampled_masked
from gapg.filtering import Selection, select
from gapg.judge import Group, Outcome
from gapg.model.finite import is_finite
from gapg.optim import learning_rate
from gapg.reward import RewardError, group_rewards
from gapg.runs import checkpoint, health, outage, stop
from gapg.runs.run import Run, Validate
from gapg.seeding import derive
from gapg.update import policy_update
from gapg_kernels.policy_loss import group_advantages


def train(run: Run, validate: Validate) -> None:
    """Runs to `config.steps`, checkpointing on the way.

    Raises OracleDown, after saving, when the oracle stays away, and Stopped, after saving, when a signal came; and
    Diverged, which leaves the checkpoints as they are, when numbers are not finite or `reward.function` gives something
    else than rewards.
    """
    config, state = run.config, run.state
    if state.step == 0 and config.eval.every:
        run.tracker.log({"step": 0, **validate(run)})
    saved_at, most_s = time.monotonic(), 60 * (config.checkpoint_minutes or math.inf)
    with stop.between_steps(), Display(config.method, config.steps, state.step) as display:
        while state.step < config.steps:
            row = train_step(run)
            state.step += 1
            last = state.step == config.steps
            if config.eval.every and (state.step % config.eval.every == 0 or last):
                with run.phases("evaluate"):
                    row |= validate(run)
            best = not row["skipped"] and _is_best(run, row)
            health.warn_if_collapsed(config, state, row)
            row |= {f"seconds/{name}": seconds for name, seconds in run.phases.take().items()}
            run.tracker.log({"step": state.step, **row})
            if state.bad_in_a_row >= health.BAD_STEPS:
                raise health.bad_steps(config, state.step, row, checkpoint.newest(run.folder / "checkpoints"))
            late = state.step % config.checkpoint_every == 0 or time.monotonic() - saved_at >= most_s
            due = not row["skipped"] and (late or last or best)
            down, signal = outage.verdict(state, run.failure, last), stop.requested()
            # after the row: a kill between the two repeats a step, the other way round its row would be lost
            if due or down or signal:
                run.save()
                saved_at = time.monotonic()
            if down:
                raise outage.OracleDown(down)
            if signal:
                raise stop.Stopped(f"{signal}: step {state.step} of {config.steps} is saved; go on with --resume")
            display.advance(
                f"trained {row['groups/with_gradient']}/{config.rollout.prompts_per_step}  "
                f"local {row['local_accuracy']:.2f}  called {row['call_fraction']:.2f}  "
                f"together {row['accuracy']:.2f}  {_signal(row)}  log-prob gap {row['logprob_gap']:.0e}"
            )


def train_step(run: Run) -> dict[str, Any]:
    """One update from fresh responses: the method. Raises Diverged."""
    config = run.config
    prompts = run.queue.next(config.rollout.prompts_per_step)
    ids_of = {p.id: run.task.render(p, run.tokenizer) for p in prompts}

    marginal = config.method == "marginal"
    run.judge.start_step()
    with run.phases("rollout"):
        pending = {
            i: run.judge.submit(prompts[i], completions)
            for i, completions in run.engine.generate(
                [ids_of[p.id] for p in prompts], config.rollout.samples_per_prompt, run.sampling("rollout", run.help)
            )
        }
    with run.phases("oracle"):
        groups = [pending[i].result() for i in range(len(prompts))]
    run.queue.give_back(g.prompt for g in groups if g.unknown)
    run.failure = outage.watch(run.state, groups)
    health.say_if_thinking(groups, ids_of, run.help)

    rng = random.Random(derive(config.seed, "filter", run.state.step))
    filtered = config.budget.filter and not marginal
    selection = select(groups, config.budget.exact_rho if filtered else None, rng)

    alpha_c = run.controller.alpha_c if config.budget.controller and not marginal else config.reward.alpha_c
    rollout_lost = health.is_lost(groups)
    kept = [] if rollout_lost else selection.kept
    rewards_PG = _rewards(run, kept, alpha_c)
    examples, masked = sampled_masked(kept, ids_of, run.help) if run.help else (sampled(kept, ids_of), None)
    with run.phases("update"):
        update = policy_update(
            run.model, run.optimizer, config, run.state.step, examples, rewards_PG, run.reference, masked
        )
        if not is_finite(run.model, getattr(torch, config.model.dtype)):
            raise _diverged(run, health.RUINED, "lower optim.lr")
    with run.phases("sync"):
        run.engine.sync(run.model.state_dict())

    run.state.empty_steps += not selection.kept
    row = _metrics(run, groups, selection) | update | {"alpha_c": alpha_c, "rollout_lost": int(rollout_lost)}
    row["groups/with_gradient"] = len(kept) if marginal else int((rewards_PG != rewards_PG[:, :1]).any(1).sum())
    row["skipped"] += rollout_lost
    health.watch(run.state, row, selection)
    row["bad_steps"] = run.state.bad_steps
    if config.budget.controller and not marginal and not rollout_lost:
        pace = learning_rate(config.optim, run.state.step, config.steps) / config.optim.lr
        run.controller.observe(row["call_fraction"], row["local_accuracy"], pace)
    return row


def _rewards(run: Run, kept: list[Group], alpha_c: float) -> torch.Tensor:
    """What the responses of D are worth, [P, G] float32. Raises Diverged where that is not a finite number.

    Under `method: marginal` that is r: 1 for a right answer, 0 for a wrong one.
    """
    reward = run.config.reward
    if run.config.method == "marginal":
        right = [[float(o is Outcome.LOCAL_CORRECT) for o in g.outcomes] for g in kept]
        return torch.tensor(right, dtype=torch.float32).reshape(len(kept), run.config.rollout.samples_per_prompt)
    try:
        table = [group_rewards(run.reward, reward.function, g, reward.alpha_a, alpha_c, reward.alpha_f) for g in kept]
    except RewardError as error:
        raise _diverged(run, str(error), "mend the function") from error
    rewards_PG = torch.tensor(table, dtype=torch.float32).reshape(len(kept), run.config.rollout.samples_per_prompt)
    advantages_PG = group_advantages(rewards_PG, run.config.loss.advantage)
    # a standard deviation that overflows makes 0 of all
    lost_P = (rewards_PG != rewards_PG[:, :1]).any(1) & (advantages_PG == 0).all(1)
    if lost_P.any() or not advantages_PG.isfinite().all():
        what = f"the rewards of reward.function={reward.function} overflow float32: up to {rewards_PG.abs().max():.3g}"
        raise _diverged(run, what, "make them smaller")
    return rewards_PG


def _diverged(run: Run, what: str, fix: str) -> health.Diverged:
    return health.diverged(f"step {run.state.step + 1}", what, fix, checkpoint.newest(run.folder / "checkpoints"))


def _signal(row: dict[str, Any]) -> str:
    """What the decision follows: the price of a call, or how good a forecast of a right answer it is (0 is best)."""
    return f"Brier {row['marginal/brier']:.3f}" if "marginal/brier" in row else f"alpha_c {row['alpha_c']:.2f}"


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
