"""Toy studies made: killed halfway, they go on; what two of them share is made once; failures show."""

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from gapg.config import RunConfig
from gapg.errors import ConfigError
from gapg.jsonl import read_jsonl
from studies.arms import Arm, marginal, predictions_path
from studies.catalog import STUDIES
from studies.report import Study
from studies.runner import make_studies
from studies.runs import SAVED_MINUTES, Place, place
from study import Options, main

HERE = Path(__file__).parent
BENCH = Path(__file__).parents[3] / "bench"
STANDARD = {"heldout-sampled", "heldout-masked", "train-masked"}
OLD = "0" * 40


@dataclass
class Story:
    """All toy studies, killed with two processes busy, then run again to their end."""

    folder: Path
    kept: dict[Path, int]
    """Files of what was finished at the kill, and when each was last written."""
    whole: bool
    """Whether everything was written in the end."""
    said: str

    def record(self, study: str) -> dict[str, Any]:
        return dict(json.loads((self.folder / "results" / f"{study}.json").read_text()))

    def run(self, study: str, label: str, seed: int = 0) -> Path:
        found = [r for r in self.record(study)["runs"] if (r["label"], r["seed"]) == (label, seed)]
        return self.folder / "work" / "runs" / found[0]["run"]


def finished(folder: Path, kind: str = "*") -> list[Path]:
    """The finished warm starts and runs (of a run whose predictions fail: what is finished of it)."""
    done = list(folder.glob(f"work/{kind}/*/done.json"))
    runs = [path.parent for path in done if json.loads(path.read_text())["products"].keys() >= STANDARD]
    return runs + [path.parents[1] for path in folder.glob(f"work/{kind}/*/checkpoints/step-60")]


def known(run: Path) -> list[Path]:
    """Predictions on record with nothing unknown. What was written but not yet recorded at a kill is made anew."""
    if not (run / "done.json").exists():
        return []
    unknown = json.loads((run / "done.json").read_text())["products"]
    return [predictions_path(run, name) for name, rows in unknown.items() if rows == 0]


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """The toy studies, known to the processes that are started, and their folder to all."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(HERE))
        patch.setenv("PYTHONPATH", os.pathsep.join([str(BENCH), os.environ.get("PYTHONPATH", "")]))
        patch.setenv("TOY_FOLDER", str(tmp_path_factory.mktemp("studies")))
        yield importlib.import_module("toy")


@pytest.fixture(scope="module")
def story(tiny: str, toy: ModuleType) -> Story:
    folder = Path(os.environ["TOY_FOLDER"])
    command = [sys.executable, str(HERE / "toy.py"), tiny, str(folder)]
    first = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not ((folder / "waiting").exists() and len(finished(folder, "runs")) >= 1):
        assert first.poll() is None, first.communicate()[1]
        time.sleep(0.05)
    first.kill()  # and its processes end with it
    first.communicate()
    files = [f for d in finished(folder) for f in (*known(d), *d.glob("checkpoints/*/model/*"))]
    kept = {f: f.stat().st_mtime_ns for f in files}
    assert not list((folder / "results").iterdir())
    (folder / "gate").touch()
    with redirect_stderr(StringIO()) as said:
        whole = toy.make(tiny, folder)
    return Story(folder, kept, whole, said.getvalue())


def test_what_was_finished_is_kept(story: Story) -> None:
    assert any("warm" in str(path) for path in story.kept) and any("products" in str(path) for path in story.kept)
    assert {path: path.stat().st_mtime_ns for path in story.kept} == story.kept


def test_a_killed_run_goes_on_from_its_checkpoint(story: Story) -> None:
    run = story.run("second", "gated")
    assert "resuming from step 2" in (run / "log.txt").read_text()
    assert [row["step"] for row in read_jsonl(run / "metrics.jsonl")] == [1, 2, 3]
    state = json.loads((run / "checkpoints" / "step-3" / "state.json").read_text())
    assert state["controller"] == {"alpha_c": 0.4, "seen": 3}, "the arm's own controller, and its state"


def test_shared_runs_and_warm_starts_are_made_once(story: Story) -> None:
    assert len(list((story.folder / "work" / "runs").iterdir())) == 5
    assert len(list((story.folder / "work" / "warm").iterdir())) == 2
    shared = story.run("first", "plain")
    assert shared == story.run("second", "same as plain")
    assert story.run("second", "gated") != shared, "another controller is another run"
    logs = [path.read_text() for path in story.folder.glob("work/runs/*/log.txt")]
    assert sum("warm start 60/60" in log for log in logs) == 2


def test_a_failing_arm_is_said_and_the_others_go_on(story: Story) -> None:
    assert not story.whole
    run = story.run("first", "plain").name
    assert f"same as plain, seed 0 ({run}): RuntimeError: these predictions are broken (log: " in story.said
    assert "broken: not written, 1 of its 1 runs failed" in story.said
    assert not list((story.folder / "results").glob("broken*"))


def test_results(story: Story) -> None:
    record = story.record("first")
    assert (record["seeds"], record["own_seeds"]) == ([0, 1], [0, 1])
    made = [(row["method"], row["seed"]) for row in record["rows"]]
    assert made == [("plain", 0), ("tuned", 0), ("plain", 1), ("tuned", 1)]
    assert all(row["steps"] == [1, 2, 3] and row["n"] == 24 and row["train"] == 75 for row in record["rows"])
    assert {"question", "config", "revision", "machine", "versions", "comparisons"} <= record.keys()
    results = story.folder / "results"
    page = (results / "README.md").read_text()
    for name in ("first", "second"):
        assert (results / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        own = (results / f"{name}.md").read_text()
        assert own.partition("\n\n")[2] in page, "one text, drawn twice"
        for part in ("| method | local |", f"![]({name}.png)", f"`python bench/study.py {name} --config "):
            assert part in own, part
    assert not [path for path in story.folder.rglob("*partial*")], "nothing half"


def test_help_is_sampled_as_in_training(story: Story) -> None:
    """Token by token: a control would record margins, and force the rest of a phrase that is begun."""
    run = story.run("first", "plain")
    assert {row["help_margin"] for row in read_jsonl(predictions_path(run, "heldout-sampled"))} == {None}
    assert any(row["help_margin"] is not None for row in read_jsonl(predictions_path(run, "heldout-masked")))


def test_a_study_that_refuses_its_runs_leaves_the_others_theirs(
    story: Story, tiny: str, toy: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(_: object) -> Any:
        raise ConfigError("these runs are no good")

    second = toy.STUDIES["second"]
    studies = {"refused": replace(second, name="refused", measure=refuse), "second": second}
    options = Options(config=tiny, work_dir=story.folder / "work", output=tmp_path)
    assert not make_studies(list(studies), studies, options, {})
    assert "refused: not written: these runs are no good" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", "second.json", "second.md", "second.png"}


def test_nothing_large_is_left_of_a_finished_run(story: Story) -> None:
    for folder in finished(story.folder):
        (last,) = (folder / "checkpoints").glob("step-*")
        assert (last / "optimizer.safetensors").stat().st_size < 100
        assert (last / "model" / "model.safetensors").stat().st_size > 10_000


def test_what_is_missing_is_made_from_the_finished_models(
    story: Story, tiny: str, toy: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Predictions that failed, and some for which the cloud did; with fewer seeds than the study's own, as it says."""
    plain, tuned = story.run("first", "plain"), story.run("first", "tuned")
    model = plain / "checkpoints" / "step-3" / "model" / "model.safetensors"
    before = model.read_bytes(), (plain / "metrics.jsonl").read_bytes()
    assert {row["oracle_score"] for row in read_jsonl(predictions_path(tuned, "asked"))} == {None}
    older = json.loads((plain / "done.json").read_text())
    assert older.pop("product_revisions").keys() == STANDARD
    # as written before predictions had revisions of their own and plain names, by other code
    older |= {"revision": OLD, "products": {f"gapg.studies.x:{name}": 0 for name in older["products"]}}
    (plain / "done.json").write_text(json.dumps(older))
    (story.folder / "mended").touch()
    assert toy.make(tiny, tmp_path, seeds=(0,), work_dir=story.folder / "work")
    assert (model.read_bytes(), (plain / "metrics.jsonl").read_bytes()) == before
    assert len(read_jsonl(predictions_path(plain, "fragile"))) == 12
    assert {row["oracle_score"] for row in read_jsonl(predictions_path(tuned, "asked"))} == {1.0}
    done = json.loads((plain / "done.json").read_text())
    assert done["revision"] == OLD and done["product_revisions"].keys() == {"fragile"}
    broken = json.loads((tmp_path / "results" / "broken.json").read_text())
    now = done["product_revisions"]["fragile"]
    assert broken["runs"][0]["measured"] == sorted([OLD, now])
    both = ", ".join(sorted([OLD[:12], now[:12] + now[40:]]))
    page = (tmp_path / "results" / "README.md").read_text()
    assert f"trained at {OLD[:12]}, measured at {both}" in page
    assert "3 runs, 1 of them there" in capsys.readouterr().err
    assert "seeds 0 (of the study's own 0, 1)" in page and "bench/study.py first --seeds 0 " in page


# ---- what the command line refuses, and what a run is called


def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path, *argv: str) -> str:
    """The one line that the command is refused with, at once."""
    with pytest.raises(SystemExit) as left:
        main([*argv, f"--work-dir={tmp_path}/work", f"--output={tmp_path}/results"])
    assert left.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert not list(tmp_path.iterdir()), "nothing is left behind"
    return line


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["third"], ["'third'", "baselines", "all"]),
        ([], ["usage", "NAME"]),
        (["kl", "--jobs", "0"], ["jobs=", "greater than or equal to 1"]),
        *((["kl", "--seeds", text], [f"seeds={text}", "0,1,2"]) for text in ("0,", "0,x", "-1", "0,0", "1.5")),
        (["kl", "--config", "quickstrat"], ["quickstrat", "presets"]),
        (["kl", "--seed", "3"], ["seed", "--seeds"]),
        (["kl", "--output-dir", "x"], ["output_dir", "--work-dir"]),
        (["kl", "--eval.heldout", "0"], ["eval.heldout=0", "raise it"]),
        (["kl", "--optim.lrr", "1"], ["optim.lrr", "optim.lr?"]),
        (["kl", "--task.args.numbrs", "1"], ["numbrs"]),
        (["kl", "--token-cap", "20"], ["token_cap"]),
        (["quickstart", "--eval.heldout", "0"], ["--output: quickstart is one run"]),
        (["budgets", "--budget.cloud_fraction", "0.2"], ["budgets", "--budget.cloud_fraction"]),
        (["budgets", "--budget", "{cloud_fraction: 0.2}"], ["budgets", "--budget:", "(budget.cloud_fraction)"]),
        (["collapse", "--reward.alpha_c", "0.3"], ["collapse", "--reward.alpha_c"]),
        (["oracle", "--oracle.samples", "4"], ["oracle", "--oracle.samples"]),
        (["wrong-rho", "--budget.filter", "false"], ["wrong-rho", "--budget.filter"]),
        (["filter-controller", "--budget.rho", "1"], ["filter-controller", "--budget.rho"]),
        (["demonstrations", "--task.args.help_shown", "false"], ["demonstrations", "--task.args.help_shown"]),
        (["all", "--loss.kl_coef", "0.1"], ["study kl ", "--loss.kl_coef"]),
        (["oracle", "--oracle.kind", "openai", "--oracle.model", "x"], ["oracle", "--oracle.kind solver"]),
        (["shift", "--task.name", "maths"], ["shift", "task.name=countdown"]),
        (["demonstrations", "--task.name", "maths"], ["demonstrations", "task.name=countdown"]),
    ],
)
def test_what_the_user_can_mend_is_one_line_at_once(
    argv: list[str], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(capsys, tmp_path, *argv)
    assert all(word in line for word in words), line


@pytest.mark.parametrize("option", ["work_dir", "output"])
def test_a_folder_that_cannot_be_written_to(option: str, tiny: str, toy: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"/dev/null/x: .*--{option.replace('_', '-')}"):
        toy.make(tiny, tmp_path, **{option: Path("/dev/null/x")})


def only(arms: list[Arm], **more: Any) -> dict[str, Study]:
    fail: Any = lambda *_: pytest.fail()  # noqa: E731
    return {"first": Study("first", "?", (0,), lambda _: arms, fail, fail, fail, **more)}


def test_steps_are_the_commands_though_a_warm_start_takes_none(tiny: str, tmp_path: Path) -> None:
    studies = only([Arm("warm start", {"steps": "0"}, 0), Arm("plain", {}, 0)])
    with pytest.raises(ConfigError, match="--output"):
        make_studies(["first"], studies, Options(config=tiny, work_dir=tmp_path, output="/dev/null/x"), {"steps": "4"})


@pytest.mark.parametrize("last", [{"token_cap": "20"}, {"task.args.numbrs": "1"}, {"rollout.max_prompt_tokens": "1"}])
def test_every_config_is_checked(last: dict[str, str], tiny: str, tmp_path: Path) -> None:
    """Also that of the last arm, and by the study's own check."""
    arms = [Arm("plain", {}, 0), Arm("other", {"reward.alpha_c": "0.3"}, 0), Arm("bad", last, 0)]
    options = Options(config=tiny, work_dir=tmp_path, output=tmp_path)
    with pytest.raises(ConfigError, match=next(iter(last)).rpartition(".")[2]):
        make_studies(["first"], only(arms), options, {})

    def check(config: RunConfig) -> None:
        if config.reward.alpha_c == 0.3:
            raise ConfigError("0.3 is no good")

    with pytest.raises(ConfigError, match=r"0\.3 is no good"):
        make_studies(["first"], only(arms[:2], check=check), options, {})
    assert not list(tmp_path.iterdir())


def test_only_what_a_run_is_names_it(tiny: str, tmp_path: Path) -> None:
    def at(overrides: dict[str, str], command: dict[str, str] | None = None, seed: int = 0) -> tuple[Path, Path | None]:
        p = place(Arm("x", overrides, seed), tiny, command or {}, tmp_path)
        return p.folder, p.warm

    run, warm = at({})
    for same in ({"threads": "4"}, {"checkpoint_every": "7"}, {"oracle.concurrency": "3"}, {"rollout.max_rows": "64"}):
        assert at({}, same) == (run, warm)
    often = {"checkpoint_minutes": "1"}
    assert at({}, often) == (run, warm) and place(Arm("x", {}, 0), tiny, often, tmp_path).config.checkpoint_minutes == 1
    assert place(Arm("x", {}, 0), tiny, {}, tmp_path).config.checkpoint_minutes == SAVED_MINUTES
    for other in ({"steps": "4"}, {"reward.alpha_c": "0.3"}, {"oracle.accuracy": "0.6"}, {"eval.heldout": "9"}):
        assert at(other)[0] != run and at(other)[1] == warm, "another run from the same warm start"
        assert at({}, other) == at(other), "whoever says it"
    for other in ({"warm_start.steps": "61"}, {"task.args.max_number": "5"}, {"eval.problems": "11"}):
        assert at(other)[0] != run and at(other)[1] not in (None, warm)
    assert at({}, seed=1)[0] != run and at({}, seed=1)[1] != warm
    assert at({"warm_start": ""})[1] is None
    assert at({"reward.alpha_c": "0.3"}, {"reward.alpha_c": "0.2"}) == at({"reward.alpha_c": "0.3"}), "the arm's"


def test_a_run_keeps_its_name_when_a_module_moves(tmp_path: Path) -> None:
    """As runs of seed 20 were called when studies lay in gapg.studies."""

    def named(arm: Arm) -> Place:
        return place(arm, "quickstart", {}, tmp_path)

    found = {arm.label: named(arm).folder.name for arm in STUDIES["baselines"].arms(20)}
    assert found["DA-GRPO"] == "32837265f49bfc2b" and found["GAPG"] == "8a9b247864a91293"
    # and as they were called with the marginal method's first defaults: other ones make another run
    assert named(marginal(20)).folder.name == "6c085e032fd5e0a1"
    warm = named(STUDIES["kl"].arms(20)[0]).warm
    assert warm is not None and warm.name == "5ed96d79d6dc2be5"


def test_list_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    main(["list"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(STUDIES)
    assert all(line.endswith(study.question) for line, study in zip(lines, STUDIES.values(), strict=True))
    main(["--help"])
    said = capsys.readouterr().out
    assert all(f"--{name.replace('_', '-')}" in said for name in Options.model_fields)
