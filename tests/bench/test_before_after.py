"""Models side by side on a suite: every cell is that of the model's own suite.json."""

import json
import sys
from pathlib import Path

import pytest
import yaml

import before_after
from gapg.commands.cli import main as gapg
from tests.evaluation.small_maths import make_config, sums, write


def test_a_line_a_set_and_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(tmp_path)
    gapg(["train", str(tmp_path / "config.yaml")])
    write(tmp_path / "minus.jsonl", *sums(range(12), "-"))
    suite = {"minus": {"path": str(tmp_path / "minus.jsonl"), "answer_pattern": "#### (.+)"}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(suite))
    out, models = tmp_path / "out", [str(tmp_path / "model"), str(config.output_dir)]
    capsys.readouterr()
    argv = ["before_after.py", *models, "--names", "before,after", "--output", str(out)]
    monkeypatch.setattr(sys, "argv", [*argv, "--suite", str(tmp_path / "mine.yaml"), "--eval.heldout", "none"])
    before_after.main()
    lines = capsys.readouterr().out.splitlines()[-4:]
    found = json.loads((out / "before_after.json").read_text())
    assert str(tmp_path) not in json.dumps(found["models"]), "a record tells of no machine's folders"
    for i, name in enumerate(("before", "after")):
        own = json.loads((out / str(i) / "suite.json").read_text())
        assert found["models"][name]["rows"] == own["rows"]
        for k, key in enumerate(("own", "minus")):
            rows = {row["name"]: row["sets"][key] for row in own["rows"]}
            assert f"| {name} | {rows['alone, greedy']['local_accuracy']:.1%} (" in lines[2 * k + i]
            assert f"| {rows['greedy']['accuracy']:.1%} (" in lines[2 * k + i]
    assert [line.split(" | ")[:3] for line in lines[1:3]] == [
        ["| maths, in domain", "20", "after"], ["| minus", "12", "before"],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("models", "said"),
    [
        (["model"], "belongs to no run, whose config tells the task"),
        (["nothing", "model"], "nothing: no such folder; give a run's folder"),
        (["model", "model"], "--names: 2 models need as many different names"),
    ],
)
def test_what_cannot_be_evaluated_is_said_first(
    models: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_config(tmp_path)
    monkeypatch.setattr(sys, "argv", ["before_after.py", *(str(tmp_path / name) for name in models)])
    with pytest.raises(SystemExit) as left:
        before_after.main()
    assert left.value.code == 2 and said in capsys.readouterr().err
