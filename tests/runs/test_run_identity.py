"""A resumed run is compared with what it began with: data, prompts, tokenizer, weights, demonstrations; by name."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from gapg.build import make_task
from gapg.commands.cli import main
from gapg.config import RunConfig, load_config
from gapg.config_keys import flat
from gapg.errors import ConfigError
from gapg.evaluation.validate import validate
from gapg.runs import run_identity
from gapg.runs.run import Run, build_run
from gapg.runs.run_dir import MAY_CHANGE, open_folder, save_config
from gapg.tasks.base import Prompt, Split, Verdict
from gapg.tasks.countdown import Countdown
from gapg.train import train
from gapg_rollout.records import OracleQuestion
from tests.runs.small import SMALL

Folder = Callable[..., Path]


@dataclass
class Sums:
    """A task whose data, prompts and questions a test can change."""

    train: list[Prompt]
    heldout: list[Prompt]
    prefix: str = "3 8"
    asked: str = "What is"
    name: str = "sums"
    seen: list[str] = field(default_factory=list)

    def prompts(self, split: Split) -> list[Prompt]:
        return self.train if split == "train" else self.heldout

    def render(self, prompt: Prompt, tokenizer: Any) -> list[int]:
        return list(tokenizer(f"{self.prefix} {prompt.text}", add_special_tokens=False)["input_ids"])

    def verify(self, prompt: Prompt, answers: Any) -> list[Verdict]:
        raise NotImplementedError

    def question(self, prompt: Prompt) -> OracleQuestion:
        return OracleQuestion(prompt.id, ({"role": "user", "content": f"{self.asked} {prompt.text}?"},))


def sums() -> Sums:
    problems = [Prompt(f"{a}+{b}", f"{a} + {b}", str(a + b), "sums") for a in range(1, 6) for b in range(1, 7)]
    return Sums(problems[:24], problems[24:])


@pytest.fixture
def begun(folder: Folder, tmp_path: Path) -> Callable[[Sums, Any], None]:
    """`begun(task, changes)`: a run that began with `sums()` is begun again, with another task or other settings."""
    model, demonstrations = folder(), tmp_path / "demonstrations.jsonl"
    demonstrations.write_text('{"id": "1+1", "response": "<answer> 2 </answer>"}\n')
    tree = {"path": str(model), "demonstrations": str(demonstrations)}
    (tmp_path / "run").mkdir()

    def begin(task: Sums, changes: Any = None) -> None:
        config = load_config(
            "quickstart",
            {"model.path": tree["path"], "warm_start.demonstrations": tree["demonstrations"], **(changes or {})},
        )
        path = config.model.path
        assert path
        run_identity.begin(tmp_path / "run", config, task, AutoTokenizer.from_pretrained(path))

    begin(sums())
    return begin


def swapped(problems: list[Prompt], i: int, **changes: str) -> list[Prompt]:
    return [replace(p, **changes) if n == i else p for n, p in enumerate(problems)]


TASKS: dict[str, Callable[[Sums], Sums]] = {
    "task: the data has 23 training problems and the run began with 24; put": lambda t: replace(t, train=t.train[:-1]),
    "the run began with 24; first difference: problem 1 is '1+2', was '1+1'": lambda t: replace(
        t, train=[t.train[1], t.train[0], *t.train[2:]]
    ),
    "first difference: problem 4, '1+4', has another text": lambda t: replace(t, train=swapped(t.train, 3, text="x")),
    "first difference: problem 24, '4+6', has another answer": lambda t: replace(
        t, train=swapped(t.train, 23, answer="11")
    ),
    "task: the data has 5 held-out problems and the run began with 6": lambda t: replace(t, heldout=t.heldout[:-1]),
    "task: problem '1+1' has other tokens than when the run began": lambda t: replace(t, prefix="8 3"),
    "task: problem '1+1' has other words for the cloud": lambda t: replace(t, asked="Add"),
}


@pytest.mark.parametrize("said", TASKS)
def test_another_task_is_refused_by_name(begun: Callable[..., None], said: str) -> None:
    begun(sums())
    with pytest.raises(ConfigError) as refused:
        begun(TASKS[said](sums()))
    line = str(refused.value)
    assert said in line and "\n" not in line and line.endswith("or choose another --output-dir")


def _write_weights(model: Path) -> None:
    path = model / "model.safetensors"
    weights = load_file(path)
    name = min(weights)
    weights[name].view(-1)[-1] += 1e-3
    save_file(weights, path, metadata={"format": "pt"})


def _edit(name: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def edit(model: Path) -> None:
        content = json.loads((model / name).read_text())
        change(content)
        (model / name).write_text(json.dumps(content))

    return edit


FILES: dict[str, Callable[[Path], object]] = {
    "other weights": _write_weights,
    "other settings": _edit("config.json", lambda c: c.update(rms_norm_eps=1e-3)),
    "other vocabulary": _edit("tokenizer.json", lambda c: c["model"]["vocab"].update(new=114)),
    "other special tokens": _edit("tokenizer_config.json", lambda c: c.update(pad_token=c["eos_token"])),
    "other words in its chat template": lambda m: (m / "chat_template.jinja").write_text("{{ messages[0].content }}!"),
    "other tokens that end a response": lambda m: (m / "generation_config.json").write_text('{"eos_token_id": 3}'),
    "warm_start.demonstrations=": lambda m: (m.parent / "demonstrations.jsonl").write_text("{}"),
}


@pytest.mark.parametrize("said", FILES)
def test_another_file_is_refused_by_name(begun: Callable[..., None], tmp_path: Path, said: str) -> None:
    FILES[said](tmp_path / "model")
    with pytest.raises(ConfigError) as refused:
        begun(sums())
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_what_changes_nothing_is_no_difference(
    begun: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another place, another writer, fewer held-out problems."""
    (tmp_path / "model").rename(tmp_path / "moved")
    _edit("config.json", lambda c: c.update(transformers_version="9.9"))(tmp_path / "moved")
    (tmp_path / "moved" / "README.md").write_text("nothing")
    (tmp_path / "demonstrations.jsonl").rename(tmp_path / "moved.jsonl")
    moved = {"model.path": str(tmp_path / "moved"), "warm_start.demonstrations": str(tmp_path / "moved.jsonl")}
    begun(sums(), moved | {"eval.heldout": "2"})
    monkeypatch.setenv("HOME", str(tmp_path))
    begun(sums(), moved | {"warm_start.demonstrations": "~/moved.jsonl"})
    begun(replace(sums(), heldout=[]), moved | {"eval.heldout": "0"})


def test_a_model_of_the_hub_is_known_by_its_files(
    folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the hub's cache on disk, where the files of a revision are links to blobs."""
    from huggingface_hub import constants

    revision = tmp_path / "hub" / "models--who--what" / "snapshots" / "abc"
    revision.parent.mkdir(parents=True)
    folder().rename(revision)
    (revision.parents[1] / "refs").mkdir()
    (revision.parents[1] / "refs" / "main").write_text("abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    config = load_config("quickstart", {"model.path": "who/what"})
    before = run_identity.weights_sha256(config, None)
    assert before == run_identity.weights_sha256(config, revision)
    _write_weights(revision)
    assert run_identity.weights_sha256(config, None) != before


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"id": "a"}', '{"id": "a", "data": 3}'])
def test_a_broken_record_is_one_line(begun: Callable[..., None], tmp_path: Path, content: str) -> None:
    (tmp_path / "run" / "run.json").write_text(content)
    with pytest.raises(ConfigError, match=r"run\.json: .*put it back as it was$"):
        begun(sums())


# --- the folder ------------------------------------------------------------------------------------------------------


def enter(config: RunConfig, *, resume: bool) -> None:
    with open_folder(config, resume=resume):
        pass


def test_a_folder_that_is_no_run(small_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = small_config(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"output_dir=.*holds no run to go on with; drop --resume"):
        enter(config, resume=True)
    assert not (tmp_path / "run").exists()
    for place in ("checkpoints", "warm-start/checkpoints"):
        step = tmp_path / "run" / place / "step-6"
        step.mkdir(parents=True)
        for resume in (False, True):
            with pytest.raises(ConfigError, match=rf"holds {place}/step-6 and no config\.yaml: put that back"):
                enter(config, resume=resume)
        step.rmdir()


HOLDER = """
import sys, time
from gapg.config import load_config
from gapg.runs.run_dir import open_folder
with open_folder(load_config("quickstart", {"output_dir": sys.argv[1]}), resume=False):
    print("locked", flush=True)
    time.sleep(600)
"""


def test_a_killed_process_frees_its_folder(small_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = small_config(tmp_path / "run")
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout and holder.stdout.readline() == "locked\n"
        with pytest.raises(ConfigError, match=r"^output_dir=.*: another run is writing there; choose another"):
            enter(config, resume=False)
    finally:
        holder.kill()
        holder.wait()
    enter(config, resume=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file/run: cannot be made or locked \(Not a directory\); choose another"):
        enter(small_config(tmp_path / "file" / "run"), resume=False)


def test_a_run_killed_before_its_first_checkpoint_goes_on(
    small_config: Callable[..., RunConfig], countdown: Countdown, tmp_path: Path
) -> None:
    config = small_config(tmp_path / "run", task__args="{max_number: 8, max_target: 30}")
    tokenizer = countdown.tokenizer()
    with open_folder(config, resume=False):
        run_identity.begin(config.output_dir, config, countdown, tokenizer)  # and killed here
    first = run_identity.read(config.output_dir)["id"]
    (config.output_dir / ".metrics.jsonl.12-0123abcd.partial").write_text("half a row")
    with open_folder(config, resume=False):
        run_identity.begin(config.output_dir, config, countdown, tokenizer)
        save_config(config)
    assert run_identity.read(config.output_dir)["id"] != first
    with open_folder(config, resume=True):
        run_identity.begin(config.output_dir, config, countdown, tokenizer)
    left = {path.name for path in config.output_dir.iterdir()}
    assert left == {".lock", "config.yaml", "run.json", "run-data.json"}


def test_a_config_that_was_edited_is_not_what_the_run_began_with(
    small_config: Callable[..., RunConfig], countdown: Countdown, tmp_path: Path
) -> None:
    args = {"task__args": "{max_number: 8, max_target: 30}", "rollout__vllm_args": "{a: {1: x}}"}
    config, folder = small_config(tmp_path / "run", **args), tmp_path / "run"
    with open_folder(config, resume=False):
        run_identity.begin(folder, config, countdown, countdown.tokenizer())
        save_config(config)
    edited = config.model_copy(update={"steps": 9, "seed": 9})
    save_config(edited)
    with pytest.raises(
        ConfigError, match=r"^seed: the run began with 0, not 9, .*drop the option or put the file back"
    ):
        enter(edited, resume=True)
    enter(edited.model_copy(update={"seed": 0}), resume=True)


def test_a_question_that_cannot_be_put_is_one_line(begun: Callable[..., None]) -> None:
    class Broken(Sums):
        def question(self, prompt: Prompt) -> OracleQuestion:
            raise RuntimeError("not\nyet")

    with pytest.raises(ConfigError, match=r"^task 'sums': question\(\) of prompt '1\+1': RuntimeError: not yet$"):
        begun(Broken(sums().train, sums().heldout))


def test_a_run_of_an_older_version_is_refused(begun: Callable[..., None], tmp_path: Path) -> None:
    (tmp_path / "run" / "run.json").unlink()
    (tmp_path / "run" / "checkpoints" / "step-3").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"older version.*gapg eval .*/checkpoints/step-3 takes that model as before"):
        begun(sums())


def test_every_key_is_one_that_may_change_or_one_that_may_not() -> None:
    """Named one by one, so that a new key is thought about: what changes what is trained may not change."""
    fixed = [k for k in flat(load_config("quickstart").model_dump()) if not k.startswith(MAY_CHANGE)]
    assert fixed == [
        *("method", "seed", "task.name", "task.args", "model.llama.hidden_size", "model.llama.num_layers"),
        *("model.llama.num_heads", "model.llama.intermediate_size", "model.llama.max_positions", "model.lora"),
        *("warm_start.steps", "warm_start.batch_size", "warm_start.optim.betas", "warm_start.optim.weight_decay"),
        *("warm_start.optim.grad_clip", "warm_start.optim.warmup_steps", "warm_start.optim.flat"),
        *("warm_start.optim.final_lr", "rollout.prompts_per_step", "rollout.samples_per_prompt"),
        *("rollout.max_prompt_tokens", "rollout.max_new_tokens", "rollout.temperature", "reward.alpha_a"),
        *("reward.alpha_c", "reward.alpha_f", "marginal.score", "marginal.weight", "marginal.trace", "marginal.prices"),
        *("marginal.cloud", "loss.advantage", "loss.aggregation", "loss.epochs", "loss.clip"),
        *("loss.tis_cap", "loss.kl", "budget.cloud_fraction", "budget.filter", "budget.controller", "budget.rho"),
        *("budget.gain", "budget.damping", "oracle.kind", "oracle.accuracy", "oracle.model", "oracle.samples"),
        *("oracle.temperature", "oracle.max_tokens", "optim.betas", "optim.weight_decay", "optim.warmup_steps"),
        *("optim.flat", "optim.final_lr", "eval.problems"),
    ]


# --- whole runs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", [{"model__lora__rank": "4"}, {"loss__kl_coef": "0.1"}, {}])
def test_the_base_that_a_run_goes_on_from_is_compared(
    small_config: Callable[..., RunConfig], folder: Folder, tmp_path: Path, setting: dict[str, str]
) -> None:
    base = folder(max_position_embeddings=128)
    (tmp_path / "run").mkdir()
    config = small_config(tmp_path / "run", eval__every="0", rollout__prompts_per_step="2", steps="1", **setting)
    task = make_task(config)

    def resumed() -> Run:
        run = build_run(config, tmp_path / "run", task, base)
        run.close()
        return run

    run = resumed()
    train(run, validate)
    assert resumed().state.step == 1
    _write_weights(base)
    if not setting:
        assert resumed().state.step == 1, "whole weights go on from themselves"
        return
    with pytest.raises(ConfigError, match=rf"^{base}: not the base weights that the run .*, which (model|loss)"):
        resumed()


def test_more_steps_say_what_becomes_of_the_learning_rate(
    start: Callable[..., Run], capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"eval__every": "0", "rollout__prompts_per_step": "2", "optim__lr": "4e-4", "optim__warmup_steps": "0"}
    train(start(steps="2", **settings), validate)
    start(steps="2", **settings)
    assert "learning rate" not in capsys.readouterr().err
    start(steps="5", **settings)
    said = (
        "steps: 2 -> 5: the learning rate follows the schedule of 5 steps from here on: 2.00e-04 at step 3, instead of"
    )
    assert f"{said} 0.00e+00" in capsys.readouterr().err
    start(steps="1", **settings)
    assert "steps: 2 -> 1: the run has 2 behind it, so nothing more is trained" in capsys.readouterr().err


def test_a_queue_of_other_data_is_refused(start: Callable[..., Run], capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"eval__every": "0", "steps": "1", "rollout__prompts_per_step": "2"}
    run = start(**settings)
    run.queue.returned = ["9 9 9 = 99"]
    run.state.step = 1
    run.save()
    with pytest.raises(ConfigError, match=r"the data has no training problem '9 9 9 = 99', which is to be asked again"):
        start(**settings)


SUMS = """
import os
from gapg.tasks.countdown import Countdown
class Mine(Countdown):
    def prompts(self, split):
        return super().prompts(split)[int(os.environ.get("SKIP", 0)):]
"""


def test_the_command_refuses_other_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "skipping_task.py").write_text(SUMS)
    monkeypatch.syspath_prepend(str(tmp_path))
    command = [*SMALL, "--task.name", "skipping_task:Mine", "--steps", "1", "--warm-start", ""]
    command += ["--output-dir", str(tmp_path / "run")]
    main(command)
    content = json.loads((tmp_path / "run/checkpoints/step-1/manifest.json").read_text())
    assert content["run"] == run_identity.read(tmp_path / "run")["id"] and content["config"]["steps"] == 1
    assert {len(sha256) for sha256 in content["began_with"].values()} == {64}
    main([*command, "--resume"])
    for more, word in (([], "task: the data has"), (["--task.args", "{max_number: 5, max_target: 24}"], "task.args")):
        monkeypatch.setenv("SKIP", "0" if more else "1")
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main([*command, "--resume", *more])
        assert left.value.code == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("gapg: ")]
        assert word in line
