"""The evaluation on held-out problems: what its decision section says, and that sharing responses changes nothing."""

import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from gapg.build import make_engine, make_oracle, make_task
from gapg.config import RunConfig
from gapg.errors import ConfigError
from gapg.evaluation.calibrate import Calibration, MaskedPass, save_calibration
from gapg.evaluation.evaluate import prediction, respond
from gapg.evaluation.heldout import evaluate, masked_greedy
from gapg.evaluation.reliability import auroc, brier, ece
from gapg.help_phrase import help_control
from gapg.jsonl import read_jsonl, to_json
from gapg.judge import Judge
from gapg.model.load import load_model, load_tokenizer
from gapg.tasks.base import STOP
from gapg.tasks.countdown import Countdown
from gapg_rollout.records import Completion, Engine, Sampling


class Counting:
    """An engine, and how many prompts each `generate` had."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.asked = engine, list[int]()

    def generate(
        self, prompts: Sequence[Sequence[int]], n: int, sampling: Sampling
    ) -> Iterator[tuple[int, list[Completion]]]:
        self.asked.append(len(prompts))
        return self.engine.generate(prompts, n, sampling)


@pytest.fixture
def small(warm_model: Path, small_config: Callable[..., RunConfig], tmp_path: Path) -> dict[str, Any]:
    """The arguments of `evaluate`, its model in a folder of the test's own."""
    model = tmp_path / "model"
    shutil.copytree(warm_model, model)
    args = "{max_number: 4, max_target: 12, heldout: 0.8}"
    config = small_config(tmp_path, model__path=str(model), task__args=args, eval__heldout="60")
    task = make_task(config)
    tokenizer = load_tokenizer(config.model, task)
    policy = load_model(config.model, tokenizer, config.seed)
    with torch.no_grad():  # or it would call nowhere, decoded greedily
        policy.get_output_embeddings().weight[help_control(tokenizer).spellings[0].token_id] *= 1.2
    engine = make_engine(config, policy, tokenizer, str(model))
    oracle = make_oracle(config, task, tmp_path)
    return dict(config=config, folder=tmp_path, task=task, tokenizer=tokenizer, engine=engine, oracle=oracle)


def test_responses_are_shared_where_they_are_the_same(small: dict[str, Any], tmp_path: Path) -> None:
    """Greedy with and without a bias: the lines of predictions.jsonl that decoding each by itself gives."""
    task, tokenizer, engine, config = small["task"], small["tokenizer"], small["engine"], small["config"]
    control = help_control(tokenizer)
    entry = Calibration(0.0, 0.5, 0.2, 0.5, "60 problems", 60, (0.4, 0.6), 60, control.spellings)
    save_calibration(tmp_path / "model", entry)
    prompts = task.prompts("heldout")[:60]
    judge = Judge(task, small["oracle"], ask_unsolved=False)
    expected = []
    for name, help in (("greedy", None), (entry.label, replace(control, bias=entry.bias))):
        sampling = Sampling(config.rollout.max_new_tokens, 0.0, STOP, help=help)
        groups = respond(engine, task, tokenizer, judge, prompts, sampling)
        expected += [json.loads(to_json({"decoding": name, **prediction(g, config.reward)})) for g in groups]
    small["engine"] = counting = Counting(engine)
    evaluate(**small, trained=small["config"], model=str(tmp_path / "model"))
    found = [r for r in read_jsonl(tmp_path / "predictions.jsonl") if r["decoding"] in ("greedy", entry.label)]
    assert found == expected
    masked, greedy, sampled, biased = counting.asked
    calls = [
        sum(r["outcome"].startswith("cloud") for r in found if r["decoding"] == d) for d in ("greedy", entry.label)
    ]
    assert (masked, sampled) == (60, 60)
    assert [greedy, biased] == calls and 0 < greedy < biased < 60, "only those that call are decoded again"


def test_the_decision_s_figures_can_be_computed_again(
    small: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate(**small, trained=small["config"], model=str(tmp_path / "model"))
    rows = [r for r in read_jsonl(tmp_path / "predictions.jsonl") if r["decoding"] == "greedy, help masked"]
    found = json.loads((tmp_path / "summary.json").read_text())["decision"]
    score = np.array([math.prod(1 / (1 + math.exp(z)) for z in r["help_log_odds"]) for r in rows])
    margin = np.array([r["help_margin"] for r in rows])
    right = np.array([float(r["outcome"] == "local_correct") for r in rows])
    assert score == pytest.approx([r["answer_chance"] for r in rows]) and 0 < right.sum() < 60
    assert found["n"] == sum(b["n"] for b in found["bins"]) == 60
    assert found["brier"] == pytest.approx(brier(score, right)) and found["ece"] == pytest.approx(ece(score, right))
    assert (found["auroc"], found["margin_auroc"]) == (auroc(score, right), auroc(-margin, right))
    assert found["log_score"] == pytest.approx(np.mean(np.log(np.where(right > 0, score, 1 - score))), rel=1e-4)
    for key in ("right", "brier", "auroc", "margin_auroc"):
        assert found[f"{key}_low"] < found[key] < found[f"{key}_high"]
    assert (tmp_path / "reliability.png").stat().st_size > 1000
    out = capsys.readouterr().out
    assert f"{found['auroc']:.3f}  (" in out and "not trained to be that of a right answer (method=gapg)" in out


def test_no_problems_are_no_evaluation(small: dict[str, Any], tmp_path: Path) -> None:
    """A run that was trained with `--eval.heldout 0` keeps that in its config."""
    config = small["config"]
    for section, key, value, fix in (
        ("eval", "heldout", 0, "--eval.heldout none"),
        ("rollout", "max_prompt_tokens", 1, "raise rollout.max_prompt_tokens"),
    ):
        changed = getattr(config, section).model_copy(update={key: value})
        small["config"] = config.model_copy(update={section: changed})
        with pytest.raises(ConfigError, match=fix):
            evaluate(**small, trained=small["config"], model=str(tmp_path / "model"))
    assert not (tmp_path / "summary.json").exists()


def test_a_tokenizer_that_cannot_tell_the_endings_apart(
    small: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Leaves the section out, in one line, and decodes nothing for it."""
    one_word = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"?": 0}, unk_token="?")), unk_token="?")
    engine = Counting(small["engine"])
    assert masked_greedy(small["config"], Countdown(), one_word, engine, [], False) == (None, [], [])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("nothing is said of how calibrated the decision is: the tokenizer ")
    assert engine.asked == []


def test_a_response_that_calls_all_the_same_never_answers() -> None:
    one = MaskedPass(0.0, np.array([math.inf, -1.0]), np.array([[-3.0], [-1.0]]), np.zeros(2))
    assert one.stays == pytest.approx([0.0, 1 / (1 + math.exp(-1.0))])
    assert replace(one, temperature=1.0).chances(0.0) == pytest.approx(1 - one.stays)
