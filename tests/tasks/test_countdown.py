"""Countdown: the problems, the demonstrations, the tokenizer, and a verifier that model output cannot fool or run."""

import ast
import hashlib
import operator
import random
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from gapg.judge import parse
from gapg.tasks.arithmetic import TooLarge, evaluate, traces
from gapg.tasks.base import HELP_PHRASE, STOP, Demonstrated, Prompt, Solvable, Tokenized, Verdict
from gapg.tasks.countdown import Countdown, computed


@pytest.fixture(scope="module")
def task() -> Countdown:
    return Countdown()


def all_prompts(task):
    return [*task.prompts("train"), *task.prompts("heldout")]


def test_the_default_problems(task):
    train, heldout = task.prompts("train"), task.prompts("heldout")
    assert (len(train), len(heldout)) == (7454, 2484)
    assert len({p.id for p in all_prompts(task)}) == 9938
    assert isinstance(task, Solvable) and isinstance(task, Demonstrated) and isinstance(task, Tokenized)
    for prompt in all_prompts(task):
        numbers, target = prompt.text.removesuffix(" :").split(" = ")
        a, b, c = map(int, numbers.split())
        assert 1 <= a <= b <= c <= 20 and 1 <= int(target) <= 60


def test_deterministic_and_split_by_seed(task):
    again, other = Countdown(), Countdown(seed=1)
    assert again.prompts("train") == task.prompts("train")
    assert {p.id for p in all_prompts(other)} == {p.id for p in all_prompts(task)}
    assert set(other.prompts("heldout")) != set(task.prompts("heldout"))


def numbers_of(prompts):
    return {p.id.partition(" = ")[0] for p in prompts}


@pytest.mark.parametrize("more", [{"max_number": 9}, {"numbers": [3, 4], "problems": 300, "max_number": 12}])
def test_split_by_numbers(more):
    """No numbers on both sides, which between problems nearly all are; the same problems; the part asked for."""
    apart, mixed = Countdown(split="numbers", seed=9, **more), Countdown(seed=9, **more)
    assert not numbers_of(apart.prompts("train")) & numbers_of(apart.prompts("heldout"))
    assert numbers_of(mixed.prompts("train")) & numbers_of(mixed.prompts("heldout"))
    assert {p.id for p in all_prompts(apart)} == {p.id for p in all_prompts(mixed)}
    n, largest = len(mixed.prompts("heldout")), 40
    assert n <= len(apart.prompts("heldout")) < n + largest
    # shuffled as the problems are, so that any first part of a split is a fair sample of it
    order = [p for split in ("heldout", "train") for p in mixed.prompts(split)]
    for split in ("train", "heldout"):
        mine = set(apart.prompts(split))
        assert [p for p in order if p in mine] == list(apart.prompts(split))
    assert Countdown(split="numbers", seed=9, **more).prompts("heldout") == apart.prompts("heldout")
    assert set(Countdown(split="numbers", seed=8, **more).prompts("heldout")) != set(apart.prompts("heldout"))


def test_the_default_split_stays(task):
    """By what it was before there was another: runs are named by their settings, and resumed on these problems."""
    text = "\n".join(p.id for split in ("train", "heldout") for p in task.prompts(split))
    assert (
        hashlib.sha256(text.encode()).hexdigest() == "50ce556f28a9518d5a7a67b83da1e8fcfb1125c663dc525503cf775d8db9fca6"
    )
    assert Countdown(split="problem").prompts("heldout") == task.prompts("heldout")


def test_a_split_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="split: must be 'problem' or 'numbers', not 'number'"):
        Countdown(split="number")
    with pytest.raises(ValueError, match="too few to hold out"):
        Countdown(max_number=1, max_target=4, heldout=0.5, split="numbers")


def test_what_an_answer_computes():
    assert computed("8 * 3 + 15") == computed("15+(3 × 8) = 39") == (39, (3, 8, 15))
    assert computed("13 * 3") == (39, (3, 13)) and computed("1 / 2") == (Fraction(1, 2), (1, 2))
    assert computed("8 *") is computed("") is computed("1 / 0") is computed("(" * 1000) is None


def test_the_gold_and_the_solver_are_right(task):
    for prompt in all_prompts(task):
        solved = parse(task.solve(prompt.id))
        assert solved.kind == "answer" and solved.answer is not None
        assert task.verify(prompt, [prompt.answer, solved.answer]) == [Verdict.CORRECT] * 2


def test_demonstrations_are_what_they_claim(task):
    demonstrations = task.demonstrations(3)
    assert [d.prompt for d in demonstrations] == list(task.prompts("train"))
    kinds = Counter()
    for d in demonstrations:
        ending = parse(d.response)
        assert ending.well_formed
        steps = d.response.split(" <")[0].split(" ; ")
        assert len(steps) == 2
        for step in steps:  # honest: each step computes what it says
            left, value = step.split(" = ")
            assert evaluate(left)[0] == int(value)
        target = int(d.prompt.id.split(" = ")[1])
        right = int(steps[-1].split(" = ")[1]) == target
        if ending.kind == "answer":
            assert task.verify(d.prompt, [ending.answer]) == [Verdict.CORRECT if right else Verdict.WRONG]
        kinds[right, ending.kind] += 1
    n = len(demonstrations)
    rights = kinds[True, "answer"] + kinds[True, "help"]
    assert rights / n == pytest.approx(0.80, abs=0.02)
    assert kinds[True, "help"] / rights == pytest.approx(0.03, abs=0.01)
    assert kinds[False, "help"] / (n - rights) == pytest.approx(0.70, abs=0.05)


def test_demonstrations_without_help_answer_the_same_traces(task):
    shown, hidden = task.demonstrations(3), Countdown(help_shown=False).demonstrations(3)
    assert [d.response.split(" <")[0] for d in shown] == [d.response.split(" <")[0] for d in hidden]
    assert all(parse(d.response).kind == "answer" for d in hidden)
    kept = [(a, b) for a, b in zip(shown, hidden, strict=True) if parse(a.response).kind == "answer"]
    assert all(a == b for a, b in kept) and len(kept) < len(shown)


def test_demonstrations_are_fresh_for_each_seed(task):
    assert task.demonstrations(0) == task.demonstrations(0)
    differ = sum(a != b for a, b in zip(task.demonstrations(0), task.demonstrations(1), strict=True))
    assert differ > 1000


def test_tokenizer(task, tmp_path):
    tokenizer = task.tokenizer()
    assert len(tokenizer) == tokenizer.vocab_size == 114
    assert tokenizer.pad_token_id is not None and tokenizer.eos_token_id is not None
    assert len(tokenizer.encode(HELP_PHRASE)) == 1
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for d in task.demonstrations(0)[:500]:
        ids = tokenizer.encode(d.response)
        assert len(ids) <= 22 and tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == d.response
        assert loaded.encode(d.response) == ids and loaded.decode(ids) == d.response
        assert d.response.endswith(STOP)
        rendered = task.render(d.prompt, loaded)
        assert loaded.decode(rendered) == d.prompt.text and tokenizer.unk_token_id not in rendered


def test_every_value_of_every_trace_is_in_the_vocabulary(task):
    vocabulary = task.tokenizer().get_vocab()
    for trace in traces((7, 12, 20), 100):
        assert all(word in vocabulary for word in f"{trace.steps} {trace.expression}".split())


WRONG = [
    "( 8 * 3 ) + 16",  # not one of the numbers
    "8 * 3",  # one is missing
    "8 * 3 + 15 + 15 - 15",  # one is used too often
    "8 + 3 + 15",  # another value
    "39",
    "",
    "8 * 3 + 15 = 40",
    "8 * 3 + 15 = 39 = 39",
    "-3 * -8 + 15",
    "8 ** 3",
    "8 * 3 + + 15",
    "8 * (3 + 15",
    "8 * 3) + 15",
    "8 3 15",
    "8*3+15;",
    "8 * 3 + 15.0",
    "8 / (3 - 3) + 15",
    "83 + 15",
    "__import__('os').system('true')",
    "8 * 3 + 15 if True else 0",
    "٨ * 3 + 15",  # a digit to Python, not to this verifier
    "8 * 3 + 15 \x00",
    "９",
]


def test_answers(task):
    prompt = next(p for p in all_prompts(task) if p.id == "3 8 15 = 39")
    right = ["( 8 * 3 ) + 15", "15+3*8", "15 + (8*3)", "((8)*(3))+15", "8 × 3 + 15", "8*3+15 = 39", " 8*3+15\n"]
    assert task.verify(prompt, right) == [Verdict.CORRECT] * len(right)
    assert task.verify(prompt, WRONG) == [Verdict.WRONG] * len(WRONG)


def test_division_is_exact(task):
    prompt = Prompt("2 3 6 = 4", "2 3 6 = 4 :", "", "countdown")  # solvable by division only, so not in the set
    assert task.verify(prompt, ["6 / 3 * 2", "2 / 3 * 6", "2 * 6 / 3", "6 / ( 3 / 2 )"]) == [Verdict.CORRECT] * 4


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "hostile",
    [
        "(" * 100_000,
        "1+" * 50_000 + "1",
        "(" * 65,
        "9" * 100_000,
        " " * 5_000,
        "8*3+15" + " + 0" * 40,
        "((" * 30 + "1" * 9,
    ],
)
def test_hostile_answers_end_and_are_never_right(task, hostile):
    assert task.verify(task.prompts("train")[0], [hostile])[0] is not Verdict.CORRECT


def test_over_the_limit_is_told_apart(task):
    assert task.verify(task.prompts("train")[0], ["(" * 1000, "1 + " * 50 + "1", "1 +"]) == [
        Verdict.LIMIT,
        Verdict.LIMIT,
        Verdict.WRONG,
    ]
    with pytest.raises(TooLarge):
        evaluate("1+" * 40 + "1")


expressions = st.recursive(
    st.integers(0, 99).map(str),
    lambda inner: st.tuples(inner, st.sampled_from("+-*/"), inner, st.booleans()).map(
        lambda t: f"({t[0]} {t[1]} {t[2]})" if t[3] else f"{t[0]} {t[1]} {t[2]}"
    ),
    max_leaves=12,
)
_REFERENCE = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def reference(node: ast.expr) -> Fraction:
    """Python's own grammar over exact fractions, for expressions that hypothesis wrote."""
    if isinstance(node, ast.Constant):
        return Fraction(node.value)
    assert isinstance(node, ast.BinOp)
    return _REFERENCE[type(node.op)](reference(node.left), reference(node.right))


@given(expressions)
@settings(max_examples=400, deadline=None)
def test_evaluator_against_pythons_grammar(text):
    tree = ast.parse(text, mode="eval")
    numbers = sorted(n.value for n in ast.walk(tree) if isinstance(n, ast.Constant))
    try:
        expected = reference(tree.body)
    except ZeroDivisionError:
        with pytest.raises(ValueError, match="division by zero"):
            evaluate(text)
        return
    assert evaluate(text) == (expected, numbers)


@given(st.text(alphabet="0123456789+-*/() =._x\n", max_size=80))
@settings(max_examples=400, deadline=None)
def test_evaluator_never_fails_otherwise(text):
    try:
        value, numbers = evaluate(text)
    except ValueError:
        return
    assert isinstance(value, Fraction) and numbers == sorted(numbers)


@given(st.lists(st.integers(1, 20), min_size=2, max_size=4), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_traces_compute_what_they_say(numbers, pick):
    known = traces(numbers, 100)
    if known:
        trace = random.Random(pick).choice(known)
        assert evaluate(trace.expression) == (trace.value, sorted(numbers))
        assert len(set(known)) == len(known)


class TestChat:
    """The variant for instruct models: larger problems, drawn at random, and words around them."""

    def test_problems(self):
        task = Countdown(numbers=[3, 4], max_number=99, max_target=999, max_value=9999, problems=400, style="chat")
        assert len(all_prompts(task)) == len({p.id for p in all_prompts(task)}) == 400
        assert {len(p.id.split(" = ")[0].split()) for p in all_prompts(task)} == {3, 4}
        assert all(task.verify(p, [p.answer]) == [Verdict.CORRECT] for p in all_prompts(task))
        four = next(p for p in task.prompts("train") if p.id.count(" ") == 5)
        assert task.verify(four, [parse(task.solve(four.id)).answer]) == [Verdict.CORRECT]

    def test_both_endings_are_explained(self, byte_tokenizer: PreTrainedTokenizerFast):
        task = Countdown(style="chat")
        prompt = task.prompts("train")[0]
        plain = byte_tokenizer.decode(task.render(prompt, byte_tokenizer))
        assert HELP_PHRASE in plain and "<answer>" in plain and prompt.id.split(" = ")[1] in plain
        byte_tokenizer.chat_template = (
            "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
            "{% if add_generation_prompt %}[assistant]{% endif %}"
        )
        chat = byte_tokenizer.decode(task.render(prompt, byte_tokenizer))
        assert chat.startswith("[user]Using") and chat.endswith("[assistant]") and HELP_PHRASE in chat

    def test_the_cloud_is_not_offered_help(self, task):
        question = task.question(task.prompts("train")[0])
        assert HELP_PHRASE not in question.messages[0]["content"] and "<answer>" in question.messages[0]["content"]
        assert question.id == task.prompts("train")[0].id


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"numbers": 1}, "numbers: each count"),
        ({"numbers": []}, "numbers: each count"),
        ({"numbers": 4}, "problems: set how many"),
        ({"style": "prose"}, "style: must be"),
        ({"heldout": 1.0}, "heldout: must be"),
        ({"max_number": 1, "max_target": 3, "problems": 50}, "problems: found only"),
        ({"max_number": 1, "max_target": 1}, "too few"),
    ],
)
def test_bad_settings(args, message):
    with pytest.raises(ValueError, match=message):
        Countdown(**args)


def test_no_such_problem(task):
    with pytest.raises(ValueError, match="no way to make 59"):
        task.solve("1 1 1 = 59")
    with pytest.raises(ValueError, match="no Countdown problem"):
        task.solve("what is love")
