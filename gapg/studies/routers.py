"""Baselines that decide about the cloud outside the model: at random, or by the response's log-prob."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from gapg.seeding import derive
from gapg.use.evaluate import Result

Predictions = Sequence[dict[str, Any]]
"""Lines of `predictions.jsonl` with `outcome` and `oracle_score`, of responses decoded with help masked."""


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
