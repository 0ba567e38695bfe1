"""Other tasks than the default Countdown: arithmetic in chains, and a Countdown whose warm start is seldom right."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from transformers import PreTrainedTokenizerBase

from gapg.tasks.base import ANSWER_CLOSE, ANSWER_OPEN, HELP_PHRASE, Demonstration, Prompt, Split, Verdict
from gapg.tasks.templates import ANSWER_ONLY
from gapg.tasks.vocabulary import word_tokenizer
from gapg_rollout.records import OracleQuestion
from studies import arms
from studies.arms import Arm, Entrant, Finished, Rows
from studies.by_problem import HELDOUT, collect, log_prob_router, stacked
from studies.drawing import COLOURS, SMALL, panels, percent
from studies.report import (
    Column,
    Record,
    Row,
    Study,
    Table,
    covered,
    grouped,
    interval,
    mean_of,
    seeds_of,
    table_of,
    verdict,
)
from studies.statistics import Difference, area, at_calls, compare, curve

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RIGHT, HELP_AFTER_RIGHT, HELP_AFTER_WRONG = 0.80, 0.03, 0.70
"""The mix of the demonstrations, as Countdown has it: the model learns to call because of the trace that it wrote."""
SLIP = 10
"""A wrong demonstration has one step that is wrong by up to so much."""
SMALL_FACTORS = 9
"""Chains multiply by 2 to so much."""

Step = tuple[str, int]
"""An operator and the number that it takes."""


class Chains:
    """Plain arithmetic (Solvable, Demonstrated, Tokenized): `27 + 18 - 25 * 2 =`, computed from left to right.

    Nothing is searched for, as in Countdown: each step has one right outcome, and a longer chain goes wrong more often.
    A response writes every step: `27 + 18 = 45 ; 45 - 25 = 20 ; 20 * 2 = 40 <answer> 40 </answer>`.

    numbers: how many numbers a chain may have. max_number, max_value: the largest number given, and value on the way;
    all values are in 1..max_value. problems, heldout: how many are drawn, and the part of them that is held out.
    help_shown: whether demonstrations ever call; without, the same traces all end in an answer.
    Raises ValueError where the settings leave too few different problems.
    """

    name = "chains"

    def __init__(
        self,
        numbers: Sequence[int] = (2, 3, 4, 5),
        max_number: int = 35,
        max_value: int = 100,
        problems: int = 10_000,
        heldout: float = 0.25,
        seed: int = 0,
        help_shown: bool = True,
    ) -> None:
        self.max_value, self.help_shown = max(max_number, max_value), help_shown
        rng, found = random.Random(seed), dict[str, int]()
        for _ in range(20 * problems):
            text, value = _chain(rng.choice(list(numbers)), max_number, self.max_value, rng)
            found.setdefault(text, value)
            if len(found) == problems:
                break
        cut = int(heldout * problems)
        if len(found) < problems or not 0 < cut < problems:
            raise ValueError(f"problems: found {len(found)} of {problems}, {cut} of them held out; widen the ranges")
        made = [Prompt(text, f"{text} =", str(value), self.name) for text, value in found.items()]
        made.sort(key=lambda p: hashlib.sha256(f"{seed}:{p.id}".encode()).digest())
        self._splits: dict[Split, tuple[Prompt, ...]] = {"train": tuple(made[cut:]), "heldout": tuple(made[:cut])}

    def prompts(self, split: Split) -> Sequence[Prompt]:
        """Problems of a split in a fixed, shuffled order."""
        return self._splits[split]

    def render(self, prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """The text's own tokens and nothing else."""
        return list(tokenizer.encode(prompt.text, add_special_tokens=False))

    def verify(self, prompt: Prompt, answers: Sequence[str]) -> list[Verdict]:
        """Right when the answer is the value; the steps before it are not judged."""
        return [Verdict.CORRECT if answer.strip() == prompt.answer else Verdict.WRONG for answer in answers]

    def question(self, prompt: Prompt) -> OracleQuestion:
        """One user message that explains the task and asks for an answer block."""
        text = f"Compute {prompt.id} strictly from left to right, without precedence of multiplication. {ANSWER_ONLY}"
        return OracleQuestion(prompt.id, ({"role": "user", "content": text},))

    def solve(self, question_id: str) -> str:
        """An answer block for `27 + 18 - 25`. Raises ValueError for what is no chain."""
        return f"{ANSWER_OPEN} {_values(*_parse(question_id))[-1]} {ANSWER_CLOSE}"

    def demonstrations(self, seed: int) -> Sequence[Demonstration]:
        """One for each training problem: 80% right, and the others with one step that is wrong by 1 to 10, from which
        the chain honestly goes on. They call after a right trace in 3%, after a wrong one in 70%."""
        rng = random.Random(seed)
        return [Demonstration(p, self._respond(p, rng)) for p in self._splits["train"]]

    def _respond(self, prompt: Prompt, rng: random.Random) -> str:
        first, steps = _parse(prompt.id)
        values, is_right = _values(first, steps), rng.random() < RIGHT
        if not is_right:
            values = self._with_slip(first, steps, rng)
        calls = rng.random() < (HELP_AFTER_RIGHT if is_right else HELP_AFTER_WRONG)
        trace = " ; ".join(
            f"{x} {sign} {number} = {y}" for x, (sign, number), y in zip(values, steps, values[1:], strict=False)
        )
        if calls and self.help_shown:
            return f"{trace} {HELP_PHRASE}"
        return f"{trace} {ANSWER_OPEN} {values[-1]} {ANSWER_CLOSE}"

    def _with_slip(self, first: int, steps: Sequence[Step], rng: random.Random) -> list[int]:
        """The values where one step is wrong; a value that left 1..max_value stops at the border."""
        at, values = rng.randrange(len(steps)), [first]
        for i, step in enumerate(steps):
            value = _apply(values[-1], step)
            if i == at:
                slips = [d for d in range(-SLIP, SLIP + 1) if d and 1 <= value + d <= self.max_value]
                value += rng.choice(slips)
            values.append(min(max(value, 1), self.max_value))
        return values

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """A word is a token, a number too, and so is the whole help phrase."""
        return word_tokenizer([*map(str, range(1, self.max_value + 1)), *"+-*=;"])


def _apply(value: int, step: Step) -> int:
    sign, number = step
    return value + number if sign == "+" else value - number if sign == "-" else value * number


def _values(first: int, steps: Sequence[Step]) -> list[int]:
    """The first number and the value after each step."""
    values = [first]
    for step in steps:
        values.append(_apply(values[-1], step))
    return values


def _parse(text: str) -> tuple[int, list[Step]]:
    words = text.split()
    steps = list(zip(words[1::2], map(int, words[2::2]), strict=True))
    if not steps or any(sign not in "+-*" for sign, _ in steps):
        raise ValueError(f"no chain (`27 + 18 - 25`): {text[:80]!r}")
    return int(words[0]), steps


def _chain(count: int, max_number: int, max_value: int, rng: random.Random) -> tuple[str, int]:
    """A random chain of `count` numbers, and its value; every value is in 1..max_value."""
    value = rng.randint(1, max_number)
    words = [str(value)]
    while len(words) < 2 * count - 1:
        sign = rng.choice("+-*")
        number = rng.randint(2, SMALL_FACTORS) if sign == "*" else rng.randint(1, max_number)
        if 1 <= (after := _apply(value, (sign, number))) <= max_value:
            words += [sign, str(number)]
            value = after
    return " ".join(words), value


# ---- the study

TASKS: dict[str, dict[str, str]] = {
    "chains": {
        "task.name": "studies.other_tasks:Chains",
        "task.args": "{}",
        "rollout.max_new_tokens": "28",
        "optim.lr": "2e-4",
    },
    "larger Countdown": {
        "task.args": "{numbers: 4, max_number: 12, max_target: 100, problems: 9000}",
        "rollout.max_new_tokens": "36",
    },
}
"""What each task changes of the config, whose own arguments are those of another task. A response of the larger
Countdown has up to 34 tokens."""
FRACTIONS = (0.1, 0.2, 0.3, 0.5, 0.7)
OURS, LOG_PROB = "marginal", "task-tuned, masked + mean log-prob"
BASES = (arms.warm_start, arms.masked, arms.gapg, arms.marginal)


def other_arms(seed: int) -> list[Arm]:
    return [_on_task(base, name, seed) for name in TASKS for base in BASES]


def _on_task(base: Callable[[int], Arm], name: str, seed: int) -> Arm:
    arm = base(seed)
    return replace(arm, label=f"{arm.label} on {name}", overrides={**arm.overrides, **TASKS[name]})


def measure(finished: list[Finished]) -> tuple[Rows, list[Difference]]:
    """A row a task, method and seed; at equal calls the marginal method less each other on its task, and of those that
    stack their score with log-probs and length the same. Greedy."""
    rows: Rows = []
    comparisons: list[Difference] = []
    for name in TASKS:
        table = _table(finished, name)
        for (method, seed), part in table.groupby(["arm", "seed"], sort=False):
            line = curve(part)
            right = {f"at_{c:g}": line.at(c) for c in (0.0, *FRACTIONS, 1.0)}
            rows.append({"task": name, "method": method, "seed": int(seed), "n": len(part), "area": area(line)} | right)
        pairs = [(stacked(OURS) if arm.endswith(stacked("")) else OURS, arm) for arm in table["arm"].unique()]
        for c in FRACTIONS:
            right = at_calls(table, c)
            comparisons += [
                {"a": a, "b": b, "task": name, "cloud_fraction": c, **compare(table, right, a, b)}
                for a, b in pairs
                if a != b
            ]
    return rows, comparisons


def _table(finished: list[Finished], name: str) -> pd.DataFrame:
    """The held-out problems of a task, by method; the mean log-prob routes for the masked task-tuned run."""
    entrants = [Entrant(base(0).label, partial(_on_task, base, name)) for base in BASES]
    runs = [run for run in finished if run.arm.label.endswith(f" on {name}")]
    masked = _on_task(arms.masked, name, 0).label
    table = collect(runs, entrants, {masked: {LOG_PROB: log_prob_router("answer_logprob_mean")}})
    return table[table["split"] == HELDOUT].reset_index(drop=True)


def tables(record: Record) -> list[Table]:
    less = grouped(record["comparisons"], "task", "b")

    def against(rows: list[Row]) -> str:
        found = less.get((rows[0]["task"], rows[0]["method"]), [])
        return "; ".join(f"{d['cloud_fraction']:.0%}: {interval(d)} {verdict(d)}" for d in found)

    columns: list[Column] = [
        ("task", lambda rows: str(rows[0]["task"])),
        ("method", lambda rows: str(rows[0]["method"])),
        ("local alone", seeds_of("at_0")),
        *((f"{c:.0%} called", seeds_of(f"at_{c:g}")) for c in FRACTIONS),
        ("cloud alone", mean_of("at_1")),
        ("area", mean_of("area", "{:.3f}".format)),
        (f"{OURS} less it, points (95%); stacked less stacked", against),
    ]
    title = f"Right together at equal calls, greedy; {covered(len(record['seeds']))}"
    return [table_of(title, grouped(record["rows"], "task", "method").values(), columns)]


def draw(figure: Figure, record: Record) -> None:
    """Accuracy against calls, a panel a task: a line a method, and a dashed one of its stacked score."""
    at = np.array([0.0, *FRACTIONS, 1.0])
    of_task = grouped(record["rows"], "task")
    plain = [row["method"] for row in record["rows"] if not row["method"].endswith(stacked(""))]
    colours = dict(zip(dict.fromkeys(plain), COLOURS, strict=False))
    for axis, ((name,), rows) in zip(panels(figure, len(of_task), width=6.4), of_task.items(), strict=True):
        for (method,), of_method in grouped(rows, "method").items():
            y_SK = np.array([[row[f"at_{c:g}"] for c in at] for row in of_method])
            style = {"color": colours[method.removesuffix(stacked(""))], "label": method}
            axis.plot(at, y_SK.mean(0), "-" if method in colours else "--", linewidth=2, **style)
        axis.set(xlabel="called", ylabel="right together", title=name)
        axis.legend(fontsize=SMALL, loc="lower right")
        percent(axis, x=True, y=True)


OTHER_TASKS = Study(
    "other-tasks",
    "Does the order of the methods hold on other tasks: plain arithmetic, and a Countdown that starts mostly wrong?",
    arms.SEEDS,
    other_arms,
    measure,
    tables,
    draw,
    sets=("task.name", "task.args"),
    notes="Chains are trained at half of the quickstart's learning rate. At the whole of it, on a seed for tuning,"
    " marginal lost its answers: it took to answering before its last step. A decision weight of .25 kept them."
    ' "stacked": a logistic regression of the help margin, the mean and least log-prob and the length, fitted on the'
    " validation problems.",
)
