"""A folder of someone else's: nothing that its config or its model names is run, and its cloud is shown before use."""

import json
import pickle
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import PreTrainedTokenizerBase

from gapg.build import make_oracle, render
from gapg.commands.cli import main
from gapg.commands.target import Target, find_model, open_target
from gapg.config import RunConfig, dump_config, load_config
from gapg.config_sections import ModelConfig
from gapg.errors import ConfigError
from gapg.evaluation import trust
from gapg.model.load import load_model, load_tokenizer
from gapg.tasks.base import Prompt
from gapg.tasks.countdown import Countdown
from gapg.tasks.templates import render_instruction
from gapg_rollout.oracle.cache import AnswerCache

EVIL = """
from pathlib import Path
Path({mark!r}).touch()
from gapg.tasks.countdown import Countdown
class Task(Countdown): ...
def reward(*_): ...
def rows(split): return [{{"question": "1+1", "answer": "2"}}]
"""


@pytest.fixture
def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file that is there as soon as the module `their_evil`, which can be imported, was."""
    mark = tmp_path / "it-ran"
    (tmp_path / "their_evil.py").write_text(EVIL.format(mark=str(mark)))
    monkeypatch.syspath_prepend(tmp_path)
    yield mark
    sys.modules.pop("their_evil", None)


@pytest.fixture
def shared(folder: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """`shared(task=…, …)`: one of a run's checkpoints, the run's config as given; its first keys are sections."""

    def make(**settings: Any) -> Path:
        run = tmp_path / "shared run"
        if not run.exists():
            shutil.copytree(folder(), run / "checkpoints" / "step-1" / "model")
        tree = {"task": "countdown", "rollout": {"max_prompt_tokens": 16, "max_new_tokens": 8}, "threads": 1} | settings
        (run / "config.yaml").write_text(yaml.safe_dump(tree))
        return run / "checkpoints" / "step-1"

    return make


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line on stderr of a command that exits with 2."""
    with pytest.raises(SystemExit) as left:
        main(argv)
    assert left.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


CODE = [
    ({"task": {"name": "subprocess:Popen", "args": {"args": "touch {mark}", "shell": True}}}, "task.name"),
    ({"task": {"name": "os:system", "args": {"command": "touch {mark}"}}}, "task.name"),
    ({"task": "their_evil:Task"}, "task.name"),
    ({"task": {"name": "their_evil:Task", "args": {"seed": 1}}}, "task.name"),
    ({"reward": {"function": "their_evil:reward"}}, "reward.function"),
    ({"task": {"name": "maths", "args": {"train": "their_evil:rows", "heldout": {"split": "b"}}}}, "task.args.train"),
    (
        {"task": {"name": "maths", "args": {"train": {"path": "their_evil:rows"}, "heldout": {}}}},
        "task.args.train.path",
    ),
    ({"task": {"name": "countdown", "args": {"x": [{"deep": ["their_evil:rows"]}]}}}, "task.args.x.deep"),
    # functions of this package do things too
    (
        {"task": {"name": "maths", "args": {"train": "gapg.commands.cli:main", "heldout": {"split": "b"}}}},
        "task.args.train",
    ),
    *(
        ({"rollout": {"engine": "vllm", "vllm_args": {name: value}}}, f"rollout.vllm_args.{name}")
        for name, value in {
            "trust_remote_code": True,
            "worker_extension_cls": "their_evil.Task",
            "logits_processors": ["their_evil:Task"],
            "tokenizer": "elsewhere",
            "hf_overrides": {"auto_map": {}},
        }.items()
    ),
]


@pytest.mark.parametrize(("settings", "key"), CODE)
def test_a_shared_config_that_names_code_is_refused(
    settings: dict[str, Any],
    key: str,
    shared: Callable[..., Path],
    mark: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    checkpoint = shared(**json.loads(json.dumps(settings).replace("{mark}", str(mark))))
    for command in ("eval", "calibrate"):
        line = refusal(capsys, command, str(checkpoint))
        assert line.startswith(f"gapg: {key}: {tmp_path}/shared run/config.yaml names ")
        assert "--trust-code" in line
        assert "--config" in line
    # what a suite asks it, what was trained on, neither a config of the user's own nor an option vouches for
    own = ["--task", "{name: countdown, args: {max_number: 5, max_target: 20}}", "--suite", "maths"]
    for named in (own, ["--config", "quickstart", *own]) if key.startswith("task.") else ():
        line = refusal(capsys, "eval", str(checkpoint), *named)
        assert line.startswith(f"gapg: {tmp_path}/shared run/config.yaml: its task, ")
        assert line.endswith("add --trust-code if you trust whoever wrote it, or leave out --suite")
    assert not mark.exists()
    assert not any(checkpoint.parent.parent.rglob("summary.json"))


def test_code_that_the_user_vouches_for_runs(shared: Callable[..., Path], mark: Path, tmp_path: Path) -> None:
    checkpoint = shared(task="their_evil:Task")
    own = tmp_path / "own.yaml"
    shutil.copy(tmp_path / "shared run" / "config.yaml", own)
    for config_name, overrides, trusted in (
        (None, {}, True),
        (str(own), {}, False),
        (None, {"task.name": "their_evil:Task"}, False),
        (None, {"task": "{name: 'their_evil:Task'}"}, False),
    ):
        mark.unlink(missing_ok=True)
        sys.modules.pop("their_evil", None)
        target = open_target(checkpoint, config_name, overrides, trust_code=trusted)
        assert type(target.task).__name__ == "Task"
        assert mark.exists()
        assert target.settings["overrides"] == overrides
    # an option excuses nothing beside it
    with pytest.raises(ConfigError, match=r"task\.name"):
        open_target(checkpoint, None, {"task.args.seed": "3"})


def test_the_task_that_was_trained_is_its_run_s(shared: Callable[..., Path], mark: Path) -> None:
    checkpoint = shared(task="their_evil:Task")
    other = {"task": "{name: countdown, args: {max_number: 5, max_target: 20}}"}
    target = open_target(checkpoint, None, other, trust_code=True)
    assert not mark.exists() and type(target.trained_task()).__name__ == "Task" and mark.exists()
    # of the run's reward nothing is used
    checkpoint = shared(task="countdown", reward={"function": "their_evil:reward"})
    other["reward.function"] = "gapg.judge:rewards"
    target = open_target(checkpoint, None, other)
    assert isinstance(target.trained_task(), Countdown) and target.trained_task() is not target.task
    same = open_target(checkpoint, None, {"reward.function": "gapg.judge:rewards"})
    assert same.trained_task() is same.task
    lost = shared(task={"name": "maths", "args": {"train": "lost.jsonl", "heldout": {"split": "b"}}})
    file = lost.parents[1] / "config.yaml"
    with pytest.raises(ConfigError, match=rf"^{file}: its task, .*: task.args.train.path: lost.jsonl does not exist"):
        open_target(lost, None, other).trained_task()


def test_what_is_no_task_is_not_called_for_anyone(
    shared: Callable[..., Path], mark: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = shared(task={"name": "subprocess:Popen", "args": {"args": f"touch '{mark}'", "shell": True}})
    assert "subprocess:Popen is no task" in refusal(capsys, "eval", str(checkpoint), "--trust-code")
    assert not mark.exists()


def test_a_plain_config_needs_no_trust(shared: Callable[..., Path]) -> None:
    texts = {
        "path": "openai/gsm8k",
        "split": "test",
        "subset": "a: b",
        "answer_pattern": "#### (.+)",
        "url": "s3://b/c",
    }
    for settings in (
        {"task": {"name": "gapg.tasks.countdown:Countdown", "args": {"numbers": 3}}},
        {"task": {"name": "maths", "args": {"train": texts, "heldout": {"split": "train[:10%]"}}}},
        {"rollout": {"vllm_args": {"gpu_memory_utilization": 0.3, "max_num_seqs": 8, "enforce_eager": True}}},
    ):
        file = shared(**settings).parents[1] / "config.yaml"
        trust.check_code(load_config(str(file)), file, {})


def test_presets_name_nothing_foreign() -> None:
    for name in ("quickstart", "gsm8k-smollm2", "math-qwen2.5-1.5b"):
        trust.check_code(load_config(name), Path("config.yaml"), {})


# --- model folders ---------------------------------------------------------------------------------------------------


def test_code_in_a_model_folder_does_not_run(folder: Callable[..., Path], mark: Path) -> None:
    """`auto_map` of the model's and of the tokenizer's config, a way to generate of its own, and pickled weights."""
    path = folder()
    code = f"from pathlib import Path\nPath({str(mark)!r}).touch()\n"
    for name in ("modeling_own.py", "configuration_own.py", "tokenization_own.py", "custom_generate/generate.py"):
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(code)
    own = {
        "config.json": {"AutoConfig": "configuration_own.C", "AutoModelForCausalLM": "modeling_own.M"},
        "tokenizer_config.json": {"AutoTokenizer": ["tokenization_own.T", "tokenization_own.T"]},
    }
    for name, auto_map in own.items():
        settings = json.loads((path / name).read_text())
        (path / name).write_text(json.dumps(settings | {"auto_map": auto_map}))

    class Touches:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (mark,)

    (path / "pytorch_model.bin").write_bytes(pickle.dumps({"lm_head.weight": Touches()}))
    config = ModelConfig(path=str(path))
    tokenizer = load_tokenizer(config, Countdown())
    assert type(load_model(config, tokenizer, seed=0)).__module__.startswith("transformers.")
    assert not mark.exists()
    (path / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="no weights in safetensors"):
        load_model(config, tokenizer, seed=0)
    settings = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(settings | {"model_type": "own"}))
    with pytest.raises(ConfigError):
        load_tokenizer(config, Countdown())
    assert not mark.exists()


def test_files_that_no_code_of_transformers_foresaw(folder: Callable[..., Path]) -> None:
    """A text part of no known model; a tokenizer on which the code in Rust panics, which is no Exception in Python."""
    path = folder()
    settings = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(settings | {"text_config": {"model_type": "none"}}))
    with pytest.raises(ConfigError, match="text_config"):
        load_tokenizer(ModelConfig(path=str(path)), Countdown())
    (path / "config.json").write_text(json.dumps(settings))
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ConfigError, match=r"no tokenizer: PanicException: .*wants a whole tokenizer.json"):
        load_tokenizer(ModelConfig(path=str(path)), Countdown())


def test_a_chat_template_is_no_program(tokenizer: PreTrainedTokenizerBase, mark: Path) -> None:
    class Templated(Countdown):
        def render(self, prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> list[int]:
            return render_instruction(prompt.text, tokenizer)

    task = Templated()
    own = task.tokenizer()
    own.chat_template = f"{{{{ cycler.__init__.__globals__.os.system('touch {mark}') }}}}"
    with pytest.raises(ConfigError, match="is unsafe"):
        render(task, task.prompts("train")[0], own)
    assert not mark.exists()


def test_a_token_without_embedding_is_refused_before_a_rollout(tokenizer: PreTrainedTokenizerBase) -> None:
    class Beyond(Countdown):
        def render(self, prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> list[int]:
            return [0, len(tokenizer)]

    task = Beyond()
    with pytest.raises(ConfigError, match=rf"render\(\) of prompt .* returned token {len(tokenizer)}, and the model"):
        render(task, task.prompts("train")[0], tokenizer, len(tokenizer))
    assert render(task, task.prompts("train")[0], tokenizer, len(tokenizer) + 1) == [0, len(tokenizer)]


# --- the cloud that a shared config names ----------------------------------------------------------------------------

CLOUD = {"kind": "openai", "model": "cloud", "base_url": "https://api.example.com/v1", "api_key_env": "THEIR_KEY"}


def cloud(**oracle: Any) -> RunConfig:
    return RunConfig.model_validate({"task": "countdown", "oracle": CLOUD | oracle})


def test_the_server_and_the_key_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "config.yaml"
    url = f"oracle: questions go to {CLOUD['base_url']}"
    assert trust.where_questions_go(cloud(), file, {}) == f"{url} (oracle.base_url from {file})"
    assert trust.where_questions_go(cloud(), file, {"oracle.base_url": ""}) is None, "no key goes there"
    monkeypatch.setenv("THEIR_KEY", "sk-0123456789abcdef")
    said = f"{url}, with the key in THEIR_KEY (oracle.base_url and oracle.api_key_env from {file})"
    assert trust.where_questions_go(cloud(), file, {}) == said
    said = f"{url}, with the key in THEIR_KEY (oracle.api_key_env from {file})"
    assert trust.where_questions_go(cloud(), file, {"oracle.base_url": ""}) == said
    assert trust.where_questions_go(cloud(), file, {"oracle.base_url": "", "oracle.api_key_env": ""}) is None
    assert trust.where_questions_go(cloud(kind="solver"), file, {}) is None


def test_an_answer_cache_elsewhere_is_not_made(tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    run.mkdir(), other.mkdir()
    file, place = run / "config.yaml", other / "cache.sqlite"
    trust.check_cache(cloud(), file, {})
    trust.check_cache(cloud(cache=str(run / "mine.sqlite")), file, {})
    trust.check_cache(cloud(cache=str(place), kind="solver"), file, {})
    for there in (False, True):  # SQLite takes an empty file for a new one
        if there:
            place.touch()
        with pytest.raises(ConfigError, match=r"^oracle.cache: .*outside its folder.*--oracle.cache"):
            trust.check_cache(cloud(cache=str(place)), file, {})
        trust.check_cache(cloud(cache=str(place)), file, {"oracle.cache": str(place)})
    (run / "oracle.sqlite").symlink_to(place)
    with pytest.raises(ConfigError, match="outside its folder"):
        trust.check_cache(cloud(), file, {})
    assert place.read_bytes() == b""
    place.unlink()
    AnswerCache(place).close()
    trust.check_cache(cloud(), file, {})
    trust.check_cache(cloud(cache=str(place)), file, {})


@pytest.mark.parametrize(
    ("oracle", "start"),
    [
        ({"base_url": "http://api.example.com/v1"}, "oracle.base_url http://api.example.com/v1 would send the key"),
        ({"api_key_env": "NO_SUCH_KEY"}, "oracle: no key for api.example.com: the environment variable NO_SUCH_KEY"),
        ({"cache": "/dev/null/x.sqlite"}, "oracle.cache: "),
    ],
)
def test_the_client_s_refusals_name_keys(
    oracle: dict[str, str], start: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("THEIR_KEY", "sk-0123456789abcdef")
    with pytest.raises(ConfigError) as caught:
        make_oracle(cloud(**oracle), Countdown(), tmp_path)
    assert str(caught.value).startswith(start)
    assert "\n" not in str(caught.value)
    assert "0123456789" not in str(caught.value)


def test_it_is_said_before_anything_is_asked(
    warm_model: Path, small_config: Callable[..., RunConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And a cloud that fails every question is no result: exit 3 and its reason, after all files are written."""
    run = tmp_path / "run"
    shutil.copytree(warm_model, run / "checkpoints" / "step-1" / "model")
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}/v1"
        paid = {"oracle__kind": "openai", "oracle__model": "cloud", "oracle__base_url": url, "oracle__max_retries": "0"}
        (run / "config.yaml").write_text(dump_config(small_config(run, **paid)))
        with pytest.raises(SystemExit) as left:
            main(["eval", str(run / "checkpoints" / "step-1"), "--eval.heldout", "40"])
    assert left.value.code == 3
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    said, failed = f"oracle: questions go to {url}", "the oracle failed"
    assert [line.startswith((said, failed)) for line in lines].index(True) == [
        line.startswith(said) for line in lines
    ].index(True)
    assert lines[-1].startswith("gapg: the oracle failed all ")
    assert "unknown" in captured.out
    assert "0.000  (0.000 to 1.000)" not in captured.out
    rows = [json.loads(line) for line in (run / "eval" / "step-1" / "predictions.jsonl").read_text().splitlines()]
    assert {row["decoding"] for row in rows} == {"greedy, help masked", "greedy", "sampled"}
    assert {bool(row["oracle_error"]) for row in rows if row["outcome"] == "unknown"} == {True}
    assert {row["oracle_error"] for row in rows if row["outcome"] != "unknown"} == {None}
    summary = json.loads((run / "eval" / "step-1" / "summary.json").read_text())
    assert summary["checkpoint"] == str(run / "checkpoints" / "step-1" / "model")
    assert summary["config"] == str(run / "config.yaml")
    assert summary["overrides"] == {"eval.heldout": "40"}
    assert sum(row["unknown"] for row in summary["rows"]) == sum(row["outcome"] == "unknown" for row in rows) > 0


def test_results_go_where_they_can_and_no_link_leads_them_away(
    shared: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = shared(task={"name": "countdown", "args": {"max_number": 5, "max_target": 20}})
    run, away = checkpoint.parents[1], tmp_path / "away"
    away.mkdir()
    (tmp_path / "file").touch()
    for command in ("eval", "calibrate"):
        (run / command).symlink_to(away)
        line = refusal(capsys, command, str(checkpoint))
        assert line.startswith(f"gapg: {run}/{command}/step-1")
        assert line.endswith("no place for results: a link leads out of the run's folder; choose another --output-dir")
        assert "Not a directory" in refusal(capsys, command, str(checkpoint), "--output-dir", f"{tmp_path}/file/x")
    target = Target(*find_model(checkpoint), None, None, None, None)  # type: ignore[arg-type]
    (run / "circle").symlink_to("circle")
    for usual, wanted in ((run / "circle", None), (away, None), (run, tmp_path / "file"), (run, Path("a\0b"))):
        with pytest.raises(ConfigError, match="no place for results"):
            target.place(usual, wanted)
    assert target.place(run / "x" / "y", None).is_dir()
    assert target.place(run, away / "x") == away / "x"
    assert "File name too long" in refusal(capsys, "eval", "x" * 5000)
