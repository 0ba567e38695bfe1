"""RLCR: a confidence in the demonstrations, its Brier reward, and its expectation under a real policy."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gapg.build import make_task
from gapg.config import RunConfig, load_config
from gapg.errors import ConfigError
from gapg.jsonl import read_jsonl
from gapg.judge import Group, Outcome, parse
from gapg.model.load import load_tokenizer
from gapg.reward import try_reward
from gapg.runs.run import Run, build_run
from gapg.tasks.base import HELP_PHRASE, Prompt, Verdict
from gapg.tasks.countdown import Countdown
from gapg.train import train
from gapg.warm_start import warm_start
from gapg_rollout.records import Completion
from studies import predictions, rlcr
from studies.rlcr import CountdownWithConfidence, confidence, expected_confidence, rewards

LC, LW = Outcome.LOCAL_CORRECT, Outcome.LOCAL_WRONG
SMALL: dict[str, Any] = {"max_number": 6, "max_target": 20}


def group(*responses: tuple[str, Outcome]) -> Group:
    completions = tuple(Completion((1,), (-1.0,), text, "stop") for text, _ in responses)
    outcomes = tuple(outcome for _, outcome in responses)
    return Group(Prompt("p", "", "", ""), completions, outcomes, (True,) * len(outcomes))


def test_the_reward_is_right_less_the_brier_score() -> None:
    sure, unsure = "8 * 3 = 24 : 90 <answer> 8 * 3 </answer>", "8 + 3 = 11 : 20 <answer> 8 + 3 </answer>"
    given = group((sure, LC), (sure, LW), (unsure, LC), (unsure, LW))
    assert rewards(given, 1.0, 0.0) == pytest.approx([1 - 0.1**2, -(0.9**2), 1 - 0.8**2, -(0.2**2)])
    assert rewards(given, 2.0, 0.0, alpha_f=0.5)[0] == pytest.approx(2.5 - 2 * 0.1**2)


def test_a_missing_confidence_is_never_better_than_one() -> None:
    silent, over = "8 * 3 = 24 <answer> 8 * 3 </answer>", "8 * 3 = 24 : 101 <answer> 8 * 3 </answer>"
    assert rewards(group((silent, LC), (silent, LW), (over, LC)), 1.0, 0.0) == [0.0, -1.0, 0.0]


@given(q=st.integers(1, 100), chance=st.integers(0, 100))
def test_the_best_confidence_is_the_chance_of_being_right(q: int, chance: int) -> None:
    def expected(percent: int) -> float:
        text = f": {percent} <answer> 1 </answer>"
        right, wrong = rewards(group((text, LC), (text, LW)), 1.0, 0.0)
        return chance / 100 * right + (1 - chance / 100) * wrong

    assert expected(max(chance, 1)) >= expected(q) - 1e-12


def test_demonstrations_are_countdowns_with_a_confidence() -> None:
    task, plain = CountdownWithConfidence(**SMALL), Countdown(**SMALL, help_shown=False)
    assert task.prompts("heldout") == plain.prompts("heldout") and task.prompts("train") == plain.prompts("train")
    shown: dict[Verdict, list[float]] = {Verdict.CORRECT: [], Verdict.WRONG: []}
    for demo, bare in zip(task.demonstrations(3), plain.demonstrations(3), strict=True):
        q, answer = confidence(demo.response), parse(demo.response).answer
        assert q is not None and answer is not None
        assert demo.response.replace(f" : {q * 100:.0f} <answer>", " <answer>") == bare.response
        shown[task.verify(demo.prompt, [answer])[0]].append(q)
    mean = {verdict: sum(found) / len(found) for verdict, found in shown.items()}
    assert mean[Verdict.CORRECT] == pytest.approx(0.8, abs=0.05)
    assert mean[Verdict.WRONG] == pytest.approx(0.3, abs=0.05)
    assert task.demonstrations(3) == task.demonstrations(3) != task.demonstrations(4)
    assert not any(HELP_PHRASE in demo.response for demo in task.demonstrations(3))
    tokenizer = task.tokenizer()
    assert all(tokenizer.unk_token_id not in tokenizer.encode(d.response) for d in task.demonstrations(3))


def test_the_style_that_explains_no_confidence_is_refused() -> None:
    with pytest.raises(ValueError, match="style"):
        CountdownWithConfidence(style="chat")


def test_longer_responses_fit_the_arm() -> None:
    arm = rlcr.rlcr(31)
    config = load_config("quickstart", {**arm.overrides, "seed": "31"})
    task = make_task(config)
    tokenizer = load_tokenizer(config.model, task)
    demonstrations = task.demonstrations(0)  # type: ignore[attr-defined]
    assert max(len(tokenizer.encode(d.response)) for d in demonstrations) <= config.rollout.max_new_tokens
    try_reward(rlcr.rewards, config, task)
    with pytest.raises(ConfigError, match=r"reward\.function"):
        load_config("quickstart", {**arm.overrides, "method": "marginal"})


@pytest.fixture
def trained(small_config: Callable[..., RunConfig], tmp_path: Path) -> Run:
    """Three steps of RLCR from a short warm start of its own."""
    overrides = {key.replace(".", "__"): value for key, value in rlcr.rlcr(0).overrides.items()}
    config = small_config(tmp_path / "run", **overrides, eval__every="0", steps="2")
    task = make_task(config)
    model = warm_start(config, tmp_path / "warm", task, load_tokenizer(config.model, task))
    run = build_run(config, config.output_dir, task, model)
    train(run, lambda run: {})
    return run


def test_the_score_of_a_real_policy_is_its_expected_confidence(trained: Run) -> None:
    rows = rlcr.CONFIDENCE.make(trained)
    splits = {s: [row["id"] for row in rows if row["split"] == s] for s in ("validation", "heldout")}
    assert splits["validation"] == [p.id for p in trained.validation]
    assert splits["heldout"] == [p.id for p in predictions.heldout(trained)]
    answers = {row["id"]: row["response"] for row in read_jsonl(trained.folder / "products" / "heldout-masked.jsonl")}
    by_id = {row["id"]: row["score"] for row in rows}
    prompts = [p for p in predictions.heldout(trained) if confidence(answers[p.id]) is not None][:3]
    assert prompts, "the warm start taught it to write one"
    for prompt in prompts:
        response = answers[prompt.id]
        ids = trained.tokenizer.encode(response[: response.index(":") + 1], add_special_tokens=False)
        given = [*trained.task.render(prompt, trained.tokenizer), *ids]
        with torch.no_grad():
            logits = trained.engine.model(torch.tensor([given])).logits[0, -1].double()  # type: ignore[attr-defined]
        numbers = torch.tensor(trained.tokenizer.convert_tokens_to_ids([str(p) for p in range(1, 101)]))
        q = float(logits[numbers].softmax(0) @ torch.arange(1, 101).double()) / 100
        assert by_id[prompt.id] == pytest.approx(float(torch.logit(torch.tensor(1 - q, dtype=torch.float64))), abs=1e-3)
    found = expected_confidence(
        trained, prompts[:1] * 2, [answers[prompts[0].id], "3 + 4 = 7 <answer> 3 + 4 </answer>"]
    )
    assert found[0] > 0.05 and found[1] == 0.0, "without a confidence it is called first"
