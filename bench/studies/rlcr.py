"""RLCR (arXiv 2507.16806): a confidence that the model writes before its answer, trained by the Brier score.

A response writes its steps, how sure it is in percent, and the answer: `8 * 3 = 24 ; 24 + 15 = 39 : 70 <answer> …`.
With r = 1 for a right answer and q the confidence its reward is r - (q - r)^2. Nobody calls while it trains; at use the
least sure are called first. The paper's models write the confidence after the answer, in words; here a response ends
with its answer, so the confidence stands before it, and after the steps that the answer repeats.

The warm start is RLCR's own, as long as the others': its demonstrations show no help, and the confidences that they
show are random, higher on average after a right trace than after a wrong one, for the policy gradient to move.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from gapg.batches.batching import Example, packed_batches
from gapg.jsonl import read_jsonl
from gapg.judge import Group, Outcome, parse
from gapg.judge import rewards as hierarchical_rewards
from gapg.model.policy import response_states
from gapg.runs.run import Run
from gapg.seeding import derive
from gapg.tasks.base import ANSWER_OPEN, Demonstration, Prompt, Verdict
from gapg.tasks.countdown import Countdown
from gapg.tasks.vocabulary import word_tokenizer
from studies import arms
from studies.arms import Arm, Entrant, Predictions, Rows
from studies.predictions import STANDARD, heldout, make_predictions

LEVELS = range(10, 101, 10)
"""The confidences of demonstrations, in percent."""
AFTER_RIGHT, AFTER_WRONG = range(60, 101, 10), range(10, 51, 10)
"""Those that they show after a right and after a wrong trace, each as likely as another."""
SURELY = 1e-6
"""How near to 0 and 1 an expected confidence may come, for log-odds that are finite."""

_CONFIDENCE = re.compile(rf": ([0-9]+) {re.escape(ANSWER_OPEN)}")


class CountdownWithConfidence(Countdown):
    """Countdown, the same problems for the same arguments (`help_shown` is not one of them): demonstrations write a
    confidence before the answer and never call.

    Raises ValueError for the style `chat`, whose prompts say nothing of a confidence.
    """

    def __init__(self, **args: Any) -> None:
        super().__init__(**args, help_shown=False)
        if self.style != "tiny":
            raise ValueError("style: RLCR's prompts are those of 'tiny'; leave it out")

    def demonstrations(self, seed: int) -> Sequence[Demonstration]:
        """Countdown's, all answered, each with a random confidence."""
        rng = random.Random(derive(seed, "confidence"))
        return [replace(d, response=self._confident(d, rng)) for d in super().demonstrations(seed)]

    def _confident(self, demo: Demonstration, rng: random.Random) -> str:
        steps, _, answer = demo.response.partition(f" {ANSWER_OPEN} ")
        right = self.verify(demo.prompt, [parse(demo.response).answer or ""]) == [Verdict.CORRECT]
        return f"{steps} : {rng.choice(AFTER_RIGHT if right else AFTER_WRONG)} {ANSWER_OPEN} {answer}"

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Countdown's, with the numbers up to 100 at least."""
        return word_tokenizer([*map(str, range(1, max(self.max_word, LEVELS[-1]) + 1)), *"+-*=;:()"])


def confidence(response: str) -> float | None:
    """The confidence before the answer block, in [0, 1]; None where there is none, or one of over 100%."""
    found = _CONFIDENCE.search(response)
    return int(found[1]) / 100 if found and int(found[1]) <= 100 else None


def rewards(group: Group, alpha_a: float, alpha_c: float, alpha_f: float = 0.0) -> list[float]:
    """Hierarchical rewards less alpha_a (q - r)^2 for each response; one without a confidence q is wholly off, 1.

    With alpha_c = 0, as RLCR trains, that is alpha_a (r - (q - r)^2). Raises ValueError on an unknown group.
    """
    worth = hierarchical_rewards(group, alpha_a, alpha_c, alpha_f)
    return [
        value - alpha_a * _error(completion.text, float(outcome is Outcome.LOCAL_CORRECT))
        for value, completion, outcome in zip(worth, group.completions, group.outcomes, strict=True)
    ]


def _error(response: str, right: float) -> float:
    q = confidence(response)
    return 1.0 if q is None else (q - right) ** 2


def rlcr(seed: int) -> Arm:
    """As many updates, of as many samples, as every other arm; two more tokens a response, for the confidence."""
    overrides = {
        "task.name": "studies.rlcr:CountdownWithConfidence",
        "reward.function": "studies.rlcr:rewards",
        "reward.alpha_c": "0",
        "rollout.max_new_tokens": "24",
        **arms.UNFILTERED,
        **arms.FIXED_PRICE,
    }
    return Arm("RLCR", overrides, seed)


# ---- the score at use


def confidences(run: Run) -> Rows:
    """How unsure the run's greedy answers are, for its validation and its held-out problems.

    `score`: the log-odds of being wrong by the expected confidence, over the model's own distribution of the number
    that it wrote (which tells apart what the ten numbers do not). An answer without a confidence is called first.
    """
    _, heldout_masked, train_masked = STANDARD
    validation = {p.id for p in run.validation}
    made: Rows = []
    for split, wanted, prompts in (
        ("validation", train_masked, run.validation),
        ("heldout", heldout_masked, heldout(run)),
    ):
        make_predictions(run, wanted)
        rows = read_jsonl(wanted.path(run.folder))
        kept = [row for row in rows if split == "heldout" or row["id"] in validation]
        responses = {row["id"]: row["response"] for row in kept}
        q = expected_confidence(run, prompts, [responses[p.id] for p in prompts]).clip(SURELY, 1 - SURELY)
        scores = np.log1p(-q) - np.log(q)
        made += [{"id": p.id, "split": split, "score": s} for p, s in zip(prompts, scores.tolist(), strict=True)]
    return made


@torch.no_grad()
def expected_confidence(run: Run, prompts: Sequence[Prompt], responses: Sequence[str]) -> np.ndarray[Any, Any]:
    """[n] float64 the mean of the percent tokens where a response wrote one, as a fraction; 0 where it wrote none.

    Under the policy's distribution of that token, among the numbers up to 100.
    """
    percents = torch.arange(1, 101)
    tokens = run.tokenizer.convert_tokens_to_ids([str(p) for p in percents.tolist()])
    opening = run.tokenizer.convert_tokens_to_ids(ANSWER_OPEN)
    examples = []
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        if confidence(response) is not None:
            ids = run.tokenizer.encode(response, add_special_tokens=False)
            at = ids.index(opening) - 1
            examples.append(Example([*run.task.render(prompt, run.tokenizer), *ids[:at]], [ids[at]], group=i))
    config, found = run.config, np.zeros(len(prompts))
    for batch in packed_batches(examples, config.token_cap, run.model.device, padded=not config.update.pack):
        hidden_RH = response_states(run.model, batch, getattr(torch, config.model.dtype))
        logits_RK = run.model.get_output_embeddings()(hidden_RH)[:, tokens].double()
        mean_R = logits_RK.softmax(1).cpu() @ (percents / 100).double()
        found[batch.group.cpu().numpy()] = mean_R.numpy()
    return found


CONFIDENCE = Predictions("rlcr-confidence", confidences)
ENTRANTS = (Entrant("RLCR", rlcr, CONFIDENCE),)
