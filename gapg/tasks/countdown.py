"""Countdown: reach a target with some numbers, each used exactly once. Generated, so it needs no data.

The default is the smallest set that is hard enough to be worth a cloud: three numbers of 1..20, a target of 1..60,
+ - * with every value in 1..100 and no multiplication by 1, which makes 9,938 problems. Prompt and response are
`3 8 15 = 39 :` and `8 * 3 = 24 ; 24 + 15 = 39 <answer> ( 8 * 3 ) + 15 </answer>`, at most 20 tokens.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterable, Sequence
from fractions import Fraction
from functools import lru_cache
from itertools import combinations_with_replacement
from typing import Literal

from transformers import PreTrainedTokenizerBase

from gapg.tasks import arithmetic
from gapg.tasks.arithmetic import Trace
from gapg.tasks.base import ANSWER_CLOSE, ANSWER_OPEN, HELP_PHRASE, Demonstration, Prompt, Split, Verdict
from gapg.tasks.templates import ANSWER_ONLY, ENDINGS, render_instruction
from gapg.tasks.vocabulary import word_tokenizer
from gapg_rollout.records import OracleQuestion

_PROBLEM = re.compile(r"([0-9]+(?: [0-9]+)*) = ([0-9]+)(?: :)?")

# The warm start's mix. Help must follow wrong traces: help that is independent of the trace dies out in RL.
_RIGHT, _HELP_AFTER_RIGHT, _HELP_AFTER_WRONG = 0.80, 0.03, 0.70


class Countdown:
    """The task (Solvable, Demonstrated, Tokenized), deterministic: the same arguments make the same problems.

    numbers: how many numbers a problem has, or several such counts (`[3, 4]`).
    max_number, max_target, max_value: the largest number given, target, and value on the way.
    problems: how many to draw at random; without it every problem is enumerated (for small settings only).
    heldout: fraction of the problems held out, cut by a hash of the problem and `seed`.
    split: `problem` cuts between problems, so a held-out one mostly shares its numbers with a training problem;
        `numbers` cuts between sets of numbers, which no training and held-out problem then share.
    style: `tiny` prompts with the bare problem, for models made here; `chat` explains task and endings in words.
    help_shown: whether demonstrations ever call; without, the same traces all end in an answer.
    Raises ValueError on settings that leave no problems.
    """

    name = "countdown"

    def __init__(
        self,
        numbers: int | Sequence[int] = 3,
        max_number: int = 20,
        max_target: int = 60,
        max_value: int = 100,
        problems: int | None = None,
        heldout: float = 0.25,
        seed: int = 0,
        style: Literal["tiny", "chat"] = "tiny",
        help_shown: bool = True,
        split: Literal["problem", "numbers"] = "problem",
    ) -> None:
        counts = (numbers,) if isinstance(numbers, int) else tuple(numbers)
        if not counts or not all(2 <= n <= 6 for n in counts):
            raise ValueError(f"numbers: each count must be 2 to 6, not {numbers!r}")
        if style not in ("tiny", "chat"):
            raise ValueError(f"style: must be 'tiny' or 'chat', not {style!r}")
        if not 0 < heldout < 1:
            raise ValueError(f"heldout: must be a fraction between 0 and 1, not {heldout!r}")
        if split not in ("problem", "numbers"):
            raise ValueError(f"split: must be 'problem' or 'numbers', not {split!r}")
        self.help_shown = help_shown
        self.style, self.max_word, self.max_value = style, max(max_number, max_target, max_value), max_value
        self.traces = lru_cache(maxsize=2048)(lambda numbers: arithmetic.traces(numbers, max_value))
        if problems is None:
            found = self._enumerate(counts, max_number, max_target)
        else:
            found = _draw(counts, max_number, max_target, max_value, problems, seed)
        made = [Prompt(f"{text} = {target}", f"{text} = {target} :", gold, self.name) for text, target, gold in found]
        made.sort(key=lambda p: _order(seed, p.id))
        held = _held_out(made, int(heldout * len(made)), seed, split)
        if not 0 < len(held) < len(made):
            raise ValueError(f"countdown: {len(made)} problems are too few to hold out a fraction of {heldout}")
        self._splits: dict[Split, tuple[Prompt, ...]] = {
            "train": tuple(p for p in made if p.id not in held),
            "heldout": tuple(p for p in made if p.id in held),
        }

    def _enumerate(self, counts: Iterable[int], max_number: int, max_target: int) -> list[tuple[str, int, str]]:
        found = []
        for count in counts:
            if count > 3 and max_number > 12:
                raise ValueError("problems: set how many to draw; four or more numbers are too many to enumerate")
            for numbers in combinations_with_replacement(range(1, max_number + 1), count):
                golds: dict[int, str] = {}
                for trace in self.traces(numbers):
                    golds.setdefault(trace.value, trace.expression)
                text = " ".join(map(str, numbers))
                found += [(text, target, gold) for target, gold in sorted(golds.items()) if target <= max_target]
        return found

    def prompts(self, split: Split) -> Sequence[Prompt]:
        """Problems of a split in a fixed, shuffled order: any first part of it is a fair sample."""
        return self._splits[split]

    def render(self, prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """`tiny`: the text's own tokens and nothing else. `chat`: one user turn that explains task and endings."""
        if self.style == "tiny":
            return list(tokenizer.encode(prompt.text, add_special_tokens=False))
        return render_instruction(f"{_explain(prompt)} {ENDINGS}", tokenizer)

    def verify(self, prompt: Prompt, answers: Sequence[str]) -> list[Verdict]:
        """Right when the expression uses every number exactly once and its exact value is the target.

        The steps before the answer are not judged. `expression = value` is accepted where both are right.
        """
        numbers, target = _parse(prompt.text)
        return [_check(answer, sorted(numbers), target) for answer in answers]

    def question(self, prompt: Prompt) -> OracleQuestion:
        """One user message that explains the task and asks for an answer block."""
        return OracleQuestion(prompt.id, ({"role": "user", "content": f"{_explain(prompt)} {ANSWER_ONLY}"},))

    def solve(self, question_id: str) -> str:
        """An answer block for `3 8 15 = 39`, in the splits or not. Raises ValueError where there is no solution."""
        numbers, target = _parse(question_id)
        for trace in self.traces(numbers):
            if trace.value == target:
                return f"{ANSWER_OPEN} {trace.expression} {ANSWER_CLOSE}"
        raise ValueError(f"no way to make {target} of {numbers}")

    def demonstrations(self, seed: int) -> Sequence[Demonstration]:
        """One for each training problem, drawn afresh for each seed: pass the epoch's number.

        80% are right (3% of them call all the same), 20% honestly compute a wrong value and then call (70%) or
        answer it (30%), so that the model learns to call *because of* the trace it wrote. `help_shown=False` shows the
        same traces, all answered.
        """
        rng = random.Random(seed)
        return [Demonstration(p, self._respond(p, rng)) for p in self._splits["train"]]

    def _respond(self, prompt: Prompt, rng: random.Random) -> str:
        numbers, target = _parse(prompt.text)
        known = self.traces(numbers)
        right = [t for t in known if t.value == target]
        wrong = [t for t in known if t.value != target]
        is_right = rng.random() < _RIGHT or not wrong
        trace: Trace = rng.choice(right if is_right else wrong)
        calls = rng.random() < (_HELP_AFTER_RIGHT if is_right else _HELP_AFTER_WRONG)
        if calls and self.help_shown:
            return f"{trace.steps} {HELP_PHRASE}"
        return f"{trace.steps} {ANSWER_OPEN} {trace.expression} {ANSWER_CLOSE}"

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """A word is a token, and so is the whole help phrase: 114 tokens by default."""
        return word_tokenizer([*map(str, range(1, self.max_word + 1)), *"+-*=;:()"])


def _parse(text: str) -> tuple[tuple[int, ...], int]:
    match = _PROBLEM.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"no Countdown problem (`3 8 15 = 39`): {text[:80]!r}")
    return tuple(map(int, match[1].split())), int(match[2])


def _order(seed: int, text: str) -> bytes:
    return hashlib.sha256(f"{seed}:{text}".encode()).digest()


def _held_out(problems: Sequence[Prompt], n: int, seed: int, split: str) -> set[str]:
    """Ids of the first n problems; by `numbers`, of whole sets of numbers drawn by a hash until they are n or more."""
    if split == "problem":
        return {p.id for p in problems[:n]}
    sets: dict[str, list[str]] = {}
    for p in problems:
        sets.setdefault(p.id.partition(" = ")[0], []).append(p.id)  # numbers stand there in rising order
    held = set[str]()
    for numbers in sorted(sets, key=lambda numbers: _order(seed, numbers)):
        if len(held) >= n:
            break
        held.update(sets[numbers])
    return held


def computed(answer: str) -> tuple[Fraction, tuple[int, ...]] | None:
    """What an answer comes to: its exact value, and the numbers it uses, sorted; None where it is no expression.

    Answers of one value from the same numbers are one answer, in whatever spelling: what a vote counts.
    """
    try:
        value, used = arithmetic.evaluate(answer.partition("=")[0])
    except ValueError:
        return None
    return value, tuple(used)


def _check(answer: str, numbers: list[int], target: int) -> Verdict:
    expression, equals, value = answer.partition("=")
    if equals and value.strip() != str(target):
        return Verdict.WRONG
    try:
        result, used = arithmetic.evaluate(expression)
    except arithmetic.TooLarge:
        return Verdict.LIMIT
    except ValueError:
        return Verdict.WRONG
    return Verdict.CORRECT if used == numbers and result == target else Verdict.WRONG


def _explain(prompt: Prompt) -> str:
    numbers, target = _parse(prompt.text)
    return (
        f"Using the numbers {', '.join(map(str, numbers))}, each exactly once, write an expression that equals "
        f"{target}. You may use +, -, *, / and parentheses, for example ( 1 + 2 ) * 3."
    )


def _draw(
    counts: Sequence[int], max_number: int, max_target: int, max_value: int, problems: int, seed: int
) -> list[tuple[str, int, str]]:
    """Distinct random problems, each solvable because it was made by a computation."""
    rng = random.Random(seed)
    found: dict[tuple[str, int], str] = {}
    for _ in range(200 * problems):
        numbers = sorted(rng.randint(1, max_number) for _ in range(rng.choice(counts)))
        trace = arithmetic.random_trace(numbers, max_value, rng)
        if trace and trace.value <= max_target:
            found.setdefault((" ".join(map(str, numbers)), trace.value), trace.expression)
        if len(found) == problems:
            return [(text, target, gold) for (text, target), gold in found.items()]
    raise ValueError(f"problems: found only {len(found)} of {problems}; ask for fewer or widen the ranges")
