"""What the tests of the transformers engine share."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from gapg.rollout.records import Completion, Sampling
from gapg.rollout.transformers_engine import TransformersEngine


def generate(
    engine: TransformersEngine, prompts: Sequence[Sequence[int]], n: int = 1, **settings: object
) -> list[list[Completion]]:
    """Completions in the order of the prompts; each prompt must come exactly once."""
    found = list(engine.generate(prompts, n, Sampling(**{"max_new_tokens": 8, **settings})))  # type: ignore[arg-type]
    assert sorted(i for i, _ in found) == list(range(len(prompts)))
    assert all(len(completions) == n for _, completions in found)
    return [completions for _, completions in sorted(found, key=lambda pair: pair[0])]


def next_token(model: PreTrainedModel, ids: Sequence[Sequence[int]], temperature: float = 1.0) -> torch.Tensor:
    """[B, V] probabilities, float64, from the plain model; prompts of one length."""
    with torch.no_grad():
        batch = torch.tensor(ids)
        logits = model(input_ids=batch, attention_mask=torch.ones_like(batch)).logits[:, -1]
    return torch.softmax(logits.double() / temperature, -1)


def p_value(counts: Counter[object], chances: dict[object, float]) -> float:
    """Chi-square, cells expected under five merged; the tail by Wilson and Hilferty's approximation."""
    n = counts.total()
    assert all(chances.get(cell, 0.0) > 0 for cell in counts)
    large = [c for c, p in chances.items() if n * p >= 5]
    cells = [(counts[c], n * chances[c]) for c in large]
    rest = n - sum(e for _, e in cells)
    cells.append((n - sum(o for o, _ in cells), rest))
    statistic = sum((o - e) ** 2 / e for o, e in cells if e > 1e-6)
    k = len(cells) - 1
    z = ((statistic / k) ** (1 / 3) - (1 - 2 / (9 * k))) / math.sqrt(2 / (9 * k))
    return 0.5 * math.erfc(z / math.sqrt(2))
