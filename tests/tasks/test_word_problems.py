"""Word problems: every template, the problems drawn from them, their demonstrations, and what is refused."""

import ast
import operator
import random
import re
from collections import Counter
from collections.abc import Iterator
from string import Formatter

import pytest
from transformers import PreTrainedTokenizerFast

from gapg.config import load_config
from gapg.judge import parse
from gapg.tasks import load_task
from gapg.tasks.base import HELP_PHRASE, Demonstrated, Solvable, Verdict
from gapg.tasks.word_problems import LARGEST, PEOPLE, Template, WordProblems, _fill, _parse, _Problem, templates

OWN = {*PEOPLE[0], "other", "x"}
"""Slots that fill themselves."""


@pytest.fixture(scope="module")
def task() -> Iterator[WordProblems]:
    made = WordProblems(problems=1500, heldout=300)
    yield made
    made.checker.close()


SIGNS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def value_of(node: ast.AST) -> float:
    """In floats, of what Python reads an expression as."""
    if isinstance(node, ast.Constant):
        return float(node.value)  # type: ignore[arg-type]
    assert isinstance(node, ast.BinOp)
    return float(SIGNS[type(node.op)](value_of(node.left), value_of(node.right)))


def slots_of(*texts: str) -> set[str]:
    return {slot for text in texts for _, slot, _, _ in Formatter().parse(text) if slot}


def test_there_are_a_hundred_templates_of_two_to_four_steps() -> None:
    found = templates()
    assert len(found) == 100 == len({t.story for t in found})
    assert Counter(len(t.steps) for t in found) == {2: 40, 3: 36, 4: 24}


@pytest.mark.parametrize("template", templates(), ids=lambda t: t.name)
def test_a_template_needs_all_that_it_says_and_nothing_of_its_aside(template: Template) -> None:
    expressions, results = zip(*map(_parse, template.steps), strict=True)
    given, worked = set(template.where), slots_of(*expressions)
    assert slots_of(template.story, template.question) <= given | (OWN - {"x"})
    assert "x" in slots_of(template.aside) <= given | OWN and "x" not in worked
    assert not {*results} & (given | OWN) and len({*results}) == len(results)
    for i, expression in enumerate(expressions):
        assert slots_of(expression) <= {*given, *results[:i]}, "a step computes from what is known"
        assert template.steps[i].count("=") == 1
    # every result but the answer is needed, and so is every number
    assert {*results[:-1]} <= worked
    rng, valid, keys = random.Random(template.name), 0, set()
    for i in range(200):
        problem = _Problem(template, _fill(template, 1.0, rng), template.places[i % len(template.places)])
        lines, answer = problem.worked()
        valid += answer is not None
        if answer is None:
            continue
        keys.add(problem.key)
        numbers = {slot: value for slot, value in problem.slots.items() if isinstance(value, int) and slot != "x"}
        assert numbers.keys() <= worked, "a number is given that is not needed"
        values = dict(problem.slots)
        for expression, result, line in zip(expressions, results, lines, strict=True):
            # by hand, in floats: what the exact evaluator found
            written = expression.format(**values)
            assert re.fullmatch(r"[0-9+\-*/() ]+", written)
            value = value_of(ast.parse(written, mode="eval").body)
            values[result] = round(value)
            assert abs(value - round(value)) < 1e-9 and 1 <= value <= LARGEST
            assert f"{written} = {round(value)}" in line
        assert answer == values[results[-1]]
        assert problem.text.endswith("?") and "{" not in problem.text and str(problem.slots["x"]) in problem.text
    assert valid >= 60 and len(keys) >= 0.4 * valid


def test_problems_are_held_out_by_template_and_by_numbers(task: WordProblems) -> None:
    assert isinstance(task, Solvable) and isinstance(task, Demonstrated)
    train, heldout = task.prompts("train"), task.prompts("heldout")
    assert (len(train), len(heldout)) == (1500, 300) and len({p.id for p in (*train, *heldout)}) == 1800
    kind_of = {p.id: task._problems[p.id].template.name for p in (*train, *heldout)}
    kinds = {where: {kind_of[p.id] for p in heldout if p.id.startswith(where)} for where in ("template/", "numbers/")}
    trained = {kind_of[p.id] for p in train}
    assert len(trained) == 81 and not kinds["template/"] & trained and kinds["numbers/"] == trained
    assert sum(p.id.startswith("template/") for p in heldout) == 150
    told = Counter(
        (kind_of[p.id], *(slots[s] for s in sorted(task._problems[p.id].template.where) if isinstance(slots[s], int)))
        for p in (*train, *heldout)
        for slots in [task._problems[p.id].slots]
    )
    assert max(told.values()) == 1, "no two problems have the same numbers in the same template"
    new = Counter(len(t.steps) for t in templates() if t.name not in trained)
    assert new == {2: 8, 3: 7, 4: 4}, "a fifth of each number of steps"
    assert all(p.id.split("/")[1] == kind_of[p.id] for p in (*train, *heldout))
    # any first part is a fair sample
    assert 20 < sum(p.id.startswith("template/") for p in heldout[:80]) < 60
    again, other = (WordProblems(problems=1500, heldout=300, seed=s) for s in (0, 1))
    assert again.prompts("heldout") == heldout and again.demonstrations(3) == task.demonstrations(3)
    assert not {p.id for p in other.prompts("heldout")} & {p.id for p in heldout}


@pytest.mark.parametrize("by, starts", [("template", {"template"}), ("numbers", {"numbers"})])
def test_held_out_by_one_of_them(by: str, starts: set[str]) -> None:
    task = load_task("word-problems", {"problems": 1500, "heldout": 60, "held_out_by": by})
    heldout = task.prompts("heldout")
    assert len(heldout) == 60 and {p.id.partition("/")[0] for p in heldout} == starts
    assert isinstance(task, WordProblems)
    drawn = {p.template.name for p in task._problems.values()}
    trained = {task._problems[p.id].template.name for p in task.prompts("train")}
    assert len(trained) == (81 if by == "template" else 100) and len(drawn) > 95


def test_small_numbers_are_held_out_of_every_template() -> None:
    """Where training took first, nothing was left of templates with few numbers, and held out were others alone."""
    task = load_task("word-problems", {"problems": 1500, "heldout": 400, "steps": [2, 2], "size": 0.3})
    assert isinstance(task, WordProblems)
    train, held = (
        Counter(p.id.split("/")[1] for p in task.prompts(split) if not p.id.startswith("template/"))
        for split in ("train", "heldout")
    )
    assert train.keys() == held.keys() and len(train) == 32 and held.total() == 200
    for name, n in held.items():
        assert abs(n - 200 * (n + train[name]) / 1700) <= 1, "as often as in training"


def test_the_solver_and_the_verifier_agree_on_every_template(task: WordProblems) -> None:
    of_template = {task._problems[p.id].template.name: p for p in (*task.prompts("train"), *task.prompts("heldout"))}
    assert len(of_template) == 100
    task.start_step()
    for prompt in of_template.values():
        solved = parse(task.solve(prompt.id)).answer
        answers = [solved or "", str(int(prompt.answer) + 1)]
        assert task.verify(prompt, answers) == [Verdict.CORRECT, Verdict.WRONG]
    with pytest.raises(KeyError):
        task.solve("train/none")


def test_difficulty_is_a_setting() -> None:
    def of(**args: object) -> WordProblems:
        return load_task("word-problems", {"problems": 600, "heldout": 100, **args})  # type: ignore[return-value]

    easy, hard = of(steps=[2, 2], asides=0.0), of(steps=[4, 4], size=2.0, asides=1.0)
    steps = [{len(t._problems[p.id].template.steps) for p in t.prompts("train")} for t in (easy, hard)]
    assert steps == [{2}, {4}]
    asides = [sum(p.aside is not None for p in t._problems.values()) for t in (easy, hard, of(asides=0.3))]
    assert asides[0] == 0 and asides[1] == 700 and 150 < asides[2] < 270
    places = {len(p.template.sentences) - p.aside for p in hard._problems.values() if p.aside is not None}
    assert {0, 1} <= places, "last, and elsewhere"
    usual, wide = (
        sum(int(n) for p in t.prompts("train") for n in re.findall(r"\d+", p.text)) for t in (of(), of(size=3.0))
    )
    assert wide > 1.5 * usual


def test_demonstrations_call_after_what_went_wrong(task: WordProblems) -> None:
    shown = task.demonstrations(5)
    assert [d.prompt for d in shown] == list(task.prompts("train"))
    calls: dict[bool, list[bool]] = {True: [], False: []}
    for demo in shown:
        *steps, ending = demo.response.split("\n")
        found = parse(demo.response)
        right = steps == task.solve(demo.prompt.id).split("\n")[:-1]
        assert found.kind == ("help" if ending == HELP_PHRASE else "answer")
        if found.answer is not None:
            # honest: the answer is the last step's
            assert steps[-1].rpartition(" = ")[2].startswith(found.answer)
            assert (found.answer == demo.prompt.answer) == right
        assert right or steps != task.solve(demo.prompt.id).split("\n")[: len(steps)], "what is wrong is written down"
        calls[right].append(ending == HELP_PHRASE)
    assert sum(calls[True]) / len(calls[True]) == pytest.approx(0.03, abs=0.02)
    assert sum(calls[False]) / len(calls[False]) == pytest.approx(0.72, abs=0.08)
    assert len(calls[False]) / len(shown) == pytest.approx(0.20, abs=0.04)
    assert shown == task.demonstrations(5) != task.demonstrations(6)


def test_a_prompt_tells_the_problem_and_both_endings(
    task: WordProblems, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    prompt = task.prompts("heldout")[0]
    text = byte_tokenizer.decode(task.render(prompt, byte_tokenizer))
    assert prompt.text in text and HELP_PHRASE in text and "<answer>" in text
    (message,) = task.question(prompt).messages
    assert prompt.text in message["content"] and HELP_PHRASE not in message["content"]


@pytest.mark.parametrize(
    "args, said",
    [
        ({"steps": [1, 3]}, "steps: must be the fewest and the most"),
        ({"steps": 3}, "steps: must be the fewest and the most"),
        ({"steps": ["a", "b"]}, "steps: must be the fewest and the most"),
        ({"problems": 1}, "problems: must be a whole number of 2 to 20000"),
        ({"heldout": 2.5}, "heldout: must be a whole number of 1 to 20000"),
        ({"size": 0}, "size: must be a number above 0"),
        ({"size": "big"}, "size: must be a number above 0"),
        ({"asides": 2}, "asides: must be a fraction"),
        ({"held_out_by": "chance"}, "held_out_by: must be 'template', 'numbers' or 'both'"),
        ({"steps": [2.0, 3]}, "steps: must be the fewest and the most"),
        ({"size": 3.5}, "size: must be a number above 0, at most 3"),
        ({"seed": None}, "seed: must be a whole number"),
        ({"seed": [1]}, "seed: must be a whole number"),
        ({"problems": 3_000_000}, "problems: must be a whole number of 2 to 20000"),
        ({"problems": 20_000, "size": 0.01, "steps": [2, 2]}, "^problems and heldout: 20500 are wanted, and only"),
        ({"problems": 300, "heldout": 8000, "steps": [2, 2], "held_out_by": "template"}, "^heldout: 8000 are wanted"),
        (
            {"problems": 60, "heldout": 2000, "size": 0.01, "steps": [2, 2]},
            "^problems and heldout: 1060 are wanted, and only",
        ),
    ],
)
def test_settings_that_leave_no_problems_are_refused(args: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        load_task("word-problems", args)


def test_the_preset_is_of_this_task() -> None:
    config = load_config("arithmetic-smollm2")
    assert isinstance(load_task(config.task.name, config.task.args), WordProblems)
