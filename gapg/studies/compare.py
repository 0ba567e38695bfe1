"""The quickstart's comparison: GAPG beside its warm start, the task-tuned model with two routers, and the cloud alone.

GAPG and the task-tuned baseline start from the same warm start and train side by side, in two processes.
"""

from __future__ import annotations

import math
import multiprocessing
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from multiprocessing import connection, resource_tracker
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from gapg.build import fitting_prompts, make_oracle, make_task, oracle_account
from gapg.config import ConfigError, RunConfig
from gapg.evaluation.calibrate import fit_bias, help_control, masked
from gapg.evaluation.evaluate import Result, mcnemar, prediction, respond
from gapg.evaluation.report import plot_run, print_table
from gapg.evaluation.validate import validate
from gapg.files import DiskFull, remove_partials, write_whole, writing
from gapg.jsonl import read_jsonl, to_json
from gapg.judge import Judge
from gapg.model.load import load_tokenizer
from gapg.runs import run_identity, stop
from gapg.runs.health import Diverged
from gapg.runs.outage import OracleDown, check_evaluation
from gapg.runs.run import Run, build_run, set_threads
from gapg.runs.run_dir import open_folder, save_config
from gapg.runs.tracking import say, warn
from gapg.seeding import derive
from gapg.studies.pool import end_with_parent
from gapg.studies.routers import at_random, by_logprob, logprob_threshold, offload
from gapg.tasks.base import STOP
from gapg.train import train
from gapg_rollout.records import HelpControl, Sampling

CLOUD_FAILED = 3
"""Exit code of a baseline that the cloud failed."""

LAST_STEP_S = 120.0
"""How long a baseline that is told to end may take for its step."""


class BaselineFailed(RuntimeError):
    """The baseline's process ended with an error."""


def task_tuned_config(config: RunConfig) -> RunConfig:
    """The same run with calls that never pay: task-tuning only; help is not masked (in training that is unstable)."""
    return config.model_copy(
        update={
            "output_dir": config.output_dir / "task-tuned",
            # one cache and one cap: an answer is paid for once
            "oracle": config.oracle.model_copy(
                update={
                    "cache": config.oracle.cache or str(config.output_dir / "oracle.sqlite"),
                    "account": oracle_account(config, config.output_dir),
                }
            ),
            "reward": config.reward.model_copy(update={"alpha_c": 0.0}),
            "budget": config.budget.model_copy(update={"filter": False, "controller": False}),
            "compare": False,
            "threads": config.threads or 1,
        }
    )


def check_alive(baseline: BaseProcess, folder: Path) -> None:
    """Raises as soon as the baseline has failed, so that nobody waits for half a comparison: OracleDown where the cloud
    failed it, else BaselineFailed. A signal that ends this run may have ended it too: that is no failure."""
    if baseline.exitcode and not stop.requested():
        log = folder / "task-tuned" / "log.txt"
        if baseline.exitcode == CLOUD_FAILED:
            raise OracleDown(f"the oracle failed the task-tuned baseline; see {log}, mend it, then go on with --resume")
        raise BaselineFailed(f"the task-tuned baseline failed; see {log}, then go on with --resume")


@contextmanager
def task_tuned(config: RunConfig, warm_model: Path | None) -> Iterator[BaseProcess]:
    """Trains and assesses the baseline in a process of its own.

    Where this process ends early, so does that one: after its step, which it saves.
    """
    context = multiprocessing.get_context("spawn")
    begun, begins = context.Pipe(duplex=False)
    process = context.Process(
        target=_task_tuned, args=(task_tuned_config(config), warm_model, begins), name="task-tuned", daemon=True
    )
    # here, because starting it would let the signals through
    resource_tracker.ensure_running()
    with stop.held_back():
        process.start()
    try:
        yield process
    finally:
        if process.is_alive() and begun.poll():
            process.terminate()
            process.join(LAST_STEP_S)
        process.kill()


def _task_tuned(config: RunConfig, warm_model: Path | None, begins: connection.Connection[Any, Any]) -> None:
    threading.Thread(target=end_with_parent, daemon=True).start()
    try:
        with writing(config.output_dir):
            config.output_dir.mkdir(exist_ok=True)
            sys.stderr = (config.output_dir / "log.txt").open("a", buffering=1)
        with stop.listening(once=False):
            begins.send(True)
            _train_task_tuned(config, warm_model)
    except (OracleDown, ConfigError, DiskFull, Diverged, stop.Stopped) as error:
        say(f"gapg: {error}")
        sys.exit(CLOUD_FAILED if isinstance(error, OracleDown) else 1)


def _train_task_tuned(config: RunConfig, warm_model: Path | None) -> None:
    with open_folder(config, resume=(config.output_dir / "config.yaml").exists()):
        task = make_task(config)
        run_identity.begin(config.output_dir, config, task, load_tokenizer(config.model, task))
        save_config(config)
        set_threads(config)
        run = build_run(config, config.output_dir, task, warm_model)
        try:
            train(run, validate)
            assess_task_tuned(run)
        finally:
            run.close()


def assess_task_tuned(run: Run) -> None:
    """Help masked, greedy and at the training temperature; the validation problems set the routers' thresholds."""
    control = masked(help_control(run.tokenizer))
    for name, temperature in (("greedy", 0.0), ("sampled", run.config.rollout.temperature)):
        for split in ("validation", "heldout"):
            assess(run, f"{split}-{name}", temperature, control)


def assess_gapg(run: Run) -> float:
    """As trained, and greedy with the bias fitted on the validation problems; returns the bias, 0 where none fits."""
    control = help_control(run.tokenizer)
    assess(run, "heldout-sampled", run.config.rollout.temperature, control)
    assess(run, "heldout-greedy", 0.0, control)
    rows = assess(run, "validation-masked", 0.0, masked(control))
    margins = [-math.inf if p["help_margin"] is None else p["help_margin"] for p in rows]
    try:
        bias = fit_bias(margins, run.config.budget.cloud_fraction)
    except ValueError as error:
        warn(f"{error}: the calibrated row is greedy without one")
        bias = 0.0
    assess(run, "heldout-calibrated", 0.0, replace(control, bias=bias))
    return bias


def assess(run: Run, name: str, temperature: float, control: HelpControl) -> list[dict[str, Any]]:
    """Predictions of the current policy on the split the name begins with, the cloud's answer to each problem included.

    Kept with the step they belong to, and made again where the oracle failed.
    """
    stop.look()
    path = _predictions(run.folder, name, run.state.step)
    prompts = run.validation
    if name.startswith("heldout"):
        prompts = fitting_prompts(run.config, run.task, run.tokenizer, "heldout")
    kept = read_jsonl(path, whole=True)
    if [row["id"] for row in kept] == [p.id for p in prompts] and all(row["oracle_score"] is not None for row in kept):
        return kept
    rollout = run.config.rollout
    sampling = Sampling(
        max_new_tokens=rollout.max_new_tokens,
        temperature=temperature,
        stop=STOP,
        seed=derive(run.config.seed, "assess", name),
        help=control,
        thinking=run.judge.thinking,
    )
    # its own oracle, so that the run's totals stay those of training
    oracle = make_oracle(run.config, run.task, run.folder)
    judge = Judge(run.task, oracle, ask_always=True, thinking=run.judge.thinking)
    groups = respond(run.engine, run.task, run.tokenizer, judge, prompts, sampling, title=f"evaluate {name}")
    oracle.close()
    rows = [prediction(g, run.config.reward) for g in groups]
    path.parent.mkdir(exist_ok=True)
    remove_partials(path.parent)
    write_whole(path, "".join(to_json(row) + "\n" for row in rows))
    check_evaluation(groups)
    return rows


def _predictions(folder: Path, name: str, step: int) -> Path:
    return folder / "predictions" / f"{name}-step-{step}.jsonl"


def compare(config: RunConfig, bias: float) -> dict[str, Any]:
    """A row a method, on the same held-out problems, and the paired tests. Reads predictions only.

    Problems on which the cloud failed any of them, and such as not all have because eval.heldout was changed on the
    way, are left out of all, and counted.
    """
    c, last = config.budget.cloud_fraction, config.steps
    folder, tuned = config.output_dir, config.output_dir / "task-tuned"
    names = ("heldout-before", "heldout-sampled", "heldout-greedy", "heldout-calibrated")
    ours = {n: read_jsonl(_predictions(folder, n, 0 if n == "heldout-before" else last)) for n in names}
    theirs = {n: read_jsonl(_predictions(tuned, n, last)) for n in ("heldout-greedy", "heldout-sampled")}
    everything = [{row["id"]: row for row in rows} for rows in (*ours.values(), *theirs.values())]
    problems = list(dict.fromkeys(id for rows in everything for id in rows))
    known = [i for i in problems if all(i in rows and rows[i]["oracle_score"] is not None for rows in everything)]
    ours, theirs = (
        {name: [row for row in rows if row["id"] in known] for name, rows in side.items()} for side in (ours, theirs)
    )

    results, tests = [_result("before training (T=1)", ours["heldout-before"])], []
    for decoding, mine in (
        ("greedy", _result("GAPG, greedy, calibrated bias", ours["heldout-calibrated"])),
        ("sampled", _result("GAPG, as trained (T=1)", ours["heldout-sampled"])),
    ):
        heldout = theirs[f"heldout-{decoding}"]
        calibration = read_jsonl(_predictions(tuned, f"validation-{decoding}", last))
        alone = offload(f"task-tuned, {decoding}", heldout, [False] * len(heldout))
        chance = offload(f"+ random offloading, {decoding}", heldout, at_random(heldout, c, config.seed))
        router = offload(
            f"+ log-prob router, {decoding}", heldout, by_logprob(heldout, logprob_threshold(calibration, c))
        )
        results += [alone, chance, router, mine]
        for other in (chance, router):
            wins, losses, p = mcnemar(mine.correct, other.correct)
            tests.append({"a": mine.name, "b": other.name, "only_a": wins, "only_b": losses, "p": p})
    results.append(_result("GAPG, greedy, no bias", ours["heldout-greedy"]))
    results.append(offload("cloud only", ours["heldout-greedy"], [True] * len(known)))
    return {
        "cloud_fraction": c,
        "seed": config.seed,
        "oracle": config.oracle.kind,
        "help_bias": bias,
        "left_out": len(problems) - len(known),
        "rows": [r.row() for r in results],
        "paired_tests": tests,
    }


def _result(name: str, rows: list[dict[str, Any]]) -> Result:
    return Result(
        name,
        called=[r["outcome"].startswith("cloud") for r in rows],
        correct=[r["outcome"] in ("local_correct", "cloud_correct") for r in rows],
        local_correct=[r["outcome"] == "local_correct" for r in rows],
    )


def assess_before_training(run: Run) -> None:
    """The starting point, at the training temperature; call it on a run at step 0."""
    assess(run, "heldout-before", run.config.rollout.temperature, help_control(run.tokenizer))


def finish(run: Run, baseline: BaseProcess) -> dict[str, Any]:
    """Assesses GAPG, waits for the baseline, and leaves table, picture and summary.json. Raises BaselineFailed."""
    bias = assess_gapg(run)
    if baseline.is_alive():
        say("waiting for the task-tuned baseline")
    baseline.join()
    folder = run.folder
    check_alive(baseline, folder)
    summary = compare(run.config, bias) | {"training_oracle_usage": asdict(run.oracle.usage)}
    write_whole(folder / "summary.json", to_json(summary, indent=1) + "\n")
    plot_run(folder, summary, folder / "summary.png")
    print_table(summary["rows"], summary["cloud_fraction"])
    say(f"{folder}/summary.png  {folder}/summary.json  {folder}/predictions/")
    return summary
