"""A resumed run is given no other preset by mistake, and what may change in its file does."""

from pathlib import Path

import pytest
import yaml

from gapg.config import dump_config, load_config
from gapg.errors import ConfigError
from gapg.runs import preset

RUN = {"task": "countdown", "steps": 4, "optim": {"lr": 1e-4}, "reward": {"alpha_c": 0.3}}


def write(path: Path, **changes: object) -> str:
    path.write_text(yaml.safe_dump({**RUN, **changes}))
    return str(path)


@pytest.fixture
def began(tmp_path: Path) -> str:
    """A run with an option of its own, in `tmp_path/run`, that began with `tmp_path/mine.yaml`."""
    name, folder = write(tmp_path / "mine.yaml"), tmp_path / "run"
    folder.mkdir()
    config = preset.resolve(name, {"output_dir": str(folder), "seed": "7"}, resume=False)
    (folder / "config.yaml").write_text(dump_config(config))
    preset.remember(name, folder)
    return name


def resumed(name: str, tmp_path: Path, **overrides: str) -> object:
    return preset.resolve(name, {"output_dir": str(tmp_path / "run"), **overrides}, resume=True)


def test_options_need_not_be_given_again(began: str, tmp_path: Path) -> None:
    assert resumed(began, tmp_path) == load_config(began, {"output_dir": str(tmp_path / "run"), "seed": "7"})


@pytest.mark.parametrize("name", ["quickstart", "countdown-qwen2.5-3b", "gsm8k-smollm2"])
def test_another_preset_is_refused(name: str, began: str, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=rf"{name}: the run in .* began with .*mine.yaml, and has .*; resume with .*/config.yaml, or"
    ):
        resumed(name, tmp_path)


def test_a_copy_and_the_saved_config_itself_are_the_same(began: str, tmp_path: Path) -> None:
    copy = write(tmp_path / "copy.yaml")
    assert resumed(copy, tmp_path) == resumed(began, tmp_path) == resumed(f"{tmp_path}/run/config.yaml", tmp_path)


def test_what_a_resume_may_change_can_be_changed_in_the_file(began: str, tmp_path: Path) -> None:
    write(tmp_path / "mine.yaml", steps=9, optim={"lr": 5e-5})
    config = resumed(began, tmp_path)
    assert (config.steps, config.optim.lr, config.seed) == (9, 5e-5, 7)  # type: ignore[attr-defined]
    assert resumed(began, tmp_path, steps="11").steps == 11  # type: ignore[attr-defined]


def test_what_it_may_not_is_named(began: str, tmp_path: Path) -> None:
    write(tmp_path / "mine.yaml", reward={"alpha_c": 0.4})
    with pytest.raises(ConfigError, match=r"and has reward.alpha_c=0.3; here it is 0.4; resume with"):
        resumed(began, tmp_path)


def test_a_resume_with_the_saved_config_does_not_make_it_the_preset(began: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    expected, copy = resumed(began, tmp_path), tmp_path / "copy.yaml"
    copy.write_text((folder / "config.yaml").read_text())
    for name in (str(folder / "config.yaml"), str(copy)):
        preset.remember(name, folder)
        assert resumed(began, tmp_path) == expected, name
    with pytest.raises(ConfigError, match=r"quickstart: the run in .* began with .*mine.yaml"):
        resumed("quickstart", tmp_path)


def test_the_same_written_otherwise_is_no_change(began: str, tmp_path: Path) -> None:
    other = {"task": {"name": "countdown"}, "optim": {"lr": "0.0001", "warmup_steps": "10"}, "token_cap": 16384}
    assert resumed(write(tmp_path / "mine.yaml", **other), tmp_path).seed == 7  # type: ignore[attr-defined]


def test_a_preset_of_a_run_that_never_began_counts_for_nothing(began: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (folder / "config.yaml").unlink()  # killed just before it was written
    preset.remember("quickstart", folder)
    assert yaml.safe_load((folder / preset.FILE).read_text())["name"] == "quickstart"


@pytest.mark.parametrize("text", ["", "name: x", "[", "\x00", "settings: 3"])
def test_a_damaged_record_is_one_line(text: str, began: str, tmp_path: Path) -> None:
    (tmp_path / "run" / preset.FILE).write_text(text)
    with pytest.raises(ConfigError, match=r"preset.yaml: cannot be read .*delete it"):
        resumed(began, tmp_path)


def test_a_file_that_is_complete_only_with_options(tmp_path: Path) -> None:
    name, folder = str(tmp_path / "open.yaml"), tmp_path / "run"
    Path(name).write_text("{steps: 4, oracle: {kind: openai}}")
    folder.mkdir()
    given = {"output_dir": str(folder), "oracle.model": "m", "task.name": "countdown"}
    config = preset.resolve(name, given, resume=False)
    preset.remember(name, folder)
    (folder / "config.yaml").write_text(dump_config(config))
    assert preset.resolve(name, given, resume=True) == config
    assert preset.resolve(name, {"output_dir": str(folder)}, resume=True) == config, "options need not be given again"
    with pytest.raises(ConfigError, match=r"oracle.model is empty"):
        preset.resolve(name, {"output_dir": str(tmp_path / "other"), "task.name": "countdown"}, resume=True)
    Path(name).write_text("{steps: 9, oracle: {kind: openai}}")
    assert preset.resolve(name, given, resume=True).steps == 9


def test_an_option_of_the_runs_own_method_is_read_beside_it(tmp_path: Path) -> None:
    """A preset of gapg takes no `marginal.weight`; the run that was begun from it by `--method marginal` does."""
    folder = tmp_path / "run"
    folder.mkdir()
    given = {"output_dir": str(folder), "method": "marginal"}
    config = preset.resolve("quickstart", given, resume=False)
    (folder / "config.yaml").write_text(dump_config(config))
    resumed = preset.resolve("quickstart", {"output_dir": str(folder), "marginal.weight": "2"}, resume=True)
    assert (resumed.method, resumed.marginal.weight) == ("marginal", 2)
