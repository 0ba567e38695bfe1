"""`gapg experiment` on toy studies: killed halfway, it goes on; what two studies share is made once; failures show."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from gapg.commands.cli import main
from gapg.config import ConfigError, RunConfig
from gapg.jsonl import read_jsonl
from gapg.studies.catalog import STUDIES
from gapg.studies.experiment import Order, experiment, list_studies, parse_seeds
from gapg.studies.runs import place
from gapg.studies.study import Finished, Report, Study, Unit, product_path

HERE = Path(__file__).parent
STANDARD = {"heldout-sampled", "heldout-masked", "train-masked"}
OLD = "0" * 40


@dataclass
class Story:
    """All toy studies, killed with two workers busy, then run again to their end."""

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
    """The finished warm starts and runs (of a run with a broken product: what is finished of it)."""
    done = list(folder.glob(f"work/{kind}/*/done.json"))
    runs = [path.parent for path in done if json.loads(path.read_text())["products"].keys() >= STANDARD]
    return runs + [path.parents[1] for path in folder.glob(f"work/{kind}/*/checkpoints/step-60")]


def products(run: Path) -> list[Path]:
    """Those on record with nothing unknown. One that was written but not yet recorded at a kill is made anew."""
    if not (run / "done.json").exists():
        return []
    known = json.loads((run / "done.json").read_text())["products"]
    return [product_path(run, name) for name, unknown in known.items() if unknown == 0]


@pytest.fixture(scope="module")
def studies_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the toy studies lie, known to them and to their workers."""
    folder = tmp_path_factory.mktemp("studies")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(HERE))
        patch.setenv("TOY_FOLDER", str(folder))
        yield folder


@pytest.fixture(scope="module")
def toy_studies(studies_folder: Path) -> dict[str, Study]:
    return importlib.import_module("toy").STUDIES


@pytest.fixture(scope="module")
def story(tiny: str, studies_folder: Path, toy_studies: dict[str, Study]) -> Story:
    folder = studies_folder
    command = [sys.executable, str(HERE / "toy.py"), "all", tiny, str(folder), "2"]
    first = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not ((folder / "waiting").exists() and len(finished(folder, "runs")) >= 1):
        assert first.poll() is None, first.communicate()[1]
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    files = [f for d in finished(folder) for f in (*products(d), *d.glob("checkpoints/*/model/*"))]
    kept = {f: f.stat().st_mtime_ns for f in files}
    assert not list((folder / "results").iterdir())
    (folder / "gate").touch()
    with redirect_stderr(StringIO()) as said:
        whole = experiment(Order("all", config=tiny, work=folder / "work", results=folder / "results"), toy_studies)
    return Story(folder, kept, whole, said.getvalue())


def test_what_was_finished_is_kept(story: Story) -> None:
    assert any("warm" in str(path) for path in story.kept) and any("products" in str(path) for path in story.kept)
    assert {path: path.stat().st_mtime_ns for path in story.kept} == story.kept


def test_a_killed_run_goes_on_from_its_checkpoint(story: Story) -> None:
    run = story.run("second", "gated")
    assert "resuming from step 2" in (run / "log.txt").read_text()
    assert [row["step"] for row in read_jsonl(run / "metrics.jsonl")] == [1, 2, 3]
    state = json.loads((run / "checkpoints" / "step-3" / "state.json").read_text())
    assert state["controller"] == {"alpha_c": 0.4, "seen": 3}, "the unit's own controller, and its state"


def test_shared_runs_and_warm_starts_are_made_once(story: Story) -> None:
    assert len(list((story.folder / "work" / "runs").iterdir())) == 5
    assert len(list((story.folder / "work" / "warm").iterdir())) == 2
    shared = story.run("first", "plain")
    assert shared == story.run("second", "same as plain")
    assert story.run("second", "gated") != shared, "another controller is another run"
    logs = [path.read_text() for path in story.folder.glob("work/*/*/log.txt")]
    assert sum("warm start 60/60" in log for log in logs) == 2


def test_a_failing_unit_is_said_and_the_others_go_on(story: Story) -> None:
    assert not story.whole
    assert "same as plain, seed 0: RuntimeError: this product is broken (log: " in story.said
    assert "broken: not written, 1 of its 1 runs failed" in story.said
    assert not list((story.folder / "results").glob("broken*"))


def test_results(story: Story) -> None:
    record = story.record("first")
    assert (record["seeds"], record["own_seeds"]) == ([0, 1], [0, 1])
    assert record["command"].startswith("gapg experiment first --config ")
    made = [(row["method"], row["seed"]) for row in record["rows"]]
    assert made == [("plain", 0), ("tuned", 0), ("plain", 1), ("tuned", 1)]
    assert all(row["steps"] == [1, 2, 3] and row["n"] == 24 and row["train"] == 75 for row in record["rows"])
    assert {"question", "config", "revision", "machine", "versions", "comparisons", "conclusions"} <= record.keys()
    results = story.folder / "results"
    page = (results / "README.md").read_text()
    for name in ("first", "second"):
        assert (results / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        own = (results / f"{name}.md").read_text()
        assert own.partition("\n\n")[2] in page, "one text, drawn twice"
        for part in ("| method | local |", "It ran. It ended.", f"![]({name}.png)", f"`gapg experiment {name} "):
            assert part in own, part
    assert not [path for path in story.folder.rglob("*partial*")], "nothing half"


def test_help_is_sampled_as_in_training(story: Story) -> None:
    """Token by token: a control would record margins, and force the rest of a phrase that is begun."""
    products = story.run("first", "plain") / "products"
    assert {row["help_margin"] for row in read_jsonl(products / "heldout-sampled.jsonl")} == {None}
    assert any(row["help_margin"] is not None for row in read_jsonl(products / "heldout-masked.jsonl"))


def test_a_study_that_refuses_its_runs_leaves_the_others_theirs(
    story: Story, tiny: str, toy_studies: dict[str, Study], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(_: list[Finished]) -> Report:
        raise ConfigError("these runs are no good")

    second = toy_studies["second"]
    studies = {"refused": replace(second, name="refused", analyse=refuse), "second": second}
    order = Order("all", config=tiny, work=story.folder / "work", results=tmp_path)
    assert not experiment(order, studies)
    assert "refused: not written: these runs are no good" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", "second.json", "second.md", "second.png"}


def test_nothing_large_is_left_of_a_finished_run(story: Story) -> None:
    for folder in finished(story.folder):
        (last,) = (folder / "checkpoints").glob("step-*")
        assert (last / "optimizer.safetensors").stat().st_size < 100
        assert (last / "model" / "model.safetensors").stat().st_size > 10_000


def test_what_is_missing_is_made_from_the_finished_models(
    story: Story, tiny: str, toy_studies: dict[str, Study], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A product that failed, and one for which the cloud did; with fewer seeds than the study's own, which it says."""
    plain, tuned = story.run("first", "plain"), story.run("first", "tuned")
    model = plain / "checkpoints" / "step-3" / "model" / "model.safetensors"
    before = model.read_bytes(), (plain / "metrics.jsonl").read_bytes()
    assert {row["oracle_score"] for row in read_jsonl(tuned / "products" / "asked.jsonl")} == {None}
    older = json.loads((plain / "done.json").read_text())
    assert older.pop("product_revisions").keys() == STANDARD
    # as written before products had revisions of their own, by other code
    (plain / "done.json").write_text(json.dumps(older | {"revision": OLD}))
    (story.folder / "mended").touch()
    order = Order("all", (0,), config=tiny, work=story.folder / "work", results=tmp_path / "results")
    assert experiment(order, toy_studies)
    assert (model.read_bytes(), (plain / "metrics.jsonl").read_bytes()) == before
    assert len(read_jsonl(plain / "products" / "fragile.jsonl")) == 12
    assert {row["oracle_score"] for row in read_jsonl(tuned / "products" / "asked.jsonl")} == {1.0}
    done = json.loads((plain / "done.json").read_text())
    assert done["revision"] == OLD and done["product_revisions"].keys() == {"toy:fragile"}
    broken = json.loads((tmp_path / "results" / "broken.json").read_text())
    now = done["product_revisions"]["toy:fragile"]
    assert broken["runs"][0]["measured"] == sorted([OLD, now])
    both = ", ".join(sorted([OLD[:12], now[:12] + now[40:]]))
    assert f"trained at {OLD[:12]}, measured at {both}" in (tmp_path / "results" / "broken.md").read_text()
    assert "3 runs, 1 of them there" in capsys.readouterr().err
    record = json.loads((tmp_path / "results" / "first.json").read_text())
    assert (record["seeds"], record["own_seeds"]) == ([0], [0, 1])
    assert "seeds 0 (of the study's own 0, 1)" in (tmp_path / "results" / "README.md").read_text()
    assert "--seeds 0 " in record["command"]


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"name": "third"}, ["'third'", "first", "second", "list"]),
        ({"jobs": 0}, ["--jobs 0", "1 or more"]),
        ({"config": "quickstrat"}, ["quickstrat", "presets"]),
        ({"overrides": {"seed": "3"}}, ["seed", "--seeds"]),
        ({"overrides": {"output_dir": "x"}}, ["output_dir", "--work-dir"]),
        ({"overrides": {"eval.heldout": "0"}}, ["eval.heldout=0", "raise it"]),
        ({"overrides": {"optim.lrr": "1"}}, ["optim.lrr", "optim.lr?"]),
        ({"overrides": {"task.args.numbrs": "1"}}, ["numbrs"]),
        ({"work": Path("/dev/null/x")}, ["/dev/null/x", "--work-dir"]),
        ({"results": Path("/dev/null/x")}, ["/dev/null/x", "--results-dir"]),
    ],
)
def test_what_the_user_can_mend_is_one_line_at_once(
    asked: dict[str, Any], words: list[str], tiny: str, toy_studies: dict[str, Study], tmp_path: Path
) -> None:
    folders = {"work": tmp_path / "work", "results": tmp_path / "results"}
    with pytest.raises(ConfigError) as refused:
        experiment(Order(**{"name": "first", "config": tiny, **folders, **asked}), toy_studies)
    message = str(refused.value)
    assert all(word in message for word in words) and "\n" not in message, message
    assert not [path for path in tmp_path.rglob("*") if path.is_file()], "nothing is left behind"


@pytest.mark.parametrize(
    ("name", "overrides", "words"),
    [
        ("budgets", {"budget.cloud_fraction": "0.2"}, ["budgets", "--budget.cloud_fraction"]),
        ("budgets", {"budget": "{cloud_fraction: 0.2}"}, ["budgets", "--budget:", "(budget.cloud_fraction)"]),
        ("collapse", {"reward.alpha_c": "0.3"}, ["collapse", "--reward.alpha_c"]),
        ("oracle", {"oracle.samples": "4"}, ["oracle", "--oracle.samples"]),
        ("wrong-rho", {"budget.rho": "1"}, ["wrong-rho", "--budget.rho"]),
        ("wrong-rho", {"budget.filter": "false"}, ["wrong-rho", "--budget.filter"]),
        ("filter-controller", {"budget.controller": "false"}, ["filter-controller", "--budget.controller"]),
        ("filter-controller", {"budget.rho": "1"}, ["filter-controller", "--budget.rho"]),
        ("demonstrations", {"task.args.help_shown": "false"}, ["demonstrations", "--task.args.help_shown"]),
        ("all", {"loss.kl_coef": "0.1"}, ["experiment kl ", "--loss.kl_coef"]),
        ("oracle", {"oracle.kind": "openai", "oracle.model": "x"}, ["oracle", "--oracle.kind solver"]),
        ("shift", {"task.name": "maths"}, ["shift", "task.name=countdown"]),
        ("demonstrations", {"task.name": "maths"}, ["demonstrations", "task.name=countdown"]),
    ],
)
def test_what_a_study_cannot_take_is_refused_at_once(
    name: str, overrides: dict[str, str], words: list[str], tiny: str, tmp_path: Path
) -> None:
    order = Order(name, config=tiny, overrides=overrides, work=tmp_path / "work", results=tmp_path / "results")
    with pytest.raises(ConfigError) as refused:
        experiment(order, STUDIES)
    message = str(refused.value)
    assert all(word in message for word in words) and "\n" not in message, message
    assert not list(tmp_path.iterdir())


def test_steps_are_the_commands_though_a_warm_start_takes_none(tiny: str, tmp_path: Path) -> None:
    order = Order("first", config=tiny, overrides={"steps": "4"}, work=tmp_path, results=Path("/dev/null/x"))
    units = [Unit("warm start", {"steps": "0"}, 0), Unit("plain", {}, 0)]
    with pytest.raises(ConfigError, match="--results-dir"):
        experiment(order, {"first": Study("first", "?", (0,), lambda _: units, lambda _: pytest.fail())})


@pytest.mark.parametrize("last", [{"token_cap": "20"}, {"task.args.numbrs": "1"}, {"rollout.max_prompt_tokens": "1"}])
def test_every_config_is_checked(last: dict[str, str], tiny: str, tmp_path: Path) -> None:
    """Also that of the last unit."""
    units = [Unit("plain", {}, 0), Unit("other", {"reward.alpha_c": "0.3"}, 0), Unit("bad", last, 0)]
    study = Study("first", "?", (0,), lambda _: units, lambda _: pytest.fail())
    with pytest.raises(ConfigError, match=next(iter(last)).rpartition(".")[2]):
        experiment(Order("first", config=tiny, work=tmp_path, results=tmp_path), {"first": study})
    assert not list(tmp_path.iterdir())


def test_a_studys_own_check_sees_every_run(tiny: str, tmp_path: Path) -> None:
    def check(config: RunConfig) -> None:
        if config.reward.alpha_c == 0.3:
            raise ConfigError("0.3 is no good")

    units = [Unit("plain", {}, 0), Unit("other", {"reward.alpha_c": "0.3"}, 0)]
    study = Study("first", "?", (0,), lambda _: units, lambda _: pytest.fail(), check)
    with pytest.raises(ConfigError, match=r"0\.3 is no good"):
        experiment(Order("first", config=tiny, work=tmp_path, results=tmp_path), {"first": study})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["", "0,", "0,x", "-1", "0,0", "1.5"])
def test_seeds_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--seeds .*0,1,2"):
        parse_seeds(text)


def test_seeds() -> None:
    assert (parse_seeds(None), parse_seeds("3, 1"), parse_seeds("7")) == ((), (3, 1), (7,))


def test_only_what_a_run_is_names_it(tiny: str, tmp_path: Path) -> None:
    def at(overrides: dict[str, str], command: dict[str, str] | None = None, seed: int = 0) -> tuple[Path, Path | None]:
        p = place(Unit("x", overrides, seed), tiny, command or {}, tmp_path)
        return p.folder, p.warm

    run, warm = at({})
    for same in ({"threads": "4"}, {"checkpoint_every": "7"}, {"oracle.concurrency": "3"}, {"rollout.max_rows": "64"}):
        assert at({}, same) == (run, warm)
    for other in ({"steps": "4"}, {"reward.alpha_c": "0.3"}, {"oracle.accuracy": "0.6"}, {"eval.heldout": "9"}):
        assert at(other)[0] != run and at(other)[1] == warm, "another run from the same warm start"
        assert at({}, other) == at(other), "whoever says it"
    for other in ({"warm_start.steps": "61"}, {"task.args.max_number": "5"}, {"eval.problems": "11"}):
        assert at(other)[0] != run and at(other)[1] not in (None, warm)
    assert at({}, seed=1)[0] != run and at({}, seed=1)[1] != warm
    assert at({"warm_start": ""})[1] is None
    assert at({"reward.alpha_c": "0.3"}, {"reward.alpha_c": "0.2"}) == at({"reward.alpha_c": "0.3"}), "the unit's"


@pytest.mark.parametrize("unit", [Unit("x", {}, 0, "nowhere:f"), Unit("x", {}, 0, products=("heldout-maskd",))])
def test_a_unit_that_names_what_is_not_there(unit: Unit, tiny: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"x: (controller|product): "):
        place(unit, tiny, {}, tmp_path)


def test_list(toy_studies: dict[str, Study]) -> None:
    assert list_studies(toy_studies).splitlines() == [
        "second  Does it share?", "first   Does it run?", "broken  Does it say so?",
    ]  # fmt: skip


def test_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    main(["experiment", "list"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(STUDIES)
    assert all(line.endswith(study.question) for line, study in zip(lines, STUDIES.values(), strict=True))
    for argv in (["experiment"], ["experiment", "no-such-study"], ["experiment", lines[0].split()[0], "--seeds", "x"]):
        with pytest.raises(SystemExit) as left:
            main(argv)
        assert left.value.code == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
