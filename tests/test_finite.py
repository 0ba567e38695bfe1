"""A number is finite, or the run stops in one line with its last good checkpoint as it was; and idle steps are said."""

import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gapg.build import make_task
from gapg.commands.cli import main
from gapg.config import RunConfig, load_config
from gapg.config_sections import OptimConfig
from gapg.evaluation.validate import validate
from gapg.filtering import Selection
from gapg.jsonl import read_jsonl
from gapg.judge import Group, rewards
from gapg.model.load import load_tokenizer
from gapg.optim import clip_and_step, make_optimizer
from gapg.runs import checkpoint, health, manifest
from gapg.runs.health import BAD_STEPS, IDLE_STEPS, Diverged
from gapg.runs.run import Run, build_run
from gapg.runs.state import TrainState
from gapg.tasks.base import Prompt
from gapg.train import train
from gapg.warm_start import warm_start
from gapg_rollout.records import Completion, Sampling
from tests.runs.small import SMALL

Start = Callable[..., Run]
NAN, INF = math.nan, math.inf
EVERY_STEP = {"checkpoint_every": "1", "keep_checkpoints": "1", "budget__filter": "false", "eval__every": "1"}


def all_finite(step: Path) -> bool:
    files = [*step.glob("model/*.safetensors"), *step.glob("*.safetensors")]
    assert len(files) >= 2
    return all(bool(t.isfinite().all()) for path in files for t in load_file(path).values())


def with_logprobs(run: Run, change: Callable[[tuple[float, ...]], Sequence[float]]) -> None:
    """The engine of a run gives other log-probs than it has."""
    generate = run.engine.generate

    def changed(ids: Sequence[Sequence[int]], n: int, sampling: Sampling) -> Iterator[tuple[int, list[Completion]]]:
        for i, completions in generate(ids, n, sampling):
            yield i, [replace(c, logprobs=tuple(change(c.logprobs))) for c in completions]

    run.engine.generate = changed  # type: ignore[method-assign]


# --- one optimizer step ----------------------------------------------------------------------------------------------


def after(*steps: tuple[float, float]) -> list[torch.Tensor]:
    """Weights and moments after steps of (an element of the gradient, loss)."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(4, 4)
    optimizer = make_optimizer(layer, OptimConfig(lr=1e-2, weight_decay=0.1))
    for gradient, loss in steps:
        layer(torch.ones(2, 4)).sum().backward()
        assert layer.weight.grad is not None
        layer.weight.grad[0, 0] = gradient
        norm = clip_and_step(optimizer, 1e-2, 1.0, torch.tensor(loss))
        assert norm.isfinite() == (math.isfinite(loss) and abs(gradient) < 1e19), "says whether the step was taken"
    return [*layer.parameters(), *(x for state in optimizer.state.values() for x in state.values())]


@pytest.mark.parametrize("bad", [(NAN, 0.0), (-INF, 0.0), (1e30, 0.0), (1.0, NAN), (1.0, INF)])
def test_a_step_that_is_not_finite_leaves_no_trace(bad: tuple[float, float]) -> None:
    """Weights and moments are those of an optimizer that never saw it."""
    good = (1.0, 0.5)
    assert all(torch.equal(a, b) for a, b in zip(after(good, bad, good), after(good, good), strict=True))


# --- whole runs ------------------------------------------------------------------------------------------------------


def worth_from_step(step: int, value: float) -> Callable[[Run], None]:
    """From that step on the reward function gives `value` to the first response of a group."""

    def change(run: Run) -> None:
        def reward(group: Group, a: float, c: float, f: float) -> list[float]:
            given = rewards(group, a, c, f)
            return [value, *given[1:]] if run.state.step + 1 >= step else given

        run.reward = reward

    return change


def no_logprobs(run: Run) -> None:
    with_logprobs(run, lambda given: [NAN] * len(given))


WAYS: dict[str, tuple[dict[str, str], Callable[[Run], None] | None, str]] = {
    "reward NaN": ({}, worth_from_step(3, NAN), "step 3: reward.function="),
    "reward inf": ({}, worth_from_step(3, INF), "step 3: reward.function="),
    "reward 1e39, which is inf in float32": ({}, worth_from_step(3, 1e39), "step 3: reward.function="),
    "rewards whose differences overflow": ({}, worth_from_step(3, 1e38), "step 3: the rewards of reward.function="),
    "rewards whose standard deviation overflows": (
        {"loss__advantage": "grpo"},
        worth_from_step(3, 1e30),
        "step 3: the rewards of reward.function=",
    ),
    "rewards whose gradient overflows": ({}, worth_from_step(2, 1e36), "step 4: the loss or its gradient"),
    "weights of 1e30": ({"optim__lr": "1e30"}, None, "step 2: the weights"),
    "weights of 1e12, whose forward is NaN": ({"optim__lr": "1e12"}, None, "step 2: the weights"),
    "weights of 1e5, whose forward looks calm": ({"optim__lr": "1e5"}, None, "step 2: the weights"),
    "a penalty that overflows": ({"loss__kl_coef": "1e30"}, None, "step 4: the loss or its gradient"),
    "an engine of NaN": ({"loss__tis_cap": "2"}, no_logprobs, "step 4: no log-prob of the engine is finite"),
}


@pytest.fixture(scope="module")
def good_step(
    small_config: Callable[..., RunConfig], warm_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder of a run that has made one step."""
    config = small_config(tmp_path_factory.mktemp("good") / "run", steps="1", **EVERY_STEP)
    config.output_dir.mkdir()
    run = build_run(config, config.output_dir, make_task(config), warm_model)
    train(run, validate)
    run.close()
    return run.folder


@pytest.fixture
def goes_on(start: Start, good_step: Path, tmp_path: Path) -> Start:
    """`start`, for the steps after the good one."""
    shutil.copytree(good_step, tmp_path / "run", symlinks=True)
    return lambda **overrides: start(**EVERY_STEP, **overrides)


def test_what_to_lower_is_what_the_run_has() -> None:
    row = {"rollout_lost": 0}
    for overrides, fix in (
        ({}, "lower optim.lr or the rewards,"),
        ({"loss.kl_coef": "0.1"}, "lower optim.lr, loss.kl_coef or the rewards,"),
        ({"method": "marginal"}, "lower optim.lr or marginal.weight and marginal.trace,"),
    ):
        assert fix in str(health.bad_steps(load_config("quickstart", overrides), 3, row, None))


@pytest.mark.parametrize("way", WAYS)
def test_a_run_ends_with_its_last_good_checkpoint(goes_on: Start, way: str, capsys: pytest.CaptureFixture[str]) -> None:
    overrides, change, message = WAYS[way]
    run = goes_on(steps="9", **overrides)
    if change:
        change(run)
    with pytest.raises(Diverged) as error:
        train(run, validate)
    (line,) = str(error.value).splitlines()
    assert line.startswith(message) and line.endswith(", then go on with --resume")
    last = checkpoint.latest(run.folder / "checkpoints")
    assert last and all_finite(last) and f"; the last good checkpoint is {last}; " in line
    row = read_jsonl(run.folder / "metrics.jsonl")[-1]
    ended, counted = int(line.split()[1].rstrip(":")), row["bad_steps"]
    assert counted in (0, BAD_STEPS), "the weights are looked at before anything is counted"
    assert last.name == f"step-{ended - max(1, counted)}", "nothing was saved since"
    assert capsys.readouterr().err.count("in a row; 3 end the run") == counted


def test_the_run_goes_on_from_there(goes_on: Start) -> None:
    """With a penalty that is no longer too large."""
    run = goes_on(steps="9", loss__kl_coef="1e30")
    with pytest.raises(Diverged, match=r"lower optim\.lr, loss\.kl_coef or the rewards, then"):
        train(run, validate)
    run = goes_on(steps="4", loss__kl_coef="0.1")
    before = run.state.step
    train(run, validate)
    rows = read_jsonl(run.folder / "metrics.jsonl")
    assert [r["step"] for r in rows] == [0, 1, 2, 3, 4] and before < 3
    assert not any(r["skipped"] for r in rows[1:]) and all_finite(run.folder / "checkpoints/step-4")


def test_a_run_may_end_before_its_first_checkpoint(start: Start) -> None:
    run = start(steps="9", optim__lr="1e30", eval__every="0", budget__filter="false")
    with pytest.raises(Diverged, match=r"^step 1: the weights.*; the run ended before its first checkpoint; lower"):
        train(run, validate)
    assert not list((run.folder / "checkpoints").glob("*"))


def test_one_bad_step_is_skipped_and_counted(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    run = start(steps="4", **EVERY_STEP)
    weight = next(run.model.parameters())
    weight.register_hook(lambda gradient: gradient * (NAN if run.state.step == 1 else 1.0))
    before: list[torch.Tensor] = []

    def keep(run: Run) -> dict[str, float]:
        before.append(weight.detach().clone())
        return {}

    train(run, keep)
    rows = read_jsonl(run.folder / "metrics.jsonl")[1:]
    assert [r["skipped"] for r in rows] == [0, 1, 0, 0] and [r["bad_steps"] for r in rows] == [0, 1, 1, 1]
    assert rows[1]["grad_norm"] is None, "which is no number"
    moved = [not torch.equal(a, b) for a, b in pairwise(before)]
    assert moved == [True, False, True, True]
    said = capsys.readouterr().err
    assert "warning: step 2: the loss or its gradient is not finite: skipped, 1 in a row; 3 end the run" in said
    assert run.state.bad_in_a_row == 0


def test_engines_without_log_probs(start: Start) -> None:
    """Of some tokens, or of all and given as none: nothing is lost by it."""
    for name, change, cap in (("some", lambda given: [NAN, *given[1:]], "2"), ("none", lambda given: (), "")):
        run = start(name, steps="2", loss__tis_cap=cap, **EVERY_STEP)
        with_logprobs(run, change)
        train(run, validate)
        rows = read_jsonl(run.folder / "metrics.jsonl")[1:]
        assert all(row["skipped"] == 0 < row["grad_norm"] for row in rows)
        assert all(0 < row["policy/rollout_nan_fraction"] <= 1 for row in rows)
        assert all((row["logprob_gap"] is None) == (name == "none") for row in rows)


# --- the warm start and the command line -----------------------------------------------------------------------------


def test_a_warm_start_that_diverges(small_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    good = {"warm_start__checkpoint_every": "2", "warm_start__batch_size": "4"}

    def go(steps: str, **more: str) -> Path:
        config = small_config(tmp_path, warm_start__steps=steps, **good, **more)
        task = make_task(config)
        return warm_start(config, folder, task, load_tokenizer(config.model, task))

    with pytest.raises(
        Diverged, match=r"^warm start, step 1: .*; the run ended before its first checkpoint; lower warm"
    ):
        go("9", warm_start__optim__lr="1e5")
    assert not list(folder.glob("*"))
    go("4")
    with pytest.raises(
        Diverged, match=rf"^warm start, step 5: .* checkpoint is {folder}/step-4; lower warm_start.optim.lr"
    ):
        go("9", warm_start__optim__lr="1e30")
    assert checkpoint.steps(folder) == [4] and all_finite(folder / "step-4")
    assert go("5") == folder / "step-5/model"


@pytest.mark.parametrize("key", ["--optim.lr", "--warm-start.optim.lr"])
def test_the_command_says_it_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str) -> None:
    small = [
        *(*SMALL, "--warm-start.steps", "2", "--warm-start.batch-size", "4", "--steps", "2"),
        *("--budget.filter", "false", "--rollout.prompts-per-step", "8", "--rollout.samples-per-prompt", "8"),
    ]
    with pytest.raises(SystemExit) as left:
        main([*small, "--output-dir", str(tmp_path / "run"), key, "1e30"])
    assert left.value.code == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("gapg: ")]
    assert "step 1: the weights" in line and f"lower {key[2:].replace('-', '_')}, then go on with --resume" in line


# --- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["weight", "moment", "state"])
def test_a_checkpoint_that_is_not_finite_is_not_written(
    make_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerBase, tmp_path: Path, where: str
) -> None:
    model = make_model()
    optimizer = make_optimizer(model, OptimConfig(lr=1e-3))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    clip_and_step(optimizer, 1e-3, 1.0)
    checkpoint.save(tmp_path, 1, model, tokenizer, optimizer, {"step": 1})
    weight = model.get_input_embeddings().weight
    spoilt = {"weight": weight.data, "moment": optimizer.state[weight]["exp_avg"]}.get(where, torch.zeros(1))
    spoilt.view(-1)[-1] = INF
    state = {"step": 2, "nested": {"score": NAN if where == "state" else 0.5}}
    with pytest.raises(Diverged, match=rf"^step 2: .* is not finite.* last good checkpoint is {tmp_path}/step-1; "):
        checkpoint.save(tmp_path, 2, model, tokenizer, optimizer, state)
    assert [p.name for p in tmp_path.iterdir()] == ["step-1"]


def test_a_checkpoint_without_the_counters_is_resumed(start: Start) -> None:
    """One of an older version."""
    run = start(steps="1", **EVERY_STEP)
    train(run, validate)
    path = run.folder / "checkpoints/step-1/state.json"
    saved = json.loads(path.read_text())
    for name in ("bad_steps", "bad_in_a_row", "idle_steps", "idle_excess", "idle_said_at"):
        del saved[name]
    del saved["controller"]["start"]
    path.write_text(json.dumps(saved))
    manifest.write(path.parent, {"run": None, "step": 1}, manifest.read(path.parent)["files"])
    again = start(steps="2", **EVERY_STEP)
    assert again.state.step == 1 and again.state.bad_steps == 0
    assert asdict(again.controller)["start"] == again.config.reward.alpha_c / again.config.reward.alpha_a
    train(again, validate)


# --- steps that train nothing ----------------------------------------------------------------------------------------


def dumb(run: Run) -> Run:
    """Its engine decodes uniformly, which solves nothing, and stays so."""
    run.engine.sync({k: torch.zeros_like(v) for k, v in run.model.state_dict().items()})
    run.engine.sync = lambda _: None  # type: ignore[method-assign]
    return run


def test_idle_steps_are_said_ever_more_rarely(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    run = dumb(start(steps="11", oracle__accuracy="1", eval__every="0", rollout__prompts_per_step="2"))
    train(run, validate)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    for n, line in zip((3, 6), said, strict=True):
        assert f"{n} of {n} steps trained on nothing, the last because no response is right, so the filter" in line
        assert "drops all 2 prompts" in line and "budget.filter=false" in line
    rows = read_jsonl(run.folder / "metrics.jsonl")
    assert all(row["groups/with_gradient"] == 0 for row in rows)
    assert run.state.idle_steps == 11 and run.state.bad_steps == 0


@pytest.mark.parametrize(("idle_of_three", "said"), [(2, True), (1, False)])
def test_a_run_that_is_mostly_idle_is_told(capsys: pytest.CaptureFixture[str], idle_of_three: int, said: bool) -> None:
    """Whatever lies between: 107 idle steps of 146 never came five in a row."""
    state = TrainState()
    for step in range(30):
        trained = int(step % 3 >= idle_of_three)
        row = {"skipped": 0, "groups/with_gradient": trained, "rollout_lost": 0}
        health.watch(state, row, Selection([], 0, 0, 0, 8, 0))
        state.step += 1
    assert ("steps trained on nothing" in capsys.readouterr().err) is said
    assert state.idle_steps == 10 * idle_of_three


def test_the_display_shows_what_a_step_trained_on(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    """Kept groups whose rewards are all equal are none of it."""
    run = start(steps="1", eval__every="0", budget__filter="false")
    train(run, validate)
    row = read_jsonl(run.folder / "metrics.jsonl")[-1]
    assert 0 < row["groups/with_gradient"] < row["groups/trained"] == 8
    assert f"trained {row['groups/with_gradient']}/8  " in capsys.readouterr().err


IDLE = {
    (8, 8, 0, 0, 0): "all responses to a prompt are worth the same; raise rollout.samples_per_prompt",
    (8, 0, 3, 5, 0): "no response is right, and all to a prompt are worth the same; lengthen the warm start",
    (0, 0, 0, 8, 0): "neither the model nor the cloud solves a prompt; lengthen the warm start",
    (0, 0, 3, 2, 3): "so the filter drops all 3 prompts that only the cloud solves",
    (0, 0, 0, 0, 8): "the oracle failed every prompt; mend the oracle",
}
"""By groups kept, of D1, of D2, unsolved and unknown."""


def test_why_a_step_is_idle(capsys: pytest.CaptureFixture[str]) -> None:
    group = Group(Prompt("a", "a", "1", "toy"), (), (), ())
    for (kept, d1, d2, unsolved, unknown), reason in IDLE.items():
        state = TrainState()
        for _ in range(IDLE_STEPS):
            assert reason not in capsys.readouterr().err
            selection = Selection([group] * kept, d1, d2, 0, unsolved, unknown)
            health.watch(state, {"skipped": 0, "groups/with_gradient": 0, "rollout_lost": 0}, selection)
            state.step += 1
        assert reason in capsys.readouterr().err
