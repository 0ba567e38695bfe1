"""What a run needs of a model is known at its start: positions, windows, the route of its updates; and a whole run."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    GPT2Config,
    Lfm2Config,
    MistralConfig,
    OPTConfig,
    PreTrainedTokenizerBase,
)

from gapg.build import check_run, fitting_prompts, make_task, render
from gapg.commands.cli import main
from gapg.config import RunConfig
from gapg.config_sections import ModelConfig
from gapg.errors import ConfigError
from gapg.jsonl import read_jsonl
from gapg.model.load import load_model, load_tokenizer
from gapg.model.route import choose_route
from gapg.tasks.countdown import Countdown

Folder = Callable[..., Path]


def test_learned_positions_end(folder: Folder, tokenizer: PreTrainedTokenizerBase) -> None:
    path = folder(GPT2Config, max_position_embeddings=40)
    model = load_model(ModelConfig(path=str(path)), tokenizer, seed=0)
    assert choose_route(model, longest=40)
    with pytest.raises(ConfigError, match=r"= 41 tokens, and this gpt2 model has positions for 40: lower one"):
        choose_route(model, longest=41)


def test_opts_positions_end_too(folder: Folder, tokenizer: PreTrainedTokenizerBase) -> None:
    """Its table is a module of another name, with two rows more."""
    path = folder(OPTConfig, max_position_embeddings=24, ffn_dim=64, word_embed_proj_dim=32)
    model = load_model(ModelConfig(path=str(path)), tokenizer, seed=0)
    assert choose_route(model, longest=24)
    with pytest.raises(ConfigError, match="this opt model has positions for 24"):
        choose_route(model, longest=48)


@pytest.mark.usefixtures("nothing_said")
def test_rotary_positions_go_on(
    folder: Folder, tokenizer: PreTrainedTokenizerBase, capsys: pytest.CaptureFixture[str]
) -> None:
    model = load_model(ModelConfig(path=str(folder(max_position_embeddings=48))), tokenizer, seed=0)
    assert choose_route(model, longest=49)
    assert "= 49 tokens, and this llama model was made for 48" in capsys.readouterr().err


@pytest.mark.parametrize("longest", [16, 17, 64])
def test_a_window_shorter_than_the_longest_sequence_packs(
    folder: Folder, tokenizer: PreTrainedTokenizerBase, longest: int
) -> None:
    """As the model's own attention cuts it; sequences beyond the window are tried."""
    path = folder(MistralConfig, sliding_window=16)
    assert choose_route(load_model(ModelConfig(path=str(path)), tokenizer, seed=0), True, longest)


@pytest.mark.parametrize("pack", ["auto", False])
@pytest.mark.usefixtures("nothing_said")
def test_it_says_once_why_it_pads(
    folder: Folder, tokenizer: PreTrainedTokenizerBase, capsys: pytest.CaptureFixture[str], pack: Any
) -> None:
    model = load_model(
        ModelConfig(path=str(folder(Lfm2Config, layer_types=["conv", "full_attention"]))), tokenizer, seed=0
    )
    assert choose_route(model, pack) is False
    assert choose_route(model, pack) is False
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "pad their sequences" in line]
    assert ("layers carry state along a row" if pack else "update.pack=false") in said


def test_vllms_own_limit_is_known_before_it_starts(
    folder: Folder, small_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    settings = {"model__path": str(folder()), "rollout__engine": "vllm"}
    config = small_config(tmp_path, **settings, rollout__max_prompt_tokens="24", rollout__max_new_tokens="41")
    task = make_task(config)
    with pytest.raises(ConfigError, match=r"= 65 tokens, and vLLM takes no more than the model's 64 positions"):
        check_run(config, task, load_tokenizer(config.model, task))
    config = small_config(tmp_path, **settings, rollout__vllm_args="{max_model_len: 20}")
    with pytest.raises(ConfigError, match=r"max_model_len=20 is below .* leave it out"):
        check_run(config, task, load_tokenizer(config.model, task))


@pytest.mark.parametrize("error", [KeyError("x"), RuntimeError("a\nb"), AttributeError("no such thing"), TypeError()])
def test_a_task_that_cannot_render_is_one_line(
    countdown: Countdown, tokenizer: PreTrainedTokenizerBase, small_config: Callable[..., RunConfig], tmp_path: Path,
    error: Exception, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def render(*_: object) -> list[int]:
        raise error

    monkeypatch.setattr(countdown, "render", render, raising=True)
    with pytest.raises(ConfigError, match=f"cannot be rendered: {type(error).__name__}") as refusal:
        fitting_prompts(small_config(tmp_path), countdown, tokenizer, "train")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "ids", [[], None, "abc", [1.5], [-1], [[1, 2]], {"input_ids": [1]}, torch.tensor([1]), [torch.tensor(1)]]
)
def test_a_task_that_renders_something_else_is_one_line(
    countdown: Countdown, tokenizer: PreTrainedTokenizerBase, ids: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(countdown, "render", lambda *_: ids)
    with pytest.raises(ConfigError, match=r"render\(\) of prompt .* returned .*, not a list of one token id or more"):
        render(countdown, countdown.prompts("train")[0], tokenizer)


# --- a whole run -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("nothing_said")
def test_a_whole_run_of_a_hybrid(folder: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """LFM2: warm start, three steps on padded rows, a resume with the same bits, an evaluation."""
    options = [
        *("--model.path", str(folder(Lfm2Config, layer_types=["conv", "full_attention"]))),
        *(
            "--task.args",
            "{max_number: 4, max_target: 12}",
            "--warm-start.steps",
            "150",
            "--warm-start.batch-size",
            "16",
        ),
        *("--rollout.prompts-per-step", "6", "--rollout.samples-per-prompt", "4", "--budget.filter", "false"),
        *("--rollout.max-prompt-tokens", "24", "--rollout.max-new-tokens", "30", "--eval.every", "0"),
        *("--steps", "3", "--checkpoint-every", "1", "--keep-checkpoints", "3", "--eval.problems", "4"),
        *("--eval.heldout", "4", "--tensorboard", "false", "--threads", "1"),
    ]
    run, again = tmp_path / "run", tmp_path / "again"
    main(["train", "quickstart", *options, "--output-dir", str(run)])
    rows = read_jsonl(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert row["grad_norm"] > 0 and row["groups/with_gradient"] and row["logprob_gap"] < 1e-4
        assert row["tokens/saved_padding"] == row["sharing/on"] == 0 and row["tokens/computed"] > 0
    shutil.copytree(run, again, symlinks=True)
    for step in (2, 3):
        shutil.rmtree(again / f"checkpoints/step-{step}")
    main(["train", "quickstart", *options, "--output-dir", str(again), "--resume"])
    name = "checkpoints/step-3/model/model.safetensors"
    want, got = load_file(run / name), load_file(again / name)
    assert want.keys() == got.keys() and all(torch.equal(want[key], got[key]) for key in want)
    main(["eval", str(again)])
    summary = json.loads((again / "eval/step-3/summary.json").read_text())
    assert [row["n"] for row in summary["rows"]] == [4, 4]
    assert capsys.readouterr().err.count("updates pad their sequences") == 1
