"""Nothing is trained on that is not, to the byte, what was saved: damaged and foreign checkpoints are passed over."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gapg.commands.target import find_model
from gapg.config_sections import OptimConfig
from gapg.errors import ConfigError
from gapg.jsonl import read_jsonl
from gapg.optim import clip_and_step, make_optimizer
from gapg.runs import checkpoint, manifest
from gapg.runs.run import Run
from gapg.train import train

Saved = tuple[Path, PreTrainedModel, torch.optim.Optimizer]


@pytest.fixture(scope="module")
def saved(
    make_model: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    tmp_path_factory: pytest.TempPathFactory,
) -> Saved:
    """(checkpoints 4 and 6 of a run, the model, its optimizer)."""
    run = tmp_path_factory.mktemp("run")
    (run / "run.json").write_text('{"id": "ours"}')
    model = make_model()
    optimizer = make_optimizer(model, OptimConfig(lr=1e-3))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    clip_and_step(optimizer, 1e-3, 1.0)
    for step in (4, 6):
        checkpoint.save(run / "checkpoints", step, model, tokenizer, optimizer, {"step": step})
    return run / "checkpoints", model, optimizer


@pytest.fixture
def root(saved: Saved, tmp_path: Path) -> Path:
    shutil.copytree(saved[0].parent, tmp_path / "run")
    return tmp_path / "run" / "checkpoints"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "emptied": lambda p: p.write_bytes(b""),
    "cut in half": lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]),
    "longer": lambda p: p.write_bytes(p.read_bytes() + b"\0"),
    "one bit flipped": flip,
    "deleted": Path.unlink,
    "a folder instead": lambda p: (p.unlink(), p.mkdir()),
}


def damaged(root: Path) -> Iterator[tuple[str, str]]:
    """(file, damage) after each kind of damage to each file of step 6, which is whole again afterwards."""
    newest = root / "step-6"
    names = [str(p.relative_to(newest)) for p in sorted(newest.rglob("*")) if p.is_file()]
    assert len(names) >= 7
    for name in names:
        whole = (newest / name).read_bytes()
        for what, damage in DAMAGE.items():
            damage(newest / name)
            yield name, what
            shutil.rmtree(newest / name) if (newest / name).is_dir() else (newest / name).unlink(missing_ok=True)
            (newest / name).write_bytes(whole)


def test_every_damage_to_every_file_falls_back_in_one_line(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = 0
    for name, what in damaged(root):
        assert checkpoint.latest(root) == root / "step-4", (name, what)
        (line,) = capsys.readouterr().err.splitlines()
        assert "passed over step-6: " in line and line.endswith("; taking step-4"), (name, what)
        assert name in line, (name, what, line)
        if (name, what) != (manifest.FILE, "deleted"):  # which leaves a folder like any other
            with pytest.raises(ConfigError, match="step-6: damaged since it was saved: "):
                checkpoint.check(root / "step-6")
        cases += 1
    assert cases >= 40
    assert checkpoint.latest(root) == root / "step-6" and not capsys.readouterr().err


def test_none_that_is_whole_is_an_error(root: Path) -> None:
    shutil.rmtree(root / "step-4")
    for _, _ in damaged(root):
        with pytest.raises(ConfigError) as refused:
            checkpoint.latest(root)
        line = str(refused.value)
        assert "\n" not in line and "no checkpoint is whole and of this run: step-6: " in line and "begin anew" in line


FOREIGN: dict[str, Callable[[Path], object]] = {
    "it is of another run": lambda root: (root.parent / "run.json").write_text('{"id": "other"}'),
    "it has no manifest.json": lambda root: (root / "step-600/manifest.json").unlink(),
    "it is of step 6": lambda root: None,
    "its manifest.json is not as it was written": lambda root: edit(root / "step-600", lambda m: m.update(step=600)),
    "its manifest.json is of no checkpoint": lambda root: manifest.write(
        root / "step-600", {"run": "ours", "step": 600}, []
    ),
    "model/model.safetensors.index.json was put there later": lambda root: (
        reseal(root),
        (root / "step-600/model/model.safetensors.index.json").write_text("{}"),
    ),
    "model/adapter_config.json was put there later": lambda root: (
        reseal(root),
        (root / "step-600/model/adapter_config.json").write_text("{}"),
    ),
}


def edit(path: Path, change: Callable[[dict[str, object]], object]) -> None:
    content = json.loads((path / manifest.FILE).read_text())
    change(content)
    (path / manifest.FILE).write_text(json.dumps(content))


def reseal(root: Path) -> None:
    """As if step 600 had been saved."""
    files = manifest.read(root / "step-600")["files"]
    manifest.write(root / "step-600", {"run": "ours", "step": 600}, files)


@pytest.mark.parametrize("said", FOREIGN)
def test_a_foreign_folder_is_no_checkpoint(root: Path, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(root / "step-6", root / "step-600")
    FOREIGN[said](root)
    if "another run" in said:
        with pytest.raises(ConfigError, match=f"step-600: {said}"):
            checkpoint.latest(root)
        assert checkpoint.steps(root) == []
        return
    assert checkpoint.latest(root) == root / "step-6"
    assert f"passed over step-600: {said}; taking step-6" in capsys.readouterr().err
    assert checkpoint.steps(root) == [4, 6] and checkpoint.newest(root) == root / "step-6"
    checkpoint.prune(root, 1, also=set())
    assert {path.name for path in root.iterdir()} == {"step-6", "step-600"}, "what is not the run's is not deleted"


def test_whatever_transformers_would_load_counts(root: Path) -> None:
    model = root / "step-6/model"
    (model / "additional_chat_templates").mkdir()
    for name in (
        *("model-00002-of-00002.safetensors", "adapter_model.safetensors", "special_tokens_map.json", "vocab.txt"),
        *("merges.txt", "added_tokens.json", "tokenizer.model", "spiece.model", "generation_config_old.json"),
        *("chat_template.json", "additional_chat_templates/tools.jinja", "modeling_llama.py", "pytorch_model.bin"),
    ):
        assert not (model / name).exists(), name
        (model / name).write_text("{}")
        assert checkpoint.latest(root) == root / "step-4", name
        (model / name).unlink()


def test_what_is_put_beside_a_model_for_people_is_no_damage(root: Path) -> None:
    for name in ("README.md", "help_calibration.json", ".DS_Store", "picture.png", "notes.txt", "results.json"):
        (root / "step-6/model" / name).write_text("hello")
    (root / "step-6/notes.json").write_text("{}")
    assert checkpoint.latest(root) == root / "step-6"


def test_a_step_whose_name_is_taken_is_saved(
    saved: Saved, root: Path, tokenizer: PreTrainedTokenizerBase, capsys: pytest.CaptureFixture[str]
) -> None:
    _, model, optimizer = saved
    flip(root / "step-6/model/model.safetensors")
    path = checkpoint.save(root, 6, model, tokenizer, optimizer, {"step": 6})
    assert checkpoint.latest(root) == path == root / "step-6"
    assert "step-6: model/model.safetensors is damaged; moved to set-aside-step-6-" in capsys.readouterr().err
    (aside,) = root.glob("set-aside-step-6-*")
    assert checkpoint.fault(aside, run="ours", step=6) == "model/model.safetensors is damaged", (
        "and nothing is thrown away"
    )


def test_an_optimizer_that_is_forgotten_leaves_a_whole_checkpoint(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the process dies on the way."""
    path, moments = root / "step-6", (root / "step-6/optimizer.safetensors").stat().st_size
    wholes: list[bool] = []
    write = manifest.write

    def watched(*args: object) -> None:
        wholes.append(checkpoint.fault(path, run="ours", step=6) is None)
        write(*args)  # type: ignore[arg-type]
        wholes.append(checkpoint.fault(path, run="ours", step=6) is None)

    monkeypatch.setattr(manifest, "write", watched)
    checkpoint.forget_optimizer(path)
    assert wholes == [True] * 4
    assert (path / "optimizer.safetensors").stat().st_size < 100 < moments
    assert load_file(path / "optimizer.safetensors") == {} and "optimizer.safetensors" in manifest.read(path)["files"]
    assert checkpoint.latest(root) == path


def test_best_is_what_the_state_says(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    best = root / "best"
    checkpoint.mark_best(root, 4)
    checkpoint.mark_best(root, 6)
    assert best.resolve() == root / "step-6"
    best.unlink()
    best.symlink_to("step-99")  # dangling, as a kill may leave it
    checkpoint.mark_best(root, 4)
    assert best.resolve() == root / "step-4"
    checkpoint.mark_best(root, 0)
    assert not best.is_symlink()
    best.mkdir()
    checkpoint.mark_best(root, 4)
    assert best.is_dir() and "stays as it is" in capsys.readouterr().err


def test_a_run_whose_newest_checkpoint_is_damaged_ends_with_the_same_bits(
    start: Callable[..., Run], capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"steps": "3", "checkpoint_every": "1", "eval__every": "1", "rollout__prompts_per_step": "2"}

    def scored(run: Run) -> dict[str, float]:
        score = {1: 0.5, 2: 0.7}.get(run.state.step, 0.1)
        return {"eval/accuracy": score, "eval/local_accuracy": score, "eval/call_fraction": 0.0}

    def bits(run: Run) -> list[bytes]:
        names = ("model/model.safetensors", "optimizer.safetensors", "state.json")
        return [(run.folder / "checkpoints/step-3" / name).read_bytes() for name in names]

    run = start(**settings)
    train(run, scored)
    root, expected = run.folder / "checkpoints", bits(run)
    assert (root / "best").resolve().name == "step-2"
    run.close()
    (root / "best").unlink()
    (root / "best").symlink_to("step-3")  # as if killed before it was pointed elsewhere
    flip(root / "step-3/optimizer.safetensors")
    again = start(**settings)
    assert again.state.step == 2 and (root / "best").resolve().name == "step-2"
    assert "passed over step-3: optimizer.safetensors is damaged; taking step-2" in capsys.readouterr().err
    train(again, scored)
    assert bits(again) == expected and checkpoint.steps(root) == [2, 3]
    assert [row["step"] for row in read_jsonl(run.folder / "metrics.jsonl")] == [0, 1, 2, 3]


def test_keys_of_a_manifest_that_are_no_strings(tmp_path: Path) -> None:
    """As a task's arguments may have them."""
    (tmp_path / "a").write_text("1")
    manifest.write(tmp_path, {"config": {"task": {10: "x", 9: [1.5, None], "b": {}}}}, ["a"])
    assert manifest.read(tmp_path)["config"] == {"task": {"10": "x", "9": [1.5, None], "b": {}}}


def test_eval_takes_a_whole_checkpoint_and_a_plain_folder(root: Path) -> None:
    assert find_model(root.parent)[0] == root / "step-6/model"
    assert find_model(root / "step-4")[0] == root / "step-4/model"
    (root / "step-4/manifest.json").unlink()
    assert find_model(root / "step-4")[0] == root / "step-4/model", "as older versions left it"
    (root / "manifest.json").write_text("somebody else's")
    shutil.copytree(root / "step-4/model", root / "plain")
    assert find_model(root / "plain")[0] == root / "plain"
    flip(root / "step-6/model/model.safetensors")
    with pytest.raises(ConfigError, match=r"step-6: damaged since it was saved: model/model\.safetensors is damaged"):
        find_model(root / "step-6")
