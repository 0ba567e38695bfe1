"""The command line: one line and exit code 2 for what the user can mend, before anything slow; and the commands."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gapg.commands.cli import main
from gapg.config import _warn_of_compare, load_config
from gapg.errors import ConfigError
from gapg.jsonl import read_jsonl
from gapg.runs import checkpoint
from gapg.runs.run_dir import open_folder

SMALL = [
    *("--task.args", "{max_number: 6, max_target: 24}"),
    *("--model.llama", "{hidden_size: 32, num_layers: 1, num_heads: 1, intermediate_size: 32}"),
    *("--tensorboard", "false", "--threads", "1", "--steps", "1", "--eval.every", "0"),
    *("--eval.heldout", "16"),
    *("--rollout.prompts-per-step", "2", "--rollout.samples-per-prompt", "2", "--eval.problems", "4"),
]


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line on stderr of a command that exits with 2."""
    with pytest.raises(SystemExit) as left:
        main(argv)
    assert left.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("gapg: ")
    return lines[0]


def jsonl(path: Path, *rows: dict[str, object]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_it_is_quiet_and_without_torch_in_a_process_of_its_own(tmp_path: Path) -> None:
    """Exit code, one line, nothing written, and no time spent on torch."""
    words = ["train", "quickstart", "--optim.lrr", "1", "--output-dir", str(tmp_path / "x")]
    done = subprocess.run([sys.executable, "-X", "importtime", "-m", "gapg", *words], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    imports, said = [], []
    for line in done.stderr.splitlines(keepends=True):
        (imports if line.startswith("import time:") else said).append(line)
    assert "".join(said) == "gapg: optim.lrr: unknown key; did you mean optim.lr?\n"
    modules = {line.rpartition("|")[2].strip() for line in imports}
    assert "gapg.config" in modules and not modules & {"torch", "transformers", "vllm", "triton"}
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["train", "quickstrat"], ["quickstrat", "presets", "quickstart"]),
        (["train", "quickstart", "--optim.lrr", "1"], ["optim.lrr", "optim.lr?"]),
        (["train", "quickstart", "--steps", "many"], ["steps", "many", "integer"]),
        (["train", "quickstart", "--reward.alpha-c", "1.5"], ["reward.alpha_c=1.5", "reward.alpha_a", "below"]),
        (["train", "quickstart", "--model.path", "/no/such/model"], ["model.path=/no/such/model", "does not exist"]),
        (["train", "quickstart", "--model.path", "tests"], ["model.path=tests", "config.json"]),
        (["train", "quickstart", "--task.name", "countdwn"], ["task.name", "countdown", "maths"]),
        (["train", "quickstart", "--task.name", "nowhere.mine:Task"], ["task.name", "nowhere", "PYTHONPATH"]),
        (["train", "quickstart", "--task.name", "json:loads"], ["task"]),
        (["train", "quickstart", "--task.args.numbrs", "3"], ["task.args", "numbrs", "numbers"]),
        (["train", "quickstart", "--task.args.numbers", "9"], ["numbers", "2 to 6"]),
        (["train", "quickstart", "--warm-start.demonstrations", "no.jsonl"], ["warm_start.demonstrations", "no.jsonl"]),
        (["train", "quickstart", "--token-cap", "20"], ["token_cap=20", "raise"]),
        (["train", "quickstart", "--output-dir", "/dev/null/x"], ["output_dir=/dev/null/x", "choose"]),
        (["train", "quickstart", "--output-dir", "a" * 300], ["output_dir=", "File name too long", "choose"]),
        (["train", "quickstart", "--resume", "--output-dir", "a" * 300], ["output_dir=", "too long", "choose"]),
        (["eval", "/no/such/run"], ["/no/such/run", "no such folder"]),
        (["config", "show", "quickstrat"], ["quickstrat", "presets"]),
    ],
)
def test_one_line_with_key_and_fix(
    argv: list[str],
    words: list[str],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tests").mkdir()
    line = refusal(capsys, *argv)
    assert all(word in line for word in words), line
    assert not (tmp_path / "runs").exists(), "nothing is left behind"


def test_no_prompt_fits(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    argv = ["train", "quickstart", *SMALL, "--rollout.max-prompt-tokens", "2", "--output-dir", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as left:
        main(argv)
    assert left.value.code == 2
    assert "rollout.max_prompt_tokens=2: no training prompt fits; raise it" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], ["no command given", "train, eval, calibrate, config, info"]),
        (["tune", "quickstart"], ["'tune' is no command", "train, eval"]),
        (["experiment", "all", "--jobs", "2"], ["experiment is no command any more", "python bench/study.py NAME"]),
        (["train"], ["usage: gapg train NAME"]),
        (["train", "--resume"], ["usage: gapg train NAME"]),
        (["train", "quickstart", "--optim.lr"], ["--optim.lr: needs a value"]),
        (["train", "quickstart", "--optim.lr", "--steps", "3"], ["--optim.lr: needs a value"]),
        (["train", "quickstart", "--steps=", "--wandb"], ["--steps: needs a value"]),
        (["train", "quickstart", "--output-dir"], ["--output-dir: needs a value"]),
        (["train", "quickstart", "--optim.lr", "-1e-4"], ["optim.lr='-1e-4'", "greater than 0"]),
        (["train", "quickstart", "--optim.lrr"], ["optim.lrr: unknown key", "optim.lr?"]),
        (["train", "quickstart", "--model.lora.rnk", "8"], ["model.lora.rnk: unknown key", "model.lora.rank?"]),
        (["train", "quickstart", "--model.lora", "{rnk: 8}"], ["model.lora.rnk: unknown key", "model.lora.rank?"]),
        (["train", "quickstart", "--loss.clip", "0.2,0.28"], ["loss.clip", "leave it out, or set loss.epochs to 2"]),
        (["train", "quickstart", "--loss.clip", "0.2"], ["loss.clip: too few values", "[0.1, 0.2]"]),
        (["train", "quickstart", "--warm-start", "5"], ["warm_start=5", "a section of keys"]),
        (["train", "quickstart", "--compare"], ["compare", "python bench/study.py quickstart"]),
        (["train", "quickstart", "--no-resume"], ["no_resume: unknown key", "resume?"]),
        (["train", "quickstart", "--resume=perhaps"], ["resume='perhaps'", "boolean"]),
        (["train", "quickstart", "--resume", "yes"], ["'yes': one word too many", "gapg train NAME"]),
        (["train", "quickstart", "seed", "3"], ["'seed': one word too many", "gapg train NAME"]),
        (["train", "quickstart", "-x"], ["'-x': expected an option"]),
        (["train", "--wandb", "quickstart"], ["usage: gapg train NAME"]),
        (["eval"], ["usage: gapg eval CHECKPOINT"]),
        (["eval", "x", "--config"], ["--config: needs a value"]),
        (["eval", "x", "--config", "--threads", "1"], ["--config: needs a value"]),
        (["eval", "x", "--config="], ["--config: needs a value"]),
        (["eval", "x", "--output-dir", "--threads", "1"], ["--output-dir: needs a value"]),
        (["eval", "x", "--output_dir", "", "--threads", "1"], ["--output_dir: needs a value"]),
        (["eval", "x", "--config", "quickstart", "--threads"], ["--threads: needs a value"]),
        (["eval", "x", "--trust-cod"], ["trust_cod: unknown key", "trust_code?"]),
        (["eval", "--config", "quickstart"], ["usage: gapg eval CHECKPOINT"]),
        (["calibrate", "--temperature"], ["--temperature: needs a value"]),
        (["calibrate", "x", "--temperature", "warm"], ["temperature='warm': should be a number"]),
        (["calibrate", "x", "--temperature", "-1e-4"], ["temperature=-0.0001: must be 0"]),
        (["calibrate", "x", "--temperature", "inf"], ["temperature=", "finite number"]),
        (["calibrate", "x", "--problems", "--accuracy"], ["--problems: needs a value"]),
        (["calibrate", "x", "--problems", "1.5"], ["problems='1.5'", "integer"]),
        (["config", "lst"], ["action='lst'", "'list' or 'show'"]),
        (["config", "show"], ["gapg config show NAME", "gapg config list"]),
        (["config", "list", "quickstart"], ["gapg config list takes nothing more", "gapg config show NAME"]),
        (["config", "list", "--seed", "3"], ["gapg config list takes nothing more", "gapg config show NAME"]),
        (["info", "--config"], ["--config: needs a value"]),
        (["info", "--seed", "3"], ["--seed", "--config NAME"]),
        (["info", "quickstart"], ["'quickstart': one word too many"]),
    ],
)
def test_words_that_do_not_fit_are_one_line(
    argv: list[str],
    words: list[str],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    line = refusal(capsys, *argv)
    assert all(word in line for word in words), line
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_a_value_may_begin_with_dashes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refusal(capsys, "eval", str(tmp_path), "--config=--mine", "--output-dir", "none", "--threads", "1")
    assert "no model" in line
    main(["config", "show", "quickstart", "--output-dir=--mine"])
    assert "output_dir: --mine" in capsys.readouterr().out


def maths(tmp_path: Path, *rows: dict[str, object]) -> list[str]:
    path = jsonl(tmp_path / "data.jsonl", *rows)
    return [
        *("train", "gsm8k-smollm2", "--rollout.engine", "transformers", "--output-dir", str(tmp_path / "run")),
        *("--task.args.train", f"{{path: {path}, subset: null}}", "--task.args.heldout", f"{{path: {path}}}"),
        *("--oracle.api-key-env", "GAPG_TEST_KEY"),
    ]


def test_data_without_the_needed_columns(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    make_model: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    folder = tmp_path / "model"
    make_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    line = refusal(capsys, *maths(tmp_path, {"q": "1 + 1", "a": "2"}), "--model.path", str(folder))
    assert all(word in line for word in ("task.args", "question", "q, a")), line


def test_a_missing_api_key(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    make_model: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Named with its variable, before anything slow, and a second try with the key is not refused for the first."""
    monkeypatch.delenv("GAPG_TEST_KEY", raising=False)
    argv = [
        *("train", "quickstart", *SMALL, "--output-dir", str(tmp_path / "run")),
        *("--oracle.kind", "openai", "--oracle.model", "cloud", "--oracle.api-key-env", "GAPG_TEST_KEY"),
    ]
    line = refusal(capsys, *argv)
    assert "GAPG_TEST_KEY" in line
    assert "api_key_env" in line or "export" in line or "set" in line
    again = refusal(capsys, *argv)
    assert again == line, "the folder must not count as a run because of a start that was refused"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder, made by the command."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    argv = ["--output-dir", str(folder), "--warm-start.steps", "4", "--warm-start.batch-size", "8"]
    main(["train", "quickstart", *SMALL, *argv])
    return folder


def test_train_leaves_a_run(trained: Path) -> None:
    assert [r["step"] for r in read_jsonl(trained / "metrics.jsonl")] == [1]
    assert (trained / "checkpoints" / "step-1" / "model" / "model.safetensors").is_file()
    assert load_config(str(trained / "config.yaml")).steps == 1


def test_a_second_run_in_the_same_folder_is_refused(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted((p, p.stat().st_mtime_ns) for p in trained.rglob("*") if p.is_file() and p.name != ".lock")
    line = refusal(capsys, "train", "quickstart", *SMALL, "--output-dir", str(trained))
    assert all(word in line for word in ("output_dir", str(trained), "--resume", "--output-dir"))
    assert before == sorted((p, p.stat().st_mtime_ns) for p in trained.rglob("*") if p.is_file() and p.name != ".lock")


def test_a_folder_in_use_is_locked(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = load_config(str(trained / "config.yaml"))
    with open_folder(config, resume=True):
        line = refusal(capsys, "train", "quickstart", *SMALL, "--output-dir", str(trained), "--resume")
    assert "another run is writing there" in line


def test_a_finished_run_resumes_to_nothing(trained: Path) -> None:
    before = (trained / "metrics.jsonl").read_bytes()
    main(["train", "quickstart", *SMALL, "--output-dir", str(trained), "--resume", "--warm-start.steps", "4"])
    assert (trained / "metrics.jsonl").read_bytes() == before
    assert checkpoint.steps(trained / "checkpoints") == [1]


def test_a_run_of_an_older_version_goes_on(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its files hold `compare`, which is no key any more."""
    _warn_of_compare.cache_clear()
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    for name in ("config.yaml", "preset.yaml", "run.json"):
        tree = yaml.safe_load((folder / name).read_text())
        {"preset.yaml": tree.get("settings"), "run.json": tree.get("config")}.get(name, tree)["compare"] = True
        (folder / name).write_text(json.dumps(tree))
    main(["train", "quickstart", "--output-dir", str(folder), "--resume", "--steps", "2"])
    assert "python bench/study.py quickstart" in capsys.readouterr().err
    assert checkpoint.steps(folder / "checkpoints") == [1, 2]
    assert [r["step"] for r in read_jsonl(folder / "metrics.jsonl")] == [1, 2]


def test_a_resume_changes_what_a_run_does_and_not_what_it_is(trained: Path) -> None:
    saved = str(trained / "config.yaml")
    may = {"optim.lr": "1e-7", "model.dtype": "bfloat16", "rollout.engine": "vllm", "loss.kl_coef": "0.1", "steps": "9"}
    with open_folder(load_config(saved, may), resume=True):
        pass
    for key, value in {"optim.betas": "[0.5, 0.5]", "seed": "7", "reward.alpha_c": "0.1", "loss.epochs": "2"}.items():
        refused = pytest.raises(ConfigError, match=f"^{key}: .*a resumed run stays the same; drop the option")
        with refused, open_folder(load_config(saved, {key: value}), resume=True):
            pass


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("return [1.0] * (len(group.outcomes) + 1)", ["returned 3 rewards for 2 responses"]),
        ("return [float('nan'), 0.0]", ["reward 1 of 2 is nan"]),
        ("return group.reward", ["raised AttributeError", "mine.py:1"]),
    ],
)
def test_a_reward_function_is_tried_before_anything_slow(
    body: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    (tmp_path / "mine.py").write_text(f"def reward(group, a, c, f): {body}\n")
    argv = ["--reward.function", "mine:reward", "--output-dir", str(tmp_path / "run"), "--warm-start", ""]
    line = refusal(capsys, "train", "quickstart", *SMALL, *argv)
    assert all(word in line for word in ("reward.function=mine:reward", *words)), line
    assert not (tmp_path / "run").exists()


def test_no_steps_leave_a_model_all_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--steps 0` is a warm start alone; what it says is done must be there."""
    argv = ["--output-dir", str(tmp_path / "run"), "--warm-start.steps", "2", "--warm-start.batch-size", "4"]
    main(["train", "quickstart", *SMALL, *argv, "--steps", "0"])
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("trained: ")]
    assert (Path(said[0].removeprefix("trained: ")) / "config.json").is_file()


EVAL = ["--eval.heldout", "20", "--threads", "1"]


def assert_evaluated(folder: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["model"] == str(model)
    assert summary["oracle"] == "solver", "a stand-in is called a stand-in"
    assert [r["name"] for r in summary["rows"]] == ["greedy", "sampled, T=1"]
    predictions = read_jsonl(folder / "predictions.jsonl")
    for row, label in zip(summary["rows"], ("greedy", "sampled"), strict=True):
        assert row["n"] == 20
        for key in ("accuracy", "local_accuracy", "call_fraction"):
            assert 0 <= row[f"{key}_low"] <= row[key] <= row[f"{key}_high"] <= 1
        lines = [line for line in predictions if line["decoding"] == label]
        assert len(lines) == 20
        assert len({line["id"] for line in lines}) == 20
        assert sum(row["outcomes"].values()) == 20
        assert all(
            {"problem", "response", "outcome", "reward", "oracle_answers", "gold"} <= set(line) for line in lines
        )
    assert "together" in capsys.readouterr().out


@pytest.mark.parametrize("which", ["run", "checkpoint", "model"])
def test_eval_of_a_run(trained: Path, which: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run's folder, a checkpoint of it, or that one's model: the run's own config says how."""
    newest = trained / "checkpoints" / "step-1"
    target = {"run": trained, "checkpoint": newest, "model": newest / "model"}[which]
    main(["eval", str(target), "--output-dir", str(tmp_path / "eval"), *EVAL])
    assert_evaluated(tmp_path / "eval", newest / "model", capsys)


def test_eval_writes_into_the_run_by_default(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["eval", str(trained), *EVAL])
    assert_evaluated(trained / "eval" / "step-1", trained / "checkpoints" / "step-1" / "model", capsys)


def test_eval_of_a_model_that_was_never_trained_here(
    tmp_path: Path,
    make_model: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "some-model"
    make_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    assert "--config" in refusal(capsys, "eval", str(folder), *EVAL)
    main(["eval", str(folder), "--config", "quickstart", "--output-dir", str(tmp_path / "eval"), *EVAL])
    assert_evaluated(tmp_path / "eval", folder, capsys)


def test_config_show_and_list(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    main(["config", "show", "quickstart", "--optim.lr", "1e-4"])
    shown = tmp_path / "shown.yaml"
    shown.write_text(capsys.readouterr().out)
    assert load_config(str(shown)) == load_config("quickstart", {"optim.lr": "1e-4"})
    assert "lr: 0.0001" in shown.read_text()
    main(["config", "list"])
    assert "quickstart" in capsys.readouterr().out.splitlines()


def test_info_says_what_is_in_use_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    main(["info"])
    out = capsys.readouterr().out
    for word in (
        "torch",
        "transformers",
        "device",
        "log-prob kernel",
        "attention",
        "engine transformers",
        "engine vllm",
    ):
        assert word in out
    assert "CPU" in out or "sm_" in out
