"""The quickstart's comparison: GAPG beside its warm start, the task-tuned model with two routers, and the cloud alone.

GAPG and the task-tuned baseline start from the same warm start and train side by side, in two processes.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

from gapg.config import RunConfig
from gapg.judge import Judge
from gapg.rollout.records import HelpControl, Sampling
from gapg.run import Run, build_run, make_oracle, make_task, open_folder, set_threads
from gapg.seeding import derive
from gapg.studies.routers import at_random, by_logprob, logprob_threshold, offload
from gapg.tasks.base import STOP, Split
from gapg.tracking import read_jsonl, say, write_whole
from gapg.train import train
from gapg.use.calibrate import fit_bias, help_control, masked
from gapg.use.evaluate import Result, mcnemar, prediction, respond
from gapg.use.report import plot_run, print_table
from gapg.use.validate import validate


def task_tuned_config(config: RunConfig) -> RunConfig:
    """The same run with calls that never pay: task-tuning only; help is not masked (in training that is unstable)."""
    return config.model_copy(
        update={
            "output_dir": config.output_dir / "task-tuned",
            "reward": config.reward.model_copy(update={"alpha_c": 0.0}),
            "budget": config.budget.model_copy(update={"filter": False, "controller": False}),
            "compare": False,
            "threads": config.threads or 1,
        }
    )


def start_task_tuned(config: RunConfig, warm_model: Path | None) -> multiprocessing.process.BaseProcess:
    """Trains and assesses the baseline in a process of its own, which ends with this one."""
    process = multiprocessing.get_context("spawn").Process(
        target=_task_tuned, args=(task_tuned_config(config), warm_model), name="task-tuned", daemon=True
    )
    process.start()
    return process


def _task_tuned(config: RunConfig, warm_model: Path | None) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    lock = open_folder(config, resume=True)
    sys.stderr = (config.output_dir / "log.txt").open("a", buffering=1)
    set_threads(config)
    run = build_run(config, config.output_dir, make_task(config), warm_model)
    try:
        train(run, validate)
        assess_task_tuned(run)
    finally:
        run.close()
        lock.close()


def _end_with_parent() -> None:
    """A killed parent must not leave a child behind that writes into the folder of the run that resumes it."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def assess_task_tuned(run: Run) -> None:
    """Help masked, greedy and at the training temperature; the training problems set the routers' thresholds."""
    control = masked(help_control(run.tokenizer))
    for name, temperature in (("greedy", 0.0), ("sampled", run.config.rollout.temperature)):
        for split in ("train", "heldout"):
            assess(run, f"{split}-{name}", split, temperature, control)


def assess_gapg(run: Run) -> float:
    """As trained, and greedy with the bias fitted on the training problems; returns the bias."""
    control = help_control(run.tokenizer)
    assess(run, "heldout-sampled", "heldout", run.config.rollout.temperature, control)
    assess(run, "heldout-greedy", "heldout", 0.0, control)
    margins = [p["help_margin"] for p in assess(run, "train-masked", "train", 0.0, masked(control))]
    bias = fit_bias(margins, run.config.budget.cloud_fraction)
    assess(run, "heldout-calibrated", "heldout", 0.0, replace(control, bias=bias))
    return bias


def assess(run: Run, name: str, split: Split, temperature: float, control: HelpControl) -> list[dict[str, Any]]:
    """Predictions of the current policy on a split, the cloud's answer to every problem included; made once."""
    path = run.folder / "predictions" / f"{name}.jsonl"
    if path.exists():
        return read_jsonl(path)
    prompts = run.task.prompts(split)
    if split == "heldout":
        prompts = prompts[: run.config.eval.heldout]
    rollout = run.config.rollout
    sampling = Sampling(
        max_new_tokens=rollout.max_new_tokens,
        temperature=temperature,
        stop=STOP,
        seed=derive(run.config.seed, "assess", name),
        help=control,
    )
    # its own oracle, so that the run's totals stay those of training
    oracle = make_oracle(run.config.oracle, run.task, run.folder, run.config.seed)
    judge = Judge(run.task, oracle, ask_always=True)
    groups = respond(run.engine, run.task, run.tokenizer, judge, prompts, sampling, title=f"evaluate {name}")
    oracle.close()
    rows = [prediction(g) for g in groups]
    path.parent.mkdir(exist_ok=True)
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))
    return rows


def compare(config: RunConfig, bias: float) -> dict[str, Any]:
    """`summary.json`: a row a method, on the same held-out problems, and the paired tests. Reads predictions only."""
    c, folder = config.budget.cloud_fraction, config.output_dir
    tuned, ours = folder / "task-tuned" / "predictions", folder / "predictions"
    results = [_result("warm start", ours / "heldout-before.jsonl")]
    tests = []
    for decoding, gapg in (("greedy", "heldout-calibrated"), ("sampled", "heldout-sampled")):
        heldout = read_jsonl(tuned / f"heldout-{decoding}.jsonl")
        threshold = logprob_threshold(read_jsonl(tuned / f"train-{decoding}.jsonl"), c)
        alone = offload(f"task-tuned, {decoding}", heldout, [False] * len(heldout))
        chance = offload(f"+ random offloading, {decoding}", heldout, at_random(heldout, c, config.seed))
        router = offload(f"+ log-prob router, {decoding}", heldout, by_logprob(heldout, threshold))
        name = "GAPG, greedy, calibrated bias" if decoding == "greedy" else "GAPG, as trained (T=1)"
        mine = _result(name, ours / f"{gapg}.jsonl")
        results += [alone, chance, router, mine]
        for other in (chance, router):
            wins, losses, p = mcnemar(mine.correct, other.correct)
            tests.append({"a": mine.name, "b": other.name, "only_a": wins, "only_b": losses, "p": p})
    results.append(_result("GAPG, greedy, no bias", ours / "heldout-greedy.jsonl"))
    cloud = read_jsonl(ours / "heldout-greedy.jsonl")
    results.append(offload("cloud only", cloud, [True] * len(cloud)))
    return {
        "cloud_fraction": c,
        "seed": config.seed,
        "oracle": config.oracle.kind,
        "help_bias": bias,
        "rows": [r.row() for r in results],
        "paired_tests": tests,
    }


def _result(name: str, path: Path) -> Result:
    rows = [row for row in read_jsonl(path) if row["outcome"] != "unknown"]
    return Result(
        name,
        called=[r["outcome"].startswith("cloud") for r in rows],
        correct=[r["outcome"] in ("local_correct", "cloud_correct") for r in rows],
        local_correct=[r["outcome"] == "local_correct" for r in rows],
    )


def assess_before_training(run: Run) -> None:
    """The starting point, at the training temperature; call it on a run at step 0."""
    assess(run, "heldout-before", "heldout", run.config.rollout.temperature, help_control(run.tokenizer))


def finish(run: Run, baseline: multiprocessing.process.BaseProcess) -> dict[str, Any]:
    """Assesses GAPG, waits for the baseline, and leaves table, picture and summary.json. Raises RuntimeError."""
    bias = assess_gapg(run)
    if baseline.is_alive():
        say("waiting for the task-tuned baseline")
    baseline.join()
    folder = run.folder
    if baseline.exitcode:
        raise RuntimeError(f"the task-tuned baseline failed; see {folder / 'task-tuned' / 'log.txt'}, then --resume")
    summary = compare(run.config, bias)
    write_whole(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    plot_run(folder, summary, folder / "summary.png")
    print_table(summary["rows"], summary["cloud_fraction"])
    say(f"{folder}/summary.png  {folder}/summary.json  {folder}/predictions/")
    return summary
