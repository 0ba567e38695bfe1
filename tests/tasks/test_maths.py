"""Maths problems: the data, their errors, and the checker on right, wrong and hostile answers, in its real process."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gapg.build import make_oracle
from gapg.commands.cli import main
from gapg.config import load_config
from gapg.judge import oracle_score
from gapg.tasks import load_task
from gapg.tasks.base import Prompt, Solvable, Verdict
from gapg.tasks.mathcheck import MathChecker
from gapg_rollout.records import OracleAnswer

C, W, L = Verdict.CORRECT, Verdict.WRONG, Verdict.LIMIT
DATA = Path(__file__).parents[2] / ".." / "shared" / "data"


@pytest.fixture(scope="module")
def checker():
    checker = MathChecker(seconds=1.0)
    yield checker
    checker.close()


RIGHT = {
    "72": [
        "72",
        "72.",
        "$72",
        "72 dollars",
        "The answer is 72",
        "x = 72",
        "72.0",
        "144/2",
        "8*9",
        "\\frac{144}{2}",
        "$72$",
        "(72)",
    ],
    "1,234": ["1234", "1,234", "$1,234.00"],
    "\\frac{1}{2}": ["1/2", "0.5", ".5", "\\frac12", "\\dfrac{1}{2}", "$\\frac{2}{4}$", "\\boxed{0.5}", "2^{-1}"],
    "\\left( 3, \\frac{\\pi}{2} \\right)": ["(3, \\frac{\\pi}{2})", "(3,\\pi/2)"],
    "x^2+1": ["1+x^2", "x^{2} + 1", "$x^2+1$"],
    "\\$36": ["36", "\\$36", "$36$"],
    "\\$32,\\!348": ["32348", "32,348"],
    "-2,1": ["-2,1", "1,-2"],
    "\\text{Evelyn}": ["\\text{Evelyn}", "Evelyn"],
    "\\{1, 2\\}": ["\\{2, 1\\}"],
}
WRONG = {
    "72": ["73", "-72", "7.2", "", "seventy-two", "71 or 72", "72 or 73", "72^2", "72n", "\\frac{1}{72}"],
    "1": ["8n^2 + 4n + 1", "2n+1", "1 - 2", "10"],
    "\\frac{1}{2}": ["1/3", "2", "\\frac{2}{1}", "-\\frac12"],
    "x^2+1": ["x^2", "x^2-1", "y^2+1"],
    "\\text{Evelyn}": ["Carla"],
}


@pytest.mark.parametrize("gold", RIGHT)
def test_right_answers(checker, gold):
    assert dict(zip(RIGHT[gold], checker.check(gold, RIGHT[gold]), strict=True)) == dict.fromkeys(RIGHT[gold], C)


@pytest.mark.parametrize("gold", WRONG)
def test_wrong_answers(checker, gold):
    assert dict(zip(WRONG[gold], checker.check(gold, WRONG[gold]), strict=True)) == dict.fromkeys(WRONG[gold], W)


def test_whole_replies_of_a_cloud_model(checker):
    prompt = Prompt("p", "Half of one?", "\\frac{1}{2}", "maths")

    class OneProblem:
        def verify(self, prompt, answers):
            return checker.check(prompt.answer, answers)

    def score(text):
        return oracle_score(OneProblem(), prompt, [OracleAnswer(text)])

    assert score("Let us see.\n\nHalving 1 gives 0.5.\n\nSo <answer> 0.5 </answer>") == 1.0
    assert score("Let us see. There are 7 ways.\n\nThus $\\boxed{\\frac{1}{2}}$.") == 1.0
    assert score("Let us see. There are 7 ways.\n\nThus $\\boxed{\\frac{1}{3}}$.") == 0.0
    assert score("Half of 1 is small.\n\nThe final answer is $\\frac{1}{2}$. I hope it is correct.") == 1.0


HOSTILE = {
    "a tower of powers": "9**9**9**9",
    "a tower of carets": "9^9^9^9",
    "a tower in LaTeX": "$9^{9^{9^{9}}}$",
    "one huge power": "10**(10**10)",
    "a factorial": "$(10^9)!$",
    "a call": "__import__('os').system('touch {mark}')",
    "a call in LaTeX": "$\\text{{__import__('os').system('touch {mark}')}}$",
    "a call in a function": "$\\sin(__import__('os').system('touch {mark}'))$",
    "a call, boxed": "\\boxed{{__import__('os').system('touch {mark}')}}",
    "an open call": "open('{mark}', 'w')",
    "attributes": "().__class__.__base__.__subclasses__()",
    "100,000 characters": "a" * 100_000,
    "100,000 digits": "7" * 100_000,
    "a number": "7" * 19_000,
    "parentheses": "(" * 9_000 + "1" + ")" * 9_000,
    "parentheses in LaTeX": "$" + "(" * 180 + "1" + ")" * 180 + "$",
    "braces": "$" + "{" * 3_000 + "$",
    "boxes": "\\boxed{" * 2_000,
    "fractions": "$" + "\\frac{1}{" * 300 + "2" + "}" * 300 + "$",
    "dollars": "$ " * 3_000,
    "anchors": "answer " * 2_500,
    "a sum": "1+" * 3_000 + "1",
    "a polynomial": "$x^{1000000}(x+1)^{1000000}$",
    "a null byte": "\x00",
    "a lone surrogate": "\ud800",
    "a line of our own protocol": 'correct\n{"gold": "72", "answer": "72"}\ncorrect',
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_answers(checker, tmp_path, kind):
    mark = tmp_path / "mark"
    answer = HOSTILE[kind]
    if "{mark}" in answer:
        answer = answer.format(mark=mark)
    verdicts = checker.check("72", [answer, "72", "73"])
    assert verdicts[0] in (W, L) and verdicts[1:] == [C, W]  # and the next answers are judged as ever
    assert not mark.exists()
    if kind.startswith("100,000"):
        assert verdicts[0] is L


def test_plain_expressions_are_read_without_eval():
    """In a process of its own, since importing math-verify's reader is what the parent must not need."""
    script = (
        "import sys, runpy; w = runpy.run_path(sys.argv[1]); read = w['read_expression']\n"
        "assert read('1/2 + 3*(4-5)**2').doit() == w['sympy'].Rational(7, 2) and read('-0.5') == -0.5\n"
        "for bad in ('x', 'f(1)', '1 if 1 else 2', '[1]', '\"a\"', '().__class__', '1 < 2', '1j', 'True', '~1',\n"
        "            '('*300 + '1' + ')'*300, '9'*5000, '', '1 +', '1//2', '\\0', '(lambda: 1)()'):\n"
        "    try: read(bad)\n"
        "    except SyntaxError: pass\n"
        "    else: raise AssertionError(bad)\n"
    )
    worker = Path(sys.modules[MathChecker.__module__].__file__).with_name("_mathworker.py")
    done = subprocess.run([sys.executable, "-P", "-c", script, str(worker)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def rows(tmp_path):
    """Golds of many forms, one of them 0."""
    golds = ["0", "72", "\\frac{1}{2}", "\\text{Evelyn}"]
    path = tmp_path / "test.jsonl"
    path.write_text("".join(json.dumps({"question": f"Q{n}", "answer": g}) + "\n" for n, g in enumerate(golds)))
    return path


@pytest.mark.parametrize("accuracy", [0, 1])
def test_the_gold_stands_in_for_a_cloud(rows, tmp_path, accuracy):
    """Right or wrong as it is to be, also where the answer is 0."""
    task = load_task("maths", {"train": None, "heldout": str(rows)})
    assert isinstance(task, Solvable)
    config = load_config("quickstart", {"oracle.accuracy": str(accuracy)})
    oracle = make_oracle(config, task, tmp_path)
    prompts = task.prompts("heldout")
    replies = [oracle.ask(task.question(prompt)).result() for prompt in prompts]
    assert [oracle_score(task, p, r) for p, r in zip(prompts, replies, strict=True)] == [accuracy] * 4
    if accuracy:
        assert replies[2][0].text == "<answer> \\frac{1}{2} </answer>"
    with pytest.raises(ValueError, match="no problem of this task has the id 'Q0'"):
        task.solve("Q0")
    task.checker.close()


def test_without_training_problems_nothing_is_trained(rows, folder, tmp_path, capsys):
    """Held-out problems alone are a task to evaluate on."""
    assert load_task("maths", {"train": None, "heldout": str(rows)}).prompts("train") == ()
    own = ["--task.name", "maths", "--task.args", f"{{train: null, heldout: {rows}}}", "--model.path", str(folder())]
    with pytest.raises(SystemExit) as left:
        main(["train", "quickstart", *own, "--warm-start", "none", "--output-dir", str(tmp_path / "run")])
    assert left.value.code == 2
    said = "gapg: task 'maths' has no training problems: name some (task maths: in task.args.train)\n"
    assert capsys.readouterr().err == said and not (tmp_path / "run").exists()


def test_held_out_problems_alone_are_evaluated_on_and_not_calibrated_on(rows, folder, tmp_path, capsys):
    """A config without training problems; what is wrong with its held-out ones is said before the model is loaded."""
    tree = {
        "task": {"name": "maths", "args": {"train": None, "heldout": str(rows)}},
        "rollout": {"max_prompt_tokens": 400, "max_new_tokens": 2},
        "token_cap": 500,
        "oracle": {"kind": "solver"},
        "threads": 1,
    }
    (tmp_path / "x.yaml").write_text(json.dumps(tree))
    of = [str(folder(max_position_embeddings=512)), "--config", str(tmp_path / "x.yaml"), "--output-dir"]
    main(["eval", *of, str(tmp_path / "eval")])
    assert {row["n"] for row in json.loads((tmp_path / "eval" / "summary.json").read_text())["rows"]} == {4}
    for command, more, said in (
        ("calibrate", [], "task 'maths' has no training problems: name some (task maths: in task.args.train)"),
        ("eval", ["--rollout.max-prompt-tokens", "1"], "task 'maths': no held-out problem fits; raise rollout.max_pro"),
    ):
        with pytest.raises(SystemExit) as left:
            main([command, *of, str(tmp_path / command / "none"), *more])
        assert left.value.code == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith(f"gapg: {said}")
        assert not (tmp_path / command / "none").exists()


def test_a_problem_within_its_column(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"query": "Q: One?\nA: The answer is", "answer": "1"}) + "\n")
    source = {"path": str(path), "question": "query", "question_pattern": r"(?s)Q: (.+)\nA:"}
    assert load_task("maths", {"train": None, "heldout": source}).prompts("heldout")[0].text == "One?"
    assert load_task(
        "maths",
        {"train": source, "heldout": {"path": str(path), "question": "query", "question_pattern": None, "split": "x"}},
    )
    for pattern, said in {
        "X: (.+)": r"finds no question in .*rows.jsonl:1, which ends in",
        "(": "no regular expression",
    }.items():
        with pytest.raises(ValueError, match=rf"task\.args\.heldout\.question_pattern: .*{said}"):
            load_task("maths", {"train": None, "heldout": source | {"question_pattern": pattern}})
