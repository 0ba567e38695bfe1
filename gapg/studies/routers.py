"""Who is called first: scores of predictions, higher where the cloud is needed more; and routing by a threshold."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gapg.evaluation.evaluate import Result
from gapg.judge import parse
from gapg.seeding import derive
from gapg.studies.curves import FloatArray

Predictions = Sequence[Mapping[str, Any]]
"""Lines of `predictions.jsonl` with `outcome` and `oracle_score`, of responses decoded with help masked."""


def help_margins(rows: Predictions) -> FloatArray:
    """[n] the model's own decision: how near the response came to calling; -inf where it never could."""
    margins = [-math.inf if row["help_margin"] is None else row["help_margin"] for row in rows]
    return np.array(margins, dtype=np.float64)


def mean_logprob(rows: Predictions) -> FloatArray:
    """[n] the mean token log-prob of the response, negated: a post-inference router."""
    return -np.array([row["logprob_mean"] for row in rows], dtype=np.float64)


def mean_answer_logprob(rows: Predictions) -> FloatArray:
    """[n] the mean token log-prob given that the response does not call, negated: what only the answer tells.

    `mean_logprob` of a model that can call also holds log(1 - p), with p the chance of the help phrase. Raises
    ValueError where rows do not have it.
    """
    return _answer(rows, "answer_logprob_mean")


def min_answer_logprob(rows: Predictions) -> FloatArray:
    """[n] the least token log-prob given that the response does not call, negated. Raises ValueError as the mean."""
    return _answer(rows, "answer_logprob_min")


def _answer(rows: Predictions, key: str) -> FloatArray:
    if any(key not in row for row in rows):
        raise ValueError(
            f"predictions have no {key}: an older gapg made them; delete the products/*.jsonl that lack it and run the"
            " same command again"
        )
    if any(row[key] is None for row in rows):
        raise ValueError(f"{key} is unknown: the help phrase was not steered")
    return -np.array([row[key] for row in rows], dtype=np.float64)


def self_consistency(rows: Predictions) -> tuple[FloatArray, FloatArray]:
    """(score [n], local [n]) of n problems with k sampled responses each, in the order in which the ids first come.

    score: 1 - the share of the k responses that give the most common answer (the text in the answer block, blanks
    aside); 1 where none has an answer. local: 1 where that answer is right; of equally common ones the first sampled.
    Answers are told apart by their text: two ways to write one value are two answers. Raises ValueError where problems
    have unequally many responses.
    """
    samples: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        samples.setdefault(row["id"], []).append(row)
    if len({len(of_problem) for of_problem in samples.values()}) > 1:
        raise ValueError("self-consistency needs equally many responses for each problem")
    votes = [_vote(of_problem) for of_problem in samples.values()]
    return np.array([score for score, _ in votes]), np.array([float(right) for _, right in votes])


def _vote(of_problem: Predictions) -> tuple[float, bool]:
    answers = [parse(row["response"], row.get("thinking", False)).answer for row in of_problem]
    texts = [None if answer is None else " ".join(answer.split()) for answer in answers]
    counts = Counter(text for text in texts if text is not None)
    if not counts:
        return 1.0, False
    # most_common keeps the order of first appearance among equals
    winner, count = counts.most_common(1)[0]
    return 1 - count / len(texts), of_problem[texts.index(winner)]["outcome"] == "local_correct"


def offload(name: str, predictions: Predictions, to_cloud: Sequence[bool]) -> Result:
    """The task-tuned answers, with those of the chosen problems replaced by the cloud's."""
    local = [p["outcome"] == "local_correct" and not c for p, c in zip(predictions, to_cloud, strict=True)]
    cloud = [p["oracle_score"] >= 0.5 and c for p, c in zip(predictions, to_cloud, strict=True)]
    return Result(name, list(to_cloud), [a or b for a, b in zip(local, cloud, strict=True)], local)


def at_random(predictions: Predictions, cloud_fraction: float, seed: int) -> list[bool]:
    """Exactly the wanted number of problems, drawn by the seed."""
    chosen = random.Random(derive(seed, "random offloading")).sample(
        range(len(predictions)), round(cloud_fraction * len(predictions))
    )
    chosen_set = set(chosen)
    return [i in chosen_set for i in range(len(predictions))]


def logprob_threshold(calibration: Predictions, cloud_fraction: float) -> float:
    """The mean token log-prob under which `cloud_fraction` of the calibration responses lie."""
    scores = sorted(p["logprob_mean"] for p in calibration)
    return scores[min(round(cloud_fraction * len(scores)), len(scores) - 1)]


def by_logprob(predictions: Predictions, threshold: float) -> list[bool]:
    """Calls on responses less likely than the threshold: a post-inference router."""
    return [p["logprob_mean"] < threshold for p in predictions]
