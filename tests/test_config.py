"""Every mistake in a config is one line that names the key and the fix; every preset is right."""

from fractions import Fraction
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from gapg.config import ConfigError, RunConfig, dump_config, load_config, parse_overrides, presets


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
        ("compare", "perhaps", ["compare", "perhaps", "boolean"]),
        ("optim", "5", ["optim"]),
    ],
)
def test_a_mistake_is_one_line_with_key_and_fix(key: str, value: str, words: list[str]) -> None:
    message = error_of("quickstart", **{key: value})
    assert all(word in message for word in words), message


def test_an_unknown_config_lists_the_presets() -> None:
    assert "quickstart" in error_of("quickstrat")


@pytest.mark.parametrize("text", ["a: [1", "- 1\n- 2\n", "just words", "", "steps: 3\n"])
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


@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=12))
def test_no_value_ends_in_a_traceback(value: str) -> None:
    for key in ("optim.lr", "steps", "output_dir", "rollout.engine", "model.llama"):
        try:
            load_config("quickstart", {key: value})
        except ConfigError as error:
            assert "\n" not in str(error)


def test_a_folder_may_be_a_number(tmp_path: Path) -> None:
    assert load_config("quickstart", {"output_dir": "2024"}).output_dir == Path("2024")


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


def test_the_command_line_forms() -> None:
    args = ["--optim.lr", "1e-4", "--seed=3", "--compare", "--output-dir", "runs/x", "--budget.filter"]
    assert parse_overrides(args) == {
        "optim.lr": "1e-4",
        "seed": "3",
        "compare": "true",
        "output_dir": "runs/x",
        "budget.filter": "true",
    }
    assert parse_overrides(["--optim.lr", "-1"]) == {"optim.lr": "-1"}
    assert parse_overrides(["--warm-start", ""]) == {"warm_start": ""}
    with pytest.raises(ConfigError, match=r"'lr'.*--optim\.lr"):
        parse_overrides(["lr", "1"])


def test_show_holds_every_key() -> None:
    """`gapg config show` is the reference."""
    shown = yaml.safe_load(dump_config(load_config("quickstart")))
    assert set(shown) == set(RunConfig.model_fields)
    assert set(shown["rollout"]) >= {"engine", "max_rows", "temperature", "vllm_args"}
