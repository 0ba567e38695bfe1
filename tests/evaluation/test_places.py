"""Results about two models never lie in one place."""

from pathlib import Path

import pytest

from gapg.commands.target import Target, find_model


def test_each_model_has_a_place_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    models = [
        run / "checkpoints/step-40/model",
        run / "checkpoints/step-80/model",
        run / "warm-start/checkpoints/step-40/model",
        run / "task-tuned/checkpoints/step-40/model",
        tmp_path / "a/model",
        tmp_path / "b/model",
        tmp_path / "a/qwen",
        tmp_path / "b/qwen",
        tmp_path / "step-40/model",
    ]
    for model in models:
        model.mkdir(parents=True)
        (model / "config.json").write_text("{}")
    for folder in (run, run / "task-tuned"):
        (folder / "config.yaml").touch()
    (run / "checkpoints/best").symlink_to("step-40")

    def place(target: Path) -> Path:
        return Target(*find_model(target), None, None, None, None).beside("eval")  # type: ignore[arg-type]

    assert [place(model).relative_to(run) for model in models[:4]] == [
        Path("eval/step-40"),
        Path("eval/step-80"),
        Path("eval/warm-start-step-40"),
        Path("task-tuned/eval/step-40"),
    ]
    for best in ("best", "best/model"):
        assert place(run / "checkpoints" / best) == run / "eval" / "best-step-40"
    elsewhere = [place(model) for model in models[4:]]
    assert len(set(elsewhere)) == 5
    assert [p.name[:-9] for p in elsewhere] == ["a", "b", "qwen", "qwen", "step-40"]
    for model in models[:6]:  # however it is named
        found = place(model)
        assert place(model.parent if model.name == "model" else model) == found
        monkeypatch.chdir(model.parent)
        assert place(Path("model")) == found
        monkeypatch.chdir(model)
        assert place(Path()) == found
