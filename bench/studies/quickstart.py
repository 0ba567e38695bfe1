"""The quickstart: a method beside its warm start, the task-tuned model with two routers, and the cloud alone.

The method (GAPG, or `--method marginal`) and its task-tuned twin start from the same warm start and train side by side,
in two processes. The folder is a run's as `gapg train` makes it, with the twin's in it; the same command goes on where
a killed one stopped.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from gapg.build import fitting_prompts, make_reward, oracle_account
from gapg.commands.train import begun, check
from gapg.config import RunConfig, load_config
from gapg.config_sections import MarginalConfig
from gapg.console import say, warn
from gapg.errors import ConfigError
from gapg.evaluation.calibrate import fit_bias
from gapg.evaluation.evaluate import Result, prediction
from gapg.evaluation.report import print_table
from gapg.evaluation.statistics import mcnemar
from gapg.evaluation.validate import validate
from gapg.files import remove_partials, write_whole
from gapg.help_phrase import help_control, masked
from gapg.jsonl import read_jsonl, to_json
from gapg.reward import try_reward
from gapg.runs import preset, stop
from gapg.runs.outage import OracleDown, check_evaluation
from gapg.runs.run import Run, build_run
from gapg.runs.run_dir import holds_run, open_folder
from gapg.seeding import derive
from gapg.threads import cores, set_threads
from gapg.train import train
from gapg_rollout.records import HelpControl
from studies.arms import Rows
from studies.pool import Process, WorkFailed
from studies.predictions import judged
from studies.quickstart_picture import draw
from studies.runs import open_run
from studies.statistics import help_margins

METHOD = {"gapg": "GAPG", "marginal": "marginal"}
RIGHT_ALONE = MarginalConfig(score="brier", weight=0.0, trace=(0.0, 1.0))
"""A response is worth whether it is right, and the decision learns nothing."""
LAST_STEP_S = 120.0
"""How long a twin that is told to end may take for its step."""


def quickstart(base: str, overrides: Mapping[str, str]) -> None:
    """Trains both, and leaves table, picture and summary.json.

    Raises ConfigError, OracleDown, Diverged, DiskFull, Stopped and WorkFailed (the twin's), each one line.
    """
    resume = holds_run(load_config(base, overrides).output_dir)
    config = preset.resolve(base, overrides, resume=resume)
    if config.eval.heldout == 0:
        raise ConfigError("eval.heldout=0: the comparison needs held-out problems; raise it, or leave it empty for all")
    task, tokenizer = check(config)
    twins = twin_config(config)
    try_reward(make_reward(twins), twins, task)
    help_control(tokenizer)  # the comparison masks and biases the phrase: a ConfigError where it cannot
    with (
        begun(base, config, task, tokenizer, resume=resume) as (warm, asked),
        twin_beside(twins, warm) as twin,
        closing(build_run(config, config.output_dir, task, warm)) as run,
    ):
        if run.state.step == 0 and config.oracle.kind != "solver":
            run.oracle.restore(asked)
        _train_and_compare(run, twin)


def _train_and_compare(run: Run, twin: Process) -> None:
    config, folder = run.config, run.folder
    if run.state.step == 0:
        assess(run, "heldout-before", config.rollout.temperature, help_control(run.tokenizer))
    elif not predictions_path(folder, "heldout-before", 0).exists():
        raise ConfigError(f"output_dir={folder}: holds a run without a twin; choose another --output-dir")

    def validate_while_twin_is_well(run: Run) -> dict[str, float]:
        check_twin(twin)
        return validate(run)

    train(run, validate_while_twin_is_well)
    say(f"trained: {run.save() / 'model'}")
    bias = assess_gapg(run)
    if twin.process.is_alive():
        say("waiting for the task-tuned twin")
    while twin.process.is_alive():
        stop.look()
        twin.process.join(1.0)
    check_twin(twin)
    summary = compare(config, bias) | {"training_oracle_usage": asdict(run.oracle.usage)}
    write_whole(folder / "summary.json", to_json(summary, indent=1) + "\n")
    draw(folder, summary, folder / "summary.png")
    print_table(summary["rows"], summary["cloud_fraction"])
    say(f"{folder}/summary.png  {folder}/summary.json  {folder}/predictions/")


# ---- the twin


def twin_config(config: RunConfig) -> RunConfig:
    """The same run with calls that never pay: task-tuning only, with help masked in training as it is in the run."""
    # one cache and one cap: an answer is paid for once
    oracle = {
        "cache": config.oracle.cache or str(config.output_dir / "oracle.sqlite"),
        "account": oracle_account(config, config.output_dir),
    }
    return config.model_copy(
        update={
            "output_dir": config.output_dir / "task-tuned",
            "oracle": config.oracle.model_copy(update=oracle),
            "reward": config.reward.model_copy(update={"alpha_c": 0.0}),
            "budget": config.budget.model_copy(update={"filter": False, "controller": False}),
            "marginal": RIGHT_ALONE if config.method == "marginal" else config.marginal,
            "threads": config.threads or max(1, cores() // 2),
        }
    )


@contextmanager
def twin_beside(config: RunConfig, warm: Path | None) -> Iterator[Process]:
    """Trains and assesses the twin in a process of its own, on as many threads as are left to this one.

    Where this one ends early, so does the twin: after its step, which it saves.
    """
    set_threads(config)
    twin = Process((config.output_dir / "log.txt", partial(train_twin, config, warm)))
    try:
        yield twin
    finally:
        twin.process.terminate()
        twin.process.join(LAST_STEP_S)
        twin.process.kill()


def check_twin(twin: Process) -> None:
    """Raises as soon as it has failed, so that nobody waits for half a comparison: OracleDown where the cloud failed
    it, else WorkFailed."""
    if stop.requested():
        return  # the signal that ends this run may have ended it too: that is no failure
    try:
        twin.check()
    except WorkFailed as error:
        said = f"the task-tuned twin failed: {error}; see {twin.log}, mend it, then run the same command again"
        raise (OracleDown if str(error).startswith("OracleDown") else WorkFailed)(said) from None


def train_twin(config: RunConfig, warm: Path | None) -> None:
    try:
        resume = holds_run(config.output_dir)
        with stop.listening(), open_folder(config, resume=resume), open_run(config, warm) as run:
            train(run, validate)
            assess_twin(run)
    except stop.Stopped as error:
        raise RuntimeError(str(error)) from None


# ---- what is measured


def assess_twin(run: Run) -> None:
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
    margins = help_margins(assess(run, "validation-masked", 0.0, masked(control)))
    try:
        bias = fit_bias(margins.tolist(), run.config.budget.cloud_fraction)
    except ValueError as error:
        warn(f"{error}: the calibrated row is greedy without one")
        bias = 0.0
    assess(run, "heldout-calibrated", 0.0, replace(control, bias=bias))
    return bias


def assess(run: Run, name: str, temperature: float, control: HelpControl) -> Rows:
    """Predictions of the current policy on the split the name begins with, the cloud's answer to each problem included.

    Kept with the step they belong to, and made again where the oracle failed. Raises OracleDown where it failed all.
    """
    stop.look()
    path = predictions_path(run.folder, name, run.state.step)
    prompts = run.validation
    if name.startswith("heldout"):
        prompts = fitting_prompts(run.config, run.task, run.tokenizer, "heldout")
    kept = read_jsonl(path, whole=True)
    if [row["id"] for row in kept] == [p.id for p in prompts] and all(row["oracle_score"] is not None for row in kept):
        return kept
    seed = derive(run.config.seed, "assess", name)
    groups = judged(run, f"evaluate {name}", seed, prompts, temperature, control)
    rows = [prediction(g, run.config.reward) for g in groups]
    path.parent.mkdir(exist_ok=True)
    remove_partials(path.parent)
    write_whole(path, "".join(to_json(row) + "\n" for row in rows))
    check_evaluation(groups)
    return rows


def predictions_path(folder: Path, name: str, step: int) -> Path:
    return folder / "predictions" / f"{name}-step-{step}.jsonl"


# ---- the comparison


def compare(config: RunConfig, bias: float) -> dict[str, Any]:
    """A row a method, on the same held-out problems, and the paired tests. Reads predictions only.

    Problems on which the cloud failed any of them, and such as not all have because eval.heldout was changed on the
    way, are left out of all, and counted.
    """
    c, last = config.budget.cloud_fraction, config.steps
    folder, tuned = config.output_dir, config.output_dir / "task-tuned"
    names = ("heldout-before", "heldout-sampled", "heldout-greedy", "heldout-calibrated")
    ours = {n: read_jsonl(predictions_path(folder, n, 0 if n == "heldout-before" else last)) for n in names}
    theirs = {n: read_jsonl(predictions_path(tuned, n, last)) for n in ("heldout-greedy", "heldout-sampled")}
    everything = [{row["id"]: row for row in rows} for rows in (*ours.values(), *theirs.values())]
    problems = list(dict.fromkeys(id for rows in everything for id in rows))
    known = {i for i in problems if all(i in rows and rows[i]["oracle_score"] is not None for rows in everything)}
    ours, theirs = (
        {name: [row for row in rows if row["id"] in known] for name, rows in side.items()} for side in (ours, theirs)
    )

    name = METHOD[config.method]
    results, tests = [_result("before training (T=1)", ours["heldout-before"])], []
    for decoding, mine in (
        ("greedy", _result(f"{name}, greedy, calibrated bias", ours["heldout-calibrated"])),
        ("sampled", _result(f"{name}, as trained (T=1)", ours["heldout-sampled"])),
    ):
        heldout = theirs[f"heldout-{decoding}"]
        calibration = read_jsonl(predictions_path(tuned, f"validation-{decoding}", last))
        threshold = logprob_threshold(calibration, c)
        alone = offload(f"task-tuned, {decoding}", heldout, [False] * len(heldout))
        chance = offload(f"+ random offloading, {decoding}", heldout, at_random(len(heldout), c, config.seed))
        router = offload(f"+ log-prob router, {decoding}", heldout, [p["logprob_mean"] < threshold for p in heldout])
        results += [alone, chance, router, mine]
        for other in (chance, router):
            wins, losses, p = mcnemar(mine.correct, other.correct)
            tests.append({"a": mine.name, "b": other.name, "only_a": wins, "only_b": losses, "p": p})
    results.append(_result(f"{name}, greedy, no bias", ours["heldout-greedy"]))
    results.append(offload("cloud only", ours["heldout-greedy"], [True] * len(known)))
    return {
        "method": name,
        "cloud_fraction": c,
        "seed": config.seed,
        "oracle": config.oracle.kind,
        "help_bias": bias,
        "left_out": len(problems) - len(known),
        "rows": [r.row() for r in results],
        "paired_tests": tests,
    }


def _result(name: str, rows: Rows) -> Result:
    return Result(
        name,
        called=[r["outcome"].startswith("cloud") for r in rows],
        correct=[r["outcome"] in ("local_correct", "cloud_correct") for r in rows],
        local_correct=[r["outcome"] == "local_correct" for r in rows],
    )


def offload(name: str, rows: Rows, to_cloud: Sequence[bool]) -> Result:
    """The task-tuned answers, with those of the chosen problems replaced by the cloud's."""
    local = [p["outcome"] == "local_correct" and not c for p, c in zip(rows, to_cloud, strict=True)]
    cloud = [p["oracle_score"] >= 0.5 and c for p, c in zip(rows, to_cloud, strict=True)]
    return Result(name, list(to_cloud), [a or b for a, b in zip(local, cloud, strict=True)], local)


def at_random(n: int, cloud_fraction: float, seed: int) -> list[bool]:
    """Exactly the wanted number of n problems, drawn by the seed."""
    chosen = set(random.Random(derive(seed, "random offloading")).sample(range(n), round(cloud_fraction * n)))
    return [i in chosen for i in range(n)]


def logprob_threshold(calibration: Rows, cloud_fraction: float) -> float:
    """The mean token log-prob under which `cloud_fraction` of the calibration responses lie."""
    scores = sorted(p["logprob_mean"] for p in calibration)
    return float(scores[min(round(cloud_fraction * len(scores)), len(scores) - 1)])
