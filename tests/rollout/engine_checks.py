"""What the tests of the transformers engine share."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gapg_rollout.engines.transformers import TransformersEngine
from gapg_rollout.records import Completion, Sampling


def generate(
    engine: TransformersEngine, prompts: Sequence[Sequence[int]], n: int = 1, **settings: object
) -> list[list[Completion]]:
    """Completions in the order of the prompts; each prompt must come exactly once."""
    found = list(engine.generate(prompts, n, Sampling(**{"max_new_tokens": 8, **settings})))  # type: ignore[arg-type]
    assert sorted(i for i, _ in found) == list(range(len(prompts)))
    assert all(len(completions) == n for _, completions in found)
    return [completions for _, completions in sorted(found, key=lambda pair: pair[0])]


def check_stops_outside_thought(
    tokenizer: PreTrainedTokenizerBase, found: Sequence[Completion], end_ids: set[int], stop: str, thinking: bool
) -> None:
    """Each response of word tokens ends at the first stop or end token outside a think block, and at no other."""
    kinds = Counter[str]()
    for completion in found:
        said = [tokenizer.convert_ids_to_tokens(i) for i in completion.token_ids]
        awake, ends = not thinking, []
        for i, (token, word) in enumerate(zip(completion.token_ids, said, strict=True)):
            awake = word == "</think>" or (awake and word != "<think>")
            if token in end_ids or (word == stop and awake):
                ends.append(i)
            kinds["passed over"] += word == stop and not awake
        assert ends in ([], [len(said) - 1])
        assert completion.finish_reason == ("stop" if ends else "length")
        kinds["stopped"] += bool(ends) and said[-1] == stop
    assert kinds["passed over"] >= 8 and kinds["stopped"] >= 8, kinds


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
