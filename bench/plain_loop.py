"""One training step of a real run by ours and by a plain transformers loop: its rollouts, and its update.

    OMP_NUM_THREADS=2 python bench/plain_loop.py runs/arithmetic-smollm2 --rounds 3

The model is the run's last checkpoint (or any model folder, with --config), the problems its next ones. Both loops
sample as many responses to the same prompts, at the same temperature and stopped at the same tags; each samples its
own, so the figure is tokens a second. Both update on the same responses, those of ours: the plain loop pads eight
sequences, computes all logits, and has a gradient for every response.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

import record
from gapg.batches.batching import Example
from gapg.build import make_task
from gapg.commands.target import find_model
from gapg.config import load_config
from gapg.console import say
from gapg.examples import sampled
from gapg.optim import clip_and_step
from gapg.reward import group_rewards
from gapg.runs.run import Run, build_run
from gapg.tasks.base import STOP
from gapg.threads import set_threads
from gapg.update import policy_update
from gapg_kernels.policy_loss import group_advantages
from gapg_rollout.engines.transformers import TransformersEngine
from gapg_rollout.records import Engine
from peers.updates import LR, full_logits, padded
from record import Row

PLAIN = "plain transformers"
TAIL = 8
"""Tokens at the end of a response in which an ending's tag is looked for."""


def rollouts(run: Run, engine: Engine, ids: Sequence[list[int]]) -> int:
    """Samples a step's responses; returns how many tokens they have."""
    done = engine.generate(ids, run.config.rollout.samples_per_prompt, run.sampling("bench"))
    return sum(len(c.token_ids) for _, completions in done for c in completions)


@torch.no_grad()
def plain_rollouts(run: Run, ids: Sequence[list[int]]) -> int:
    """The same by `generate`, prompts padded on the left, all in one batch."""
    rollout, pad = run.config.rollout, run.tokenizer.pad_token_id
    longest = max(map(len, ids))
    rows = [[pad] * (longest - len(prompt)) + prompt for prompt in ids for _ in range(rollout.samples_per_prompt)]
    mask = [[0] * (longest - len(p)) + [1] * len(p) for p in ids for _ in range(rollout.samples_per_prompt)]
    run.model.eval()
    generate: Any = run.model.generate
    out = generate(
        input_ids=torch.tensor(rows), attention_mask=torch.tensor(mask), do_sample=True, top_k=0, top_p=1.0,
        temperature=rollout.temperature, max_new_tokens=rollout.max_new_tokens, pad_token_id=pad,
        stopping_criteria=[partial(_ended, run.tokenizer)],
    )  # fmt: skip
    run.model.train()
    # what follows an ending is padding, which is the end token for many tokenizers: the first of them counts
    responses = out[:, longest:]
    return int(((responses == pad).cumsum(1) <= 1).sum())


def _ended(tokenizer: PreTrainedTokenizerBase, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Not by `stop_strings`, which fails for tokenizers whose tokens are words."""
    return torch.tensor([text.rstrip().endswith(STOP) for text in tokenizer.batch_decode(ids[:, -TAIL:])])


def judged_step(run: Run, ids: Sequence[list[int]]) -> tuple[list[Example], torch.Tensor]:
    """Responses of ours to learn from, and what they are worth, [P, G]."""
    config, prompts = run.config, run.queue.prompts[: len(ids)]
    run.judge.start_step()
    done = run.engine.generate(ids, config.rollout.samples_per_prompt, run.sampling("bench"))
    pending = {i: run.judge.submit(prompts[i], completions) for i, completions in done}
    groups = [pending[i].result() for i in range(len(ids))]
    reward = config.reward
    table = [group_rewards(run.reward, reward.function, g, reward.alpha_a, reward.alpha_c, 0.0) for g in groups]
    return sampled(groups, {p.id: i for p, i in zip(prompts, ids, strict=True)}), torch.tensor(table)


def plain_update(run: Run, examples: Sequence[Example], rewards_PG: torch.Tensor) -> None:
    """The same gradient: eight padded sequences at a time, logits of every position."""
    advantages = group_advantages(rewards_PG, run.config.loss.advantage).flatten().tolist()
    for batch in padded(examples, advantages, rewards_PG.numel()):
        full_logits(run.model, batch).backward()
    clip_and_step(run.optimizer, LR, 1.0)


def timed(impls: Mapping[str, Callable[[], int | None]], tokens: int | None, rounds: int) -> dict[str, list[float]]:
    """Tokens a second of each call, by implementation; `tokens` of each, or as many as it returns."""
    found: dict[str, list[float]] = {name: [] for name in impls}

    def measured(name: str, call: Callable[[], int | None]) -> Callable[[], None]:
        def once() -> None:
            start = time.perf_counter()
            made = call()
            found[name].append((tokens or made or 0) / (time.perf_counter() - start))

        return once

    record.interleaved({name: measured(name, call) for name, call in impls.items()}, rounds=rounds)
    return {name: samples[1:] for name, samples in found.items()}  # the first was to warm up


def time_run(run: Run, rounds: int) -> list[Row]:
    rollout = run.config.rollout
    ids = [run.task.render(p, run.tokenizer) for p in run.queue.prompts[: rollout.prompts_per_step]]
    case = f"{len(ids)} prompts x {rollout.samples_per_prompt}"
    name = f"gapg, {rollout.engine}"
    ways: dict[str, Callable[[], int | None]] = {
        name: lambda: rollouts(run, run.engine, ids),
        PLAIN: lambda: plain_rollouts(run, ids),
    }
    if rollout.engine != "transformers":
        ours = TransformersEngine(run.model, run.tokenizer, dtype=torch.float32, max_rows=rollout.max_rows)
        ways["gapg, transformers"] = lambda: rollouts(run, ours, ids)
    rows = record.timing_rows(case, timed(ways, None, rounds), "rollouts", "tokens/s")
    say("rollouts are timed; the updates now")
    examples, rewards_PG = judged_step(run, ids)
    given = sum(map(len, examples))
    whole = run.config.model_copy(
        update={"update": run.config.update.model_copy(update={"skip_zero_advantage": False})}
    )

    def update(config: Any) -> None:
        policy_update(run.model, run.optimizer, config, 0, examples, rewards_PG)

    updates: dict[str, Callable[[], None]] = {
        "gapg": lambda: update(run.config),
        "gapg, every response": lambda: update(whole),
        PLAIN: lambda: plain_update(run, examples, rewards_PG),
    }
    live = int((rewards_PG != rewards_PG[:, :1]).any(1).sum())
    case += f", {given} tokens, {live} groups with a gradient"
    return rows + record.timing_rows(case, timed(updates, given, rounds), "update", "tokens/s")


def table(rows: Sequence[Row]) -> str:
    """Medians, and how many times as many as the plain loop's."""
    plain = {row["metric"]: row["median"] for row in rows if row["impl"] == PLAIN}
    lines = []
    for row in rows:
        times = f"{row['median'] / plain[row['metric']]:.2f}x"
        lines.append((row["case"], row["metric"], row["impl"], f"{row['median']:.0f}", times))
    return record.markdown(("step", "part", "by", "tokens/s", "of the plain loop"), lines, right=(3, 4))


def main() -> None:
    parser = record.parser(__doc__, "plain_loop")
    parser.add_argument("target", type=Path, help="a run's folder, a checkpoint, or with --config a model folder")
    parser.add_argument("--config", help="preset or YAML file; the run's own by default")
    parser.add_argument("--rounds", type=record.positive, default=3)
    args = parser.parse_args()
    model, folder = find_model(args.target)
    name = args.config or (str(folder / "config.yaml") if folder else None)
    if name is None:
        parser.error(f"{args.target} belongs to no run: give --config")
    given = {"warm_start": "none", "steps": "1", "model.path": str(model), "tensorboard": "false", "eval.every": "0"}
    config = load_config(name, {**given, "optim.lr": str(LR)})
    set_threads(config)
    with (
        tempfile.TemporaryDirectory() as scratch,
        closing(build_run(config, Path(scratch), make_task(config), model)) as run,
    ):
        rows = time_run(run, args.rounds)
    record.write("plain_loop", rows, args.output / "cpu.json")
    print(table(rows))


if __name__ == "__main__":
    main()
