"""The stream of training prompts: a new order each epoch, and prompts that come back when the oracle failed them."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from gapg.errors import ConfigError
from gapg.seeding import derive
from gapg.tasks.base import Prompt


@dataclass(slots=True)
class PromptQueue:
    """`cursor` counts prompts drawn in order, over epochs; `returned` are ids waiting to be drawn again."""

    prompts: Sequence[Prompt]
    seed: int
    cursor: int = 0
    returned: list[str] = field(default_factory=list)
    _order: tuple[int, list[int]] = (-1, [])

    def next(self, n: int) -> list[Prompt]:
        """The next n prompts; returned ones first. Never the same prompt twice in one call while n allows it."""
        by_id = {p.id: p for p in self.prompts} if self.returned else {}
        drawn = [by_id[i] for i in self.returned[:n]]
        self.returned = self.returned[n:]
        seen = {p.id for p in drawn}
        while len(drawn) < n:
            prompt = self._at(self.cursor)
            self.cursor += 1
            if prompt.id not in seen or len(seen) == len(self.prompts):
                drawn.append(prompt)
                seen.add(prompt.id)
        return drawn

    def restore(self, cursor: int, returned: list[str]) -> None:
        """Goes on from there. Raises ConfigError where a returned prompt is not among these: the data changed."""
        if strange := set(returned) - {p.id for p in self.prompts}:
            raise ConfigError(
                f"task: the data has no training problem {min(strange)!r}, which is to be asked again: the run began "
                "with other data; put that back, or choose another --output-dir"
            )
        self.cursor, self.returned = cursor, returned

    def give_back(self, prompts: Iterable[Prompt]) -> None:
        self.returned = list(dict.fromkeys([*self.returned, *(p.id for p in prompts)]))

    def _at(self, cursor: int) -> Prompt:
        epoch, offset = divmod(cursor, len(self.prompts))
        if self._order[0] != epoch:
            order = list(range(len(self.prompts)))
            random.Random(derive(self.seed, "epoch", epoch)).shuffle(order)
            self._order = (epoch, order)
        return self.prompts[self._order[1][offset]]


def split_validation(prompts: Sequence[Prompt], n: int, seed: int) -> tuple[list[Prompt], list[Prompt]]:
    """(training, validation): n prompts, at most a fifth, that are never trained on, so choosing by them is honest."""
    order = list(range(len(prompts)))
    random.Random(derive(seed, "validation")).shuffle(order)
    n = min(n, len(prompts) // 5)
    held = set(order[:n])
    train = [p for i, p in enumerate(prompts) if i not in held]
    return train, [prompts[i] for i in order[:n]]
