"""Arithmetic in words, drawn from templates: people, prices, distances, time. Needs no data, and any chat model.

`word_problems.yaml` has the templates. A problem is a story, perhaps an aside (a number that is not needed), and a
question; two to four steps lead to its answer, a whole number:

    Nora buys 4 pens at 3 dollars each. There are 11 rulers in the shop. She pays with 20 dollars. How many … ?
    The pens cost 4 * 3 = 12 dollars.
    Nora gets back 20 - 12 = 8 dollars.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any, Literal

import yaml

from gapg.tasks.arithmetic import evaluate
from gapg.tasks.base import ANSWER_CLOSE, ANSWER_OPEN, HELP_PHRASE, Demonstration, Prompt, Split
from gapg.tasks.in_words import InWords
from gapg.tasks.mathcheck import MathChecker

TEMPLATES = Path(__file__).with_suffix(".yaml")
LARGEST = 9999
"""Of every number on the way."""
MOST = 20_000
"""Problems of a split: drawing so many takes ten seconds."""
TRIES, IN_VAIN = 20, 50
"""Draws from a template for a new problem, and templates in a row that gave none: there are taken to be no more."""

PEOPLE = (
    *(dict(name=name, he="she", his="her", him="her", He="She", His="Her")
      for name in ("Maya", "Nora", "Lena", "Aisha", "Sofia", "Grace", "Hana", "Ines", "Zoe", "Priya")),
    *(dict(name=name, he="he", his="his", him="him", He="He", His="His")
      for name in ("Omar", "Leo", "Tom", "Ravi", "Jonas", "Kofi", "Ben", "Mateo", "Sam", "Yusuf")),
)  # fmt: skip
_STEP = re.compile(r"((?:\{\w+\}|[0-9]+|[-+*/() ])+)= \{(\w+)\}")
_REFERS = re.compile(
    r"\b(it|its|they|them|their|these|those|this|that|there|then|here|each|all|both|half|one|more|rest|others?|same|as)\b",
    re.I,
)
_RANGE = re.compile(r"([0-9]+)\.\.([0-9]+)(?:/([0-9]+))?")

# The warm start's mix. Help must follow wrong steps: help that is independent of the response dies out in training.
_RIGHT, _HELP_AFTER_RIGHT, _HELP_AFTER_WRONG = 0.80, 0.03, 0.70
_SLIPS = (-10, -2, -1, 1, 2, 10)


@dataclass(frozen=True, slots=True)
class Template:
    """A kind of problem, its slots in braces.

    steps: sentences that each hold `expression = {slot}`, which fills that slot; the last one's is the answer.
    where: what fills the others: a range of whole numbers (`2..9`, `10..90/5` in steps of 5), or one of a list. `{x}`,
        the number in the aside, `{name}` with `{he}`, `{his}`, `{him}`, and `{other}`, another name, fill themselves.
    """

    name: str
    story: str
    question: str
    steps: tuple[str, ...]
    where: Mapping[str, str | Sequence[int | str]]
    aside: str

    @property
    def sentences(self) -> list[str]:
        """The story's."""
        return re.split(r"(?<=\.) ", self.story)

    @property
    def places(self) -> list[int]:
        """After how many sentences the aside may come: last, or before one that refers to nothing said before it."""
        told = self.sentences
        inner = [] if "{other}" in self.aside else [i for i in range(1, len(told)) if not _REFERS.search(told[i])]
        return [*inner, len(told)]


@dataclass(frozen=True, slots=True)
class _Problem:
    template: Template
    slots: Mapping[str, int | str]
    aside: int | None
    """After how many sentences of the story it comes; None: not at all."""

    @property
    def key(self) -> tuple[str | int, ...]:
        """Of two problems with the same key the numbers are the same, whoever and whatever they are about."""
        numbers = [slot for slot in self.template.where if isinstance(self.slots[slot], int)]
        return self.template.name, *(self.slots[slot] for slot in numbers)

    @property
    def text(self) -> str:
        told = list(self.template.sentences)
        if self.aside is not None:
            told.insert(self.aside, self.template.aside)
        return " ".join((*told, self.template.question)).format(**self.slots)

    def worked(self, slip: Mapping[int, int] | None = None) -> tuple[list[str], int | None]:
        """(the steps in words, the answer). `slip` adds to the results of steps; a result that is then no whole number
        of 1..LARGEST ends the steps, without an answer."""
        slots, lines, value = dict(self.slots), list[str](), None
        for i, step in enumerate(self.template.steps):
            expression, slot = _parse(step)
            exact = evaluate(expression.format(**slots))[0] + (slip or {}).get(i, 0)
            if exact.denominator != 1 or not 1 <= exact <= LARGEST:
                return lines, None
            slots[slot] = value = int(exact)
            lines.append(step.format(**slots))
        return lines, value


class WordProblems(InWords):
    """The task (Solvable, Demonstrated), deterministic: the same arguments make the same problems.

    problems, heldout: how many problems are drawn, to train on and held out.
    steps: fewest and most steps of a problem, 2 to 4.
    size: ranges of numbers are this many times as wide, at most 3, beyond which stories make no sense.
    asides: fraction of the problems that tell a number that is not needed, somewhere after the first sentence.
    held_out_by: `template`: a fifth of the templates, never trained on; `numbers`: templates trained on, which all are
        then, each as often, with numbers that are not; `both`: half and half. Ids say it: `template/ticket-price/…`,
        `numbers/…`.
    Raises ValueError for settings that leave too few problems.
    """

    name = "word-problems"

    def __init__(
        self,
        problems: int = 6000,
        heldout: int = 1000,
        steps: Sequence[int] = (2, 4),
        size: float = 1.0,
        asides: float = 0.3,
        held_out_by: Literal["template", "numbers", "both"] = "both",
        seed: int = 0,
    ) -> None:
        counts = tuple(steps) if isinstance(steps, list | tuple) else ()
        if counts not in combinations_with_replacement((2, 3, 4), 2) or not all(type(n) is int for n in counts):
            raise ValueError(f"steps: must be the fewest and the most, of 2 to 4, as in [2, 3], not {steps!r}")
        for name, value, least in (("problems", problems, 2), ("heldout", heldout, 1)):
            if type(value) is not int or not least <= value <= MOST:
                raise ValueError(f"{name}: must be a whole number of {least} to {MOST}, not {value!r}")
        if not (_is_number(size) and 0 < size <= 3):
            raise ValueError(f"size: must be a number above 0, at most 3, not {size!r}")
        if type(seed) is not int:
            raise ValueError(f"seed: must be a whole number, not {seed!r}")
        if not (_is_number(asides) and 0 <= asides <= 1):
            raise ValueError(f"asides: must be a fraction between 0 and 1, not {asides!r}")
        if held_out_by not in ("template", "numbers", "both"):
            raise ValueError(f"held_out_by: must be 'template', 'numbers' or 'both', not {held_out_by!r}")
        super().__init__(MathChecker())
        by_template = {"template": heldout, "numbers": 0, "both": heldout // 2}[held_out_by]
        known, new = _split(templates(), counts, seed, 0.2 if by_template else 0.0)
        rng, by_numbers = random.Random(seed), heldout - by_template
        wanted = "problems and heldout" if by_numbers else "problems"
        drawn = _draw(problems + by_numbers, wanted, known, size, asides, rng)
        apart = _spread(by_numbers, [p.template.name for p in drawn])
        parts = {
            "train": [p for i, p in enumerate(drawn) if i not in apart],
            "numbers": [p for i, p in enumerate(drawn) if i in apart],
            "template": _draw(by_template, "heldout", new, size, asides, rng),
        }
        self._problems = {
            f"{where}/{p.template.name}/{_hash(p.text)}": p for where, found in parts.items() for p in found
        }
        made = [Prompt(key, p.text, str(p.worked()[1]), self.name) for key, p in self._problems.items()]
        held = [p for p in made if not p.id.startswith("train/")]
        rng.shuffle(held)
        self._splits: dict[Split, tuple[Prompt, ...]] = {"train": tuple(made[:problems]), "heldout": tuple(held)}

    def prompts(self, split: Split) -> Sequence[Prompt]:
        """Problems of a split in a fixed, shuffled order: any first part of it is a fair sample."""
        return self._splits[split]

    def solve(self, question_id: str) -> str:
        """The worked steps and the gold, as a cloud would reply."""
        lines, answer = self._problems[question_id].worked()
        return "\n".join([*lines, f"{ANSWER_OPEN} {answer} {ANSWER_CLOSE}"])

    def demonstrations(self, seed: int) -> Sequence[Demonstration]:
        """The worked steps of each training problem; in one of five a step goes wrong, which mostly ends in a call."""
        rng = random.Random(seed)
        return [Demonstration(p, _demonstrate(self._problems[p.id], rng)) for p in self._splits["train"]]


def _demonstrate(problem: _Problem, rng: random.Random) -> str:
    right = rng.random() < _RIGHT
    at, slip = rng.randrange(len(problem.template.steps)), None
    if not right:  # one that is written down: the step itself must not leave the numbers that there are
        slip = {at: rng.choice([d for d in _SLIPS if len(problem.worked({at: d})[0]) > at])}
    lines, answer = problem.worked(slip)
    # where the steps cannot go on there is nothing but a call
    calls = answer is None or rng.random() < (_HELP_AFTER_RIGHT if right else _HELP_AFTER_WRONG)
    return "\n".join([*lines, HELP_PHRASE if calls else f"{ANSWER_OPEN} {answer} {ANSWER_CLOSE}"])


@cache
def templates() -> tuple[Template, ...]:
    """All of them, in the order of the file."""
    rows = yaml.safe_load(TEMPLATES.read_text(encoding="utf-8"))
    return tuple(Template(name=name, **(row | {"steps": tuple(row["steps"])})) for name, row in rows.items())


def _parse(step: str) -> tuple[str, str]:
    """(the expression that a step computes, the slot that its result fills)."""
    found = _STEP.search(step)
    assert found, step
    return found[1].strip(), found[2]


def _split(
    found: Sequence[Template], steps: Sequence[int], seed: int, part: float
) -> tuple[list[Template], list[Template]]:
    """(to train on, never trained on): that part of those with each number of steps, so that both are equally hard."""
    known, new = list[Template](), list[Template]()
    for number in range(steps[0], steps[1] + 1):
        alike = sorted((t for t in found if len(t.steps) == number), key=lambda t: _hash(f"{seed} {t.name}"))
        cut = int(part * len(alike))
        new += alike[:cut]
        known += alike[cut:]
    return known, new


def _draw(
    n: int,
    key: str,
    chosen: Sequence[Template],
    size: float,
    asides: float,
    rng: random.Random,
) -> list[_Problem]:
    """n problems of these templates, no two alike in template and numbers. key: what asks for them.

    Raises ValueError where there are not so many.
    """
    made, seen, in_vain = list[_Problem](), set[tuple[str | int, ...]](), 0
    while len(made) < n and in_vain < IN_VAIN:
        template = rng.choice(chosen)
        aside = rng.choice(template.places) if rng.random() < asides else None
        # again where a division leaves a rest, so that templates without one do not come more often
        for _ in range(TRIES):
            problem = _Problem(template, _fill(template, size, rng), aside)
            if problem.key not in seen and problem.worked()[1] is not None:
                seen.add(problem.key)
                made.append(problem)
                in_vain = 0
                break
        else:
            in_vain += 1
    if len(made) < n:
        raise ValueError(f"{key}: {n} are wanted, and only {len(made)} were found; ask for fewer, or raise size")
    return made


def _spread(n: int, names: Sequence[str]) -> set[int]:
    """Which n of these, so that every name is among them as often as among all."""
    order = sorted(range(len(names)), key=names.__getitem__)
    return {order[(2 * i + 1) * len(order) // (2 * n)] for i in range(n)}


def _fill(template: Template, size: float, rng: random.Random) -> dict[str, Any]:
    person, other = rng.sample(PEOPLE, 2)
    slots: dict[str, Any] = {**person, "other": other["name"], "x": rng.randint(2, 60)}
    for slot, allowed in template.where.items():
        if isinstance(allowed, str):
            low, high, by = _range(allowed)
            slots[slot] = rng.randrange(low, low + round((high - low) * size) + 1, by)
        else:
            slots[slot] = rng.choice(allowed)
    return slots


def _range(text: str) -> tuple[int, int, int]:
    """(lowest, highest, step) of `2..9` or `10..90/5`."""
    found = _RANGE.fullmatch(text)
    assert found, text
    return int(found[1]), int(found[2]), int(found[3] or 1)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
