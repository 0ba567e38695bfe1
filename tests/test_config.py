"""Every mistake in a config is one line that names the key and the fix; every preset is right."""

from fractions import Fraction
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from gapg.config import RunConfig, _warn_of_compare, check_cloud, dump_config, load_config, presets
from gapg.config_keys import keys, parse
from gapg.errors import ConfigError


def error_of(name: str, **overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        load_config(name, {key.replace("__", "."): value for key, value in overrides.items()})
    message = str(error.value)
    assert "\n" not in message
    return message


def test_there_are_presets() -> None:
    assert {"quickstart", "countdown-qwen2.5-3b", "math-qwen2.5-1.5b", "math-llama3.2-3b", "gsm8k-smollm2"} <= set(
        presets()
    )


@pytest.mark.parametrize("name", presets())
def test_a_preset_loads_and_survives_a_round_trip(name: str, tmp_path: Path) -> None:
    config = load_config(name)
    assert config.output_dir == Path("runs") / name
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    assert load_config(str(path)) == config
    assert config.rollout.max_prompt_tokens + config.rollout.max_new_tokens <= config.token_cap
    assert config.reward.alpha_c < config.reward.alpha_a


def test_the_papers_numbers() -> None:
    config = load_config("countdown-qwen2.5-3b")
    rollout = config.rollout
    assert (rollout.samples_per_prompt, rollout.prompts_per_step, config.steps, config.optim.lr) == (8, 32, 800, 5e-6)
    assert (rollout.max_prompt_tokens, rollout.max_new_tokens) == (256, 720)
    assert (config.reward.alpha_a, config.reward.alpha_c, config.budget.exact_rho) == (1.0, 0.25, Fraction(3, 7))
    assert not config.budget.controller


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("optim.lrr", "1e-4", ["optim.lrr", "unknown key", "optim.lr?"]),
        ("optm.lr", "1e-4", ["optm.lr", "unknown key", "optim.lr?"]),
        ("sead", "1", ["sead", "unknown key", "seed?"]),
        ("rollout.max_tokens", "5", ["rollout.max_tokens", "unknown key", "rollout.max_new_tokens?"]),
        ("completely_else", "1", ["completely_else", "unknown key", "gapg config show"]),
        ("optim.lr", "fast", ["optim.lr", "fast", "number"]),
        ("optim.lr", "-1", ["optim.lr", "-1", "greater than 0"]),
        ("steps", "many", ["steps", "many", "integer"]),
        ("steps", "2.5", ["steps", "2.5", "integer"]),
        ("rollout.samples_per_prompt", "1", ["rollout.samples_per_prompt", "1", "2"]),
        ("rollout.engine", "tgi", ["rollout.engine", "tgi", "transformers", "vllm"]),
        ("budget.cloud_fraction", "1", ["budget.cloud_fraction", "less than 1"]),
        ("budget.cloud_fraction", "30", ["budget.cloud_fraction", "less than 1"]),
        ("reward.alpha_c", "1.0", ["reward.alpha_c", "reward.alpha_a", "below"]),
        ("reward.alpha_a", "0.2", ["reward.alpha_c", "reward.alpha_a", "below"]),
        ("oracle.kind", "openai", ["oracle.model", "--oracle.model"]),
        ("oracle.accuracy", "95", ["oracle.accuracy", "95", "1"]),
        ("model.dtype", "float16", ["model.dtype", "float16", "bfloat16"]),
        ("wandb", "perhaps", ["wandb", "perhaps", "boolean"]),
        ("model.lora", "{rnk: 8}", ["model.lora.rnk", "unknown key", "model.lora.rank?", "1 more"]),
        ("loss.clip", "0.2", ["loss.clip", "too few values", "[0.1, 0.2]"]),
        ("warm_start", "5", ["warm_start=5", "a section of keys"]),
        ("optim", "5", ["optim"]),
        ("optim.lr.x", "5", ["optim.lr.x", "unknown key", "optim.lr?"]),
        ("optim.lr", "", ["optim.lr", "number"]),
        ("oracle.model", "", ["oracle.model", "string"]),
        ("output_dir", "", ["output_dir", "path"]),
        ("update.pack", "maybe", ["update.pack='maybe'", "'auto'", "boolean"]),
        ("steps", "true", ["steps", "true", "integer"]),
        ("steps", "1:30", ["steps", "1:30", "integer"]),
        ("optim", "{lr: true}", ["optim.lr", "True", "needs a value"]),
        ("optim.betas", "[true, 0.9]", ["optim.betas", "True", "needs a value"]),
        ("eval", "{every: yes}", ["eval.every", "True", "needs a value"]),
    ],
)
def test_a_mistake_is_one_line_with_key_and_fix(key: str, value: str, words: list[str]) -> None:
    message = error_of("quickstart", **{key: value})
    assert all(word in message for word in words), message


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", ".nan", ".inf", "1e999", "Infinity"])
@pytest.mark.parametrize("key", ["optim.lr", "budget.gain", "reward.alpha_f", "rollout.temperature"])
def test_a_number_is_finite(key: str, value: str) -> None:
    section, _, name = key.partition(".")
    assert key in error_of("quickstart", **{key: value})
    assert key in error_of(
        "quickstart", **{section: f"{{lr: 1, {name}: {value}}}" if section == "optim" else f"{{{name}: {value}}}"}
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("optim.betas", "[1.0, 0.9]"),  # AdamW divides by 1 - beta
        ("optim.betas", "[0.9, 0.99999999999999999]"),
        ("optim.betas", "[nan, 0.9]"),
        ("optim.betas", "[0.9, .nan]"),
        ("warm_start.optim.betas", "[0.9, 1]"),
        ("optim.weight_decay", "1e300"),
        ("warm_start.optim.weight_decay", "1000"),
        ("rollout.temperature", "1e-300"),
        ("reward.alpha_a", "1e-323"),  # the controller divides by a part of it
        ("loss.tis_cap", "1e39"),  # float32 has no such number
        ("loss.kl_coef", "1e300"),
        ("optim.warmup_steps", "9" * 400),
        ("threads", "100000"),
    ],
)
def test_a_number_at_which_training_breaks_at_once_is_refused(key: str, value: str) -> None:
    assert error_of("quickstart", **{key: value}).startswith(key)


def test_an_upper_clip_that_float32_does_not_hold() -> None:
    assert error_of("quickstart", **{"loss.epochs": "2", "loss.clip": "[0.2, 1e39]"}).startswith("loss.clip.1=")


def test_numbers_near_those() -> None:
    near = {"optim.betas": "[0, 0.999999]", "optim.weight_decay": "100", "rollout.temperature": "0.01"}
    config = load_config("quickstart", near)
    assert (config.optim.betas, config.optim.weight_decay, config.rollout.temperature) == ((0, 0.999999), 100, 0.01)


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ("steps: true", "steps"),
        ("steps: yes", "steps"),
        ("token_cap: on", "token_cap"),
        ("output_dir: true", "output_dir"),
        ("output_dir: ''", "output_dir"),
        ("output_dir: [runs]", "output_dir"),
        ("optim: {lr: true}", "optim.lr"),
        ("optim: {lr: 1.0e-4, betas: [0.9, true]}", "optim.betas"),
        ("loss: {epochs: 2, clip: [true, 0.2]}", "loss.clip"),
        ("loss: {tis_cap: true}", "loss.tis_cap"),
        ("model: {path: yes}", "model.path"),
        ("model: {lora: {rank: true}}", "model.lora.rank"),
        ("oracle: {model: true}", "oracle.model"),
        ("threads: off", "threads"),
    ],
)
def test_a_truth_value_in_a_file_is_no_number_and_no_name(tmp_path: Path, line: str, key: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"task: countdown\n{line}\n")
    assert error_of(str(path)).startswith(f"{key}=")


@pytest.mark.parametrize(("text", "value"), [("true", True), ("1", True), ("on", True), ("0", False), ("no", False)])
def test_a_truth_value_is_one_in_any_spelling(tmp_path: Path, text: str, value: bool) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"task: countdown\nloss: {{entropy: {text}}}\nupdate: {{pack: {text}}}\n")
    given = {"loss.entropy": text, "update.pack": text}
    for config in (load_config(str(path)), load_config("quickstart", given)):
        assert (config.loss.entropy, config.update.pack) == (value, value)


def test_an_unknown_config_lists_the_presets() -> None:
    assert "quickstart" in error_of("quickstrat")


@pytest.mark.parametrize("text", ["a: [1", "a: 2024-13-45", "- 1\n- 2\n", "just words", "", "steps: 3\n"])
def test_a_broken_file_is_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    message = error_of(str(path))
    assert str(path) in message or "task" in message


@pytest.mark.parametrize("value", ["[1", "{a", "a: b: c", "@x", "'open", "%", "#### (.+)", "2024-01-01"])
def test_a_value_that_is_no_yaml_is_text(value: str) -> None:
    """Whatever a shell passes on: a path or a prompt with a bracket, and a pattern that YAML takes for a comment."""
    config = load_config("quickstart", {"output_dir": value, "model.path": value, "task.args.pattern": value})
    assert config.output_dir == Path(value)
    assert config.model.path == config.task.args["pattern"] == value


def test_what_is_nested_too_deep_for_yaml(tmp_path: Path) -> None:
    deep = "[" * 3000
    assert load_config("quickstart", {"task.args.pattern": deep}).task.args["pattern"] == deep
    (tmp_path / "deep.yaml").write_text(deep)
    assert "not valid YAML" in error_of(str(tmp_path / "deep.yaml"))


@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=12))
def test_no_value_ends_in_a_traceback(value: str) -> None:
    for key in ("optim.lr", "steps", "output_dir", "rollout.engine", "model.llama"):
        try:
            load_config("quickstart", {key: value})
        except ConfigError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("name", ["2024", "0012", "12:30:00", "1_000", "3.10", "1e3", "null", "true", "--x", "~"])
def test_a_name_is_what_was_written(name: str) -> None:
    """YAML would read most of them as something else."""
    config = load_config("quickstart", {"output_dir": name, "oracle.model": name})
    assert (config.output_dir, config.oracle.model) == (Path(name), name)


def test_a_folder_in_a_file_may_be_a_number_or_a_date(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    for name in ("2024", "2024-01-01"):
        path.write_text(f"task: countdown\noutput_dir: {name}\n")
        assert load_config(str(path)).output_dir == Path(name)


def test_numbers_are_decimal() -> None:
    config = load_config("quickstart", {"seed": "0012", "steps": "1_000", "threads": "null"})
    assert (config.seed, config.steps, config.threads) == (12, 1000, None)


@pytest.mark.parametrize("text", ["none", "None", "null", "~", ""])
def test_a_key_is_emptied(text: str) -> None:
    empty = {"warm_start": text, "threads": text, "oracle.temperature": text, "model.path": text, "loss.clip": text}
    config = load_config("quickstart", empty)
    assert [config.warm_start, config.threads, config.oracle.temperature, config.model.path] == [None] * 4
    assert load_config("quickstart", {"task.args.pattern": "none"}).task.args == {"pattern": "none"}


@pytest.mark.parametrize("text", ["0.2,0.28", "[0.2, 0.28]", "0.2, 0.28", "[0.2,0.28]"])
def test_a_list_needs_no_brackets(text: str) -> None:
    assert load_config("quickstart", {"loss.epochs": "2", "loss.clip": text}).loss.clip == (0.2, 0.28)


def test_a_list_of_texts() -> None:
    for text, targets in (("q_proj,v_proj", ("q_proj", "v_proj")), ("q_proj", ("q_proj",))):
        lora = load_config("quickstart", {"model.lora.rank": "8", "model.lora.targets": text}).model.lora
        assert lora is not None
        assert (lora.rank, lora.targets) == (8, targets)


@pytest.mark.parametrize("value", ["true", "false"])
def test_a_file_of_an_older_run_is_read(value: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """`compare` meant a second run beside this one: whoever had it is told, once, how that is made now."""
    _warn_of_compare.cache_clear()
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(load_config("quickstart")) + f"compare: {value}\n")
    assert load_config(str(path)) == load_config(str(path)) == load_config("quickstart")
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == (value == "true")
    assert all("python bench/study.py quickstart" in message for message in said)
    assert "python bench/study.py quickstart" in error_of("quickstart", compare=value), "an option is refused"


def test_overrides_are_typed_and_deep() -> None:
    config = load_config(
        "quickstart",
        {
            "optim.lr": "1e-4",
            "optim.betas": "[0.9, 0.95]",
            "seed": "3",
            "warm_start": "",
            "task.args.max_number": "9",
            "model.llama.hidden_size": "64",
            "rollout.vllm_args.enforce_eager": "true",
            "output_dir": "runs/x",
        },
    )
    assert (config.optim.lr, config.optim.betas, config.seed) == (1e-4, (0.9, 0.95), 3)
    assert config.warm_start is None
    assert config.task.args == {"max_number": 9}
    assert (config.model.llama.hidden_size, config.model.llama.num_layers) == (64, 3)
    assert config.rollout.vllm_args == {"enforce_eager": True}
    assert config.output_dir == Path("runs/x")
    assert load_config("quickstart") != config


def test_a_task_that_is_a_name_keeps_it(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("task: maths\noptim: {lr: 1.0e-4}\n")
    task = load_config(str(path), {"task.args.limit": "3"}).task
    assert (task.name, task.args) == ("maths", {"limit": 3})
    assert load_config("quickstart", {"task": "maths", "task.args.limit": "3"}).task == task


def parse_overrides(args: list[str]) -> dict[str, str]:
    words, _, overrides = parse(args, RunConfig)
    assert not words
    return overrides


def test_the_command_line_forms() -> None:
    args = ["--optim.lr", "1e-4", "--seed=3", "--wandb", "--output-dir", "runs/x", "--budget.filter"]
    assert parse_overrides(args) == {
        "optim.lr": "1e-4",
        "seed": "3",
        "wandb": "true",
        "output_dir": "runs/x",
        "budget.filter": "true",
    }
    assert parse_overrides(["--optim.lr", "-1"]) == {"optim.lr": "-1"}
    assert parse_overrides(["--warm-start", ""]) == {"warm_start": ""}
    assert parse_overrides(["--warm-start="]) == {"warm_start": ""}
    assert parse_overrides(["--output-dir=--x=y"]) == {"output_dir": "--x=y"}
    bare = parse_overrides(["--update.pack", "--task.args.help-shown"])
    assert bare == {"update.pack": "true", "task.args.help_shown": "true"}


def test_only_a_truth_value_stands_bare() -> None:
    bare = {
        *("model.gradient_checkpointing", "model.liger", "model.compile", "optim.offload", "warm_start.optim.offload"),
        *("deterministic", "loss.entropy", "update.skip_zero_advantage", "update.pack"),
        *("update.response_positions", "budget.filter", "budget.controller", "tensorboard", "wandb"),
    }
    for key in keys(RunConfig):
        option = f"--{key.replace('_', '-')}"
        for args in ([option], [option, "--seed", "3"], ["--seed=3", option, "--task.args.x"]):
            if key in bare:
                assert parse_overrides(args)[key] == "true"
            else:
                with pytest.raises(ConfigError, match=rf"^{option}: needs a value.*{option} "):
                    parse_overrides(args)
    with pytest.raises(ConfigError, match=r"^optim\.lrr: unknown key; did you mean optim\.lr\?$"):
        parse_overrides(["--optim.lrr"])


@pytest.mark.parametrize("option", ["--optim.lr", "--steps", "--output-dir", "--oracle.model", "--optim", "--wandb"])
def test_an_empty_value_is_none_where_the_key_cannot_be(option: str) -> None:
    for args in ([f"{option}="], [option, ""]):
        with pytest.raises(ConfigError, match=f"^{option}: needs a value"):
            parse_overrides(args)


@pytest.mark.parametrize("word", ["-x", "--", "--=3", "-1"])
def test_a_word_that_is_no_option(word: str) -> None:
    with pytest.raises(ConfigError, match=r"expected an option like --optim\.lr 1e-4"):
        parse_overrides([word])


@pytest.mark.parametrize("text", ["-1", "-1e-4", "-.5"])
def test_a_negative_number_is_a_value(text: str) -> None:
    overrides = parse_overrides(["--optim.lr", text, "--seed", "3"])
    assert overrides == {"optim.lr": text, "seed": "3"}
    with pytest.raises(ConfigError, match=f"optim.lr='{text}': .*greater than 0"):
        load_config("quickstart", overrides)


def test_the_last_of_two_counts() -> None:
    assert parse_overrides(["--seed", "1", "--wandb", "--seed=2"]) == {"wandb": "true", "seed": "2"}
    again = ["--warm-start.steps", "5", "--warm-start", "", "--warm-start.steps", "7"]
    config = load_config("quickstart", parse_overrides(again))
    assert config.warm_start is not None
    assert config.warm_start.steps == 7


def test_a_value_that_cannot_be_kept_is_refused(tmp_path: Path) -> None:
    """An alias may put a value into itself; others are used as they should be."""
    file = tmp_path / "mine.yaml"
    for args in ("&a {x: *a}", "{x: &a [*a]}", "{x: !!binary /w==}"):
        file.write_text(f"task: {{name: countdown, args: {args}}}")
        with pytest.raises(ConfigError, match=f"^config '{file}' holds a value that cannot be kept: "):
            load_config(str(file))
    file.write_text("task: countdown\nwarm_start: {optim: &o {lr: 1e-3}}\noptim: {<<: *o, warmup_steps: 1}")
    assert load_config(str(file)).optim.lr == 1e-3


def test_show_holds_every_key() -> None:
    """`gapg config show` is the reference."""
    shown = yaml.safe_load(dump_config(load_config("quickstart")))
    assert set(shown) == set(RunConfig.model_fields)
    assert set(shown["rollout"]) >= {"engine", "max_rows", "temperature", "vllm_args"}


def test_a_cloud_has_a_name_where_it_is_asked() -> None:
    """`method: marginal` asks none while it trains, so none need be named; the oracle itself refuses later."""
    unnamed = {"task.name": "maths", "oracle.kind": "openai"}
    config = load_config("quickstart", {**unnamed, "method": "marginal"})
    with pytest.raises(ValueError, match=r"oracle.model is empty"):
        check_cloud(config.oracle)
    for more in ({}, {"method": "marginal", "marginal.score": "brier", "marginal.cloud": "cached"}):
        with pytest.raises(ConfigError, match=r"oracle.model is empty: name the cloud model"):
            load_config("quickstart", {**unnamed, **more})
