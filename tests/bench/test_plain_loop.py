"""The plain loop beside ours, on a run that is small enough: it samples as much, and its update is the same update."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import plain_loop
import record
from gapg.runs.run import Run


def weights(run: Run) -> torch.Tensor:
    return torch.cat([p.detach().flatten().clone() for p in run.model.parameters()])


def test_both_updates_are_one(start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    moved = []
    for name in ("ours", "plain"):
        run = start(name)
        ids = [run.task.render(p, run.tokenizer) for p in run.queue.prompts[:6]]
        examples, rewards_PG = plain_loop.judged_step(run, ids)
        assert (rewards_PG != rewards_PG[:, :1]).any(), "there is something to learn"
        before = weights(run)
        # of the same length: AdamW's first step is the learning rate, in the gradient's direction
        if name == "ours":
            config = run.config.model_copy(update={"optim": run.config.optim.model_copy(update={"warmup_steps": 0})})
            plain_loop.policy_update(run.model, run.optimizer, config, 0, examples, rewards_PG)
            monkeypatch.setattr(plain_loop, "LR", config.optim.lr)
        else:
            plain_loop.plain_update(run, examples, rewards_PG)
        moved.append(weights(run) - before)
    cosine = torch.nn.functional.cosine_similarity(moved[0].double(), moved[1].double(), dim=0)
    assert moved[0].norm() > 0 and cosine > 0.999


def test_tokens_are_counted_to_the_ending_and_the_rows_fit_the_record(
    start: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start()
    ids = [run.task.render(p, run.tokenizer) for p in run.queue.prompts[:4]]
    generate, made = run.model.generate, []
    monkeypatch.setattr(run.model, "generate", lambda **given: made.append(generate(**given)) or made[0])
    counted = plain_loop.plain_rollouts(run, ids)
    longest, pad, by_hand = max(map(len, ids)), run.tokenizer.pad_token_id, 0
    for row in made[0][:, longest:].tolist():
        written = row[: row.index(pad)] if pad in row else row
        tagged = run.tokenizer.decode(written).endswith(("</answer>", "</unknown>"))
        assert tagged or len(written) == len(row) or pad == run.tokenizer.eos_token_id
        by_hand += len(written) if tagged or len(written) == len(row) else len(written) + 1
    assert counted == by_hand > 0
    saved: list[list[record.Row]] = []
    rows = plain_loop.time_run(run, 2, saved.append)
    assert [{r["metric"] for r in part} for part in saved] == [{"rollouts"}]
    record.write("plain_loop", rows, tmp_path / "cpu.json")
    assert {(r["impl"], r["metric"]) for r in rows} == {
        ("gapg, transformers", "rollouts"), ("plain transformers", "rollouts"),
        ("gapg", "update"), ("gapg, every response", "update"), ("plain transformers", "update"),
    }  # fmt: skip
    assert all(r["unit"] == "tokens/s" and len(r["samples"]) == 2 and r["median"] > 0 for r in rows)
    table = plain_loop.table(rows)
    assert table.count("1.00x") >= 2 and "gapg, every response" in table
