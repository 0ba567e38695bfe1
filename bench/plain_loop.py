"""One training step of a real run by ours and by a plain transformers loop: its rollouts, and its update.

    OMP_NUM_THREADS=2 python bench/plain_loop.py runs/arithmetic-smollm2 --rounds 3

The model is the run's last checkpoint (or any model folder, with --config), the problems the first of its training
problems; whatever its cloud is, none is asked, and a call counts as right. Both loops sample as many responses to the
same prompts, at the same temperature and stopped at the same tags; each samples its own, so the figure is tokens a
second. To ours belongs that the engine gets new weights, as after every update. Both update by method=gapg on the same
responses, those of ours: the plain loop pads eight sequences, computes all logits, and has a gradient for each.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from functools import partial
from itertools import count
from operator import attrgetter
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
from gapg.judge import parse
from gapg.optim import clip_and_step
from gapg.runs.run import Run, build_run
from gapg.tasks.base import STOP, Verdict
from gapg.threads import set_threads
from gapg.update import policy_update
from gapg_kernels.policy_loss import group_advantages
from gapg_rollout.engines.transformers import TransformersEngine
from gapg_rollout.records import Engine
from peers.updates import LR, full_logits, padded
from record import Row

PLAIN = "plain transformers"
PLAIN_ONLY: dict[str, Any] = {
    "method": "gapg", "model.dtype": "float32", "rollout.temperature": 1.0, "loss.aggregation": "sequence_sum",
    "loss.epochs": 1, "loss.tis_cap": None, "loss.kl_coef": 0.0,
}  # fmt: skip
"""What a run must be for the plain loop's gradient to be its own."""
TAIL = 8
"""Tokens at the end of a response in which an ending's tag is looked for."""


def rollouts(run: Run, engine: Engine, ids: Sequence[list[int]], round: int) -> int:
    """A step's responses by the weights of now, others each round; returns how many tokens they have."""
    engine.sync(run.model.state_dict())
    done = engine.generate(ids, run.config.rollout.samples_per_prompt, run.sampling(f"bench {round}"))
    return sum(len(c.token_ids) for _, completions in done for c in completions)


@torch.no_grad()
def plain_rollouts(run: Run, ids: Sequence[list[int]]) -> int:
    """The same by `generate`, prompts padded on the left, all in one batch."""
    rollout, pad, device = run.config.rollout, run.tokenizer.pad_token_id, run.model.device
    longest = max(map(len, ids))
    rows = [[pad] * (longest - len(prompt)) + prompt for prompt in ids for _ in range(rollout.samples_per_prompt)]
    mask = [[0] * (longest - len(p)) + [1] * len(p) for p in ids for _ in range(rollout.samples_per_prompt)]
    run.model.eval()
    generate: Any = run.model.generate
    out = generate(
        input_ids=torch.tensor(rows, device=device), attention_mask=torch.tensor(mask, device=device), do_sample=True,
        top_k=0, top_p=1.0, temperature=rollout.temperature, max_new_tokens=rollout.max_new_tokens, pad_token_id=pad,
        stopping_criteria=[partial(_ended, run.tokenizer)],
    )  # fmt: skip
    run.model.train()
    return sum(_length(run.tokenizer, row) for row in out[:, longest:].tolist())


def _length(tokenizer: PreTrainedTokenizerBase, row: list[int]) -> int:
    """A response's tokens, without the padding that follows; many tokenizers pad with the end token, which counts."""
    n = row.index(tokenizer.pad_token_id) if tokenizer.pad_token_id in row else len(row)
    ended = tokenizer.pad_token_id != tokenizer.eos_token_id or _at_a_tag(str(tokenizer.decode(row[:n][-TAIL:])))
    return n + (n < len(row) and not ended)


def _at_a_tag(text: str) -> bool:
    return text.rstrip().endswith(STOP)


def _ended(tokenizer: PreTrainedTokenizerBase, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Not by `stop_strings`, which fails for tokenizers whose tokens are words."""
    return torch.tensor([_at_a_tag(text) for text in tokenizer.batch_decode(ids[:, -TAIL:])], device=ids.device)


def judged_step(run: Run, ids: Sequence[list[int]]) -> tuple[list[Example], torch.Tensor]:
    """Responses of ours to learn from, and what they are worth, [P, G]; nobody is asked, and a call counts as right."""
    reward, examples = run.config.reward, list[Example]()
    rewards_PG = torch.zeros(len(ids), run.config.rollout.samples_per_prompt)
    run.judge.start_step()
    for p, completions in run.engine.generate(ids, rewards_PG.shape[1], run.sampling("bench")):
        said = [parse(c.text, run.judge.thinking) for c in completions]
        verdicts = run.task.verify(run.queue.prompts[p], [response.answer or "" for response in said])
        for i, (c, response, verdict) in enumerate(zip(completions, said, verdicts, strict=True)):
            examples.append(Example(ids[p], c.token_ids, rollout_logprobs=c.logprobs, group=p, sample=i))
            right = reward.alpha_a * (verdict is Verdict.CORRECT)
            rewards_PG[p, i] = reward.alpha_c if response.kind == "help" else right
    return sorted(examples, key=lambda e: (e.group, e.sample)), rewards_PG


def plain_update(run: Run, examples: Sequence[Example], rewards_PG: torch.Tensor) -> None:
    """The same gradient: eight padded sequences at a time, logits of every position."""
    advantages = group_advantages(rewards_PG, run.config.loss.advantage).flatten().tolist()
    for batch in padded(examples, advantages, rewards_PG.numel()):
        full_logits(run.model, batch.tensors(lambda x: x.to(run.model.device))).backward()
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


def time_run(run: Run, rounds: int, save: Callable[[list[Row]], object]) -> list[Row]:
    """Each part's rows, which `save` gets as they come."""
    rollout = run.config.rollout
    ids = [run.task.render(p, run.tokenizer) for p in run.queue.prompts[: rollout.prompts_per_step]]
    case = f"{len(ids)} prompts x {rollout.samples_per_prompt}"
    name = f"gapg, {rollout.engine}"
    nth = count()
    ways: dict[str, Callable[[], int | None]] = {
        name: lambda: rollouts(run, run.engine, ids, next(nth)),
        PLAIN: lambda: plain_rollouts(run, ids),
    }
    if rollout.engine != "transformers":
        ours = TransformersEngine(run.model, run.tokenizer, dtype=torch.float32, max_rows=rollout.max_rows)
        ways["gapg, transformers"] = lambda: rollouts(run, ours, ids, next(nth))
    torch.manual_seed(run.config.seed)
    rows = record.timing_rows(case, timed(ways, None, rounds), "rollouts", "tokens/s")
    save(rows)
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
    given = {"warm_start": "none", "steps": "1", "model.path": str(model), "eval.every": "0", "optim.lr": str(LR)}
    config = load_config(name, {**given, "tensorboard": "false", "wandb": "false"})
    for key, value in PLAIN_ONLY.items():
        if (found := attrgetter(key)(config)) != value:
            parser.error(f"the plain loop has {key}={value}, and this run {found}: name another run")
    set_threads(config)
    with (
        tempfile.TemporaryDirectory() as scratch,
        closing(build_run(config, Path(scratch), make_task(config), model)) as run,
    ):
        save = partial(record.write, "plain_loop", path=args.output / "cpu.json")
        rows = time_run(run, args.rounds, save)
    save(rows)
    print(table(rows))


if __name__ == "__main__":
    main()
