"""Maths problems: the data, their errors, and the checker on right, wrong and hostile answers, in its real process."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from gapg.judge import oracle_score, parse
from gapg.rollout.records import OracleAnswer
from gapg.tasks import load_task
from gapg.tasks.base import HELP_PHRASE, Prompt, Verdict
from gapg.tasks.mathcheck import MathChecker
from gapg.tasks.maths import Maths

C, W, L = Verdict.CORRECT, Verdict.WRONG, Verdict.LIMIT
DATA = Path(__file__).parents[2] / ".." / "shared" / "data"

GSM = [
    {
        "question": f"Tom has {n} apples and buys {n}. How many?",
        "answer": f"{n}+{n}=<<{n}+{n}={2 * n}>>{2 * n}\n#### {2 * n}",
    }
    for n in range(20, 30)
]
COMPETITION = [
    {"problem": "Half of one?", "solution": "It is $\\boxed{\\frac{1}{2}}$.", "answer": "\\frac{1}{2}"},
    {"problem": "Polar (0,3)?", "solution": "So \\boxed{\\left( 3, \\frac{\\pi}{2} \\right)}", "answer": ""},
    {"problem": "Solve.", "solution": "First \\boxed{1}, no, \\boxed{x^{2}+1}.", "answer": "x^2+1"},
]
PATTERN = "#### (.+)"


@pytest.fixture(scope="module")
def checker():
    checker = MathChecker(seconds=1.0)
    yield checker
    checker.close()


@pytest.fixture
def folder(tmp_path):
    for name, rows in (("train", GSM[:7]), ("test", GSM[7:]), ("maths", COMPETITION)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return tmp_path


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


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_answers(checker, tmp_path, kind):
    mark = tmp_path / "mark"
    answer = HOSTILE[kind]
    if "{mark}" in answer:
        answer = answer.format(mark=mark)
    start = time.monotonic()
    verdicts = checker.check("72", [answer, "72", "73"])
    assert verdicts[0] in (W, L) and verdicts[1:] == [C, W]  # and the next answers are judged as ever
    assert time.monotonic() - start < 10  # two deadlines and a new worker
    assert not mark.exists()
    if kind.startswith("100,000"):
        assert verdicts[0] is L


def test_time_and_memory_limits_are_told_apart_from_wrong():
    checker = MathChecker(seconds=0.5)
    assert checker.check("72", ["$9^{9^{9^{9}}}$", "$(10^9)!$"]) == [L, L]
    checker.close()


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


def test_the_worker_is_replaced_when_killed():
    checker = MathChecker()
    assert checker.pid is None  # nothing runs before it is needed
    assert checker.check("72", ["72"]) == [C]
    first = checker.pid
    os.kill(first, signal.SIGKILL)
    assert checker.check("72", ["72", "73"]) == [C, W]
    assert checker.pid not in (first, None)
    checker.close()
    checker.close()
    assert checker.pid is None and checker.check("72", ["72"]) == [C]
    checker.close()


def test_a_stopped_worker_is_a_limit_and_is_replaced():
    checker = MathChecker(seconds=0.5)
    checker.check("72", ["72"])
    os.kill(checker.pid, signal.SIGSTOP)  # as if hung where no alarm reaches it
    assert checker.check("72", ["72", "73"]) == [L, W]
    checker.close()


def test_a_worker_killed_while_it_works():
    checker = MathChecker(seconds=3.0)
    checker.check("72", ["72"])
    killer = threading.Timer(0.5, os.kill, (checker.pid, signal.SIGKILL))
    killer.start()
    assert checker.check("72", ["$9^{9^{9^{9}}}$", "72"]) == [L, C]
    killer.join()
    checker.close()


def test_the_worker_sees_no_secrets(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    checker = MathChecker()
    checker.check("72", ["72"])
    assert b"sk-secret" not in Path(f"/proc/{checker.pid}/environ").read_bytes()
    checker.close()


def test_threads_share_a_checker(checker):
    found = {}

    def work(n):
        found[n] = checker.check(str(n), [str(n), str(n + 1)])

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {n: [C, W] for n in range(8)}


def test_gsm8k_rows(folder):
    task = load_task("maths", {"train": {"path": str(folder), "answer_pattern": PATTERN}, "heldout": {}})
    assert isinstance(task, Maths)
    assert [len(task.prompts("train")), len(task.prompts("heldout"))] == [7, 3]
    prompt = task.prompts("train")[0]
    assert (prompt.text, prompt.answer, prompt.task) == (GSM[0]["question"], "40", "maths")
    assert task.verify(prompt, ["40", "41", "$40", "40 apples"]) == [C, W, C, C]
    again = load_task("maths", {"train": {"path": str(folder), "answer_pattern": PATTERN, "limit": 2}, "heldout": {}})
    assert again.prompts("train") == task.prompts("train")[:2]


def test_competition_rows(folder):
    train = {"path": str(folder / "maths.jsonl"), "question": "problem", "answer": "solution"}
    heldout = {
        "path": str(folder / "test.jsonl"),
        "question": "question",
        "answer": "answer",
        "answer_pattern": PATTERN,
    }
    task = Maths(train, heldout)
    golds = [p.answer for p in task.prompts("train")]
    assert golds == ["\\frac{1}{2}", "\\left( 3, \\frac{\\pi}{2} \\right)", "x^{2}+1"]
    assert all(task.verify(p, [p.answer, "41"]) == [C, W] for p in task.prompts("train"))


def test_prompts_explain_both_endings_and_the_cloud_only_one(folder, byte_tokenizer):
    task = Maths({"path": str(folder), "answer_pattern": PATTERN}, {})
    prompt = task.prompts("train")[0]
    byte_tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    text = byte_tokenizer.decode(task.render(prompt, byte_tokenizer))
    assert text.startswith(f"<user>{prompt.text}") and HELP_PHRASE in text and "<answer>" in text
    content = task.question(prompt).messages[0]["content"]
    assert content.startswith(prompt.text) and "<answer>" in content and HELP_PHRASE not in content


def test_what_is_held_out_is_not_trained_on(folder, caplog):
    shout = {**GSM[7], "question": GSM[7]["question"].upper() + "  "}
    (folder / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [*GSM[:3], GSM[0], shout]))
    task = Maths({"path": str(folder), "answer_pattern": PATTERN}, {})
    assert len(task.prompts("train")) == 3
    assert not {p.id for p in task.prompts("train")} & {p.id for p in task.prompts("heldout")}
    assert "1 training problems are also held out" in caplog.text


@pytest.mark.parametrize(
    ("train", "heldout", "message"),
    [
        ({"path": "{folder}"}, {"path": "{folder}"}, None),
        ({"path": "{folder}/none.jsonl"}, {}, r"train\.path: .*none\.jsonl does not exist"),
        (
            {"path": "{folder}", "split": "dev"},
            {},
            r"train\.split: .*splits in that folder: broken, list, maths, test, train",
        ),
        ({"path": "{folder}", "question": "problem"}, {}, r"no column 'problem'; it has question, answer; set task"),
        (
            {"path": "{folder}"},
            {"answer": "gold"},
            r"heldout\.answer: row 1 .* no column 'gold'; it has question, answer",
        ),
        ({"path": "{folder}", "answer_pattern": "= (.+)$$$"}, {}, r"answer_pattern: .* matches nothing in row 1"),
        ({"path": "{folder}", "answer_pattern": "####"}, {}, r"answer_pattern: needs a group"),
        ({"path": "{folder}", "answer_pattern": "("}, {}, r"answer_pattern: no regular expression"),
        ({"path": "{folder}"}, {"split": "train"}, r"heldout: is the same data"),
        ({"path": "{folder}", "columns": "x"}, {}, r"train\.columns: unknown key; known are path, split"),
        ({}, {}, r"train\.path: required"),
        ({"path": "{folder}/test.jsonl"}, {"path": "{folder}"}, r"train: every problem is also in"),
        ({"path": "{folder}", "limit": 0}, {}, r"has no rows"),
        (
            {"path": "{folder}/maths.jsonl", "question": "problem"},
            {"path": "{folder}"},
            r"row 2 .* has nothing in column 'answer'",
        ),
        ({"path": "{folder}/broken.jsonl"}, {}, r"broken\.jsonl:2: not JSON"),
        ({"path": "{folder}/list.jsonl"}, {}, r"list\.jsonl:1: expected an object, got list"),
    ],
)
def test_bad_data_is_one_clear_line(folder, train, heldout, message):
    (folder / "broken.jsonl").write_text('{"question": "a", "answer": "1"}\n{"question"\n')
    (folder / "list.jsonl").write_text("[1]\n")

    def fill(source):
        return {k: v.replace("{folder}", str(folder)) if isinstance(v, str) else v for k, v in source.items()}

    if message is None:
        Maths(fill(train), fill(heldout))
        return
    with pytest.raises(ValueError, match=message) as caught:
        Maths(fill(train), fill(heldout))
    assert "\n" not in str(caught.value)


def test_a_hub_name_goes_through_datasets(tmp_path, monkeypatch):
    """A data set folder in the hub's own layout, loaded by the same call as a hub name."""
    repository = tmp_path / "owner" / "sums"
    repository.mkdir(parents=True)
    for name, rows in (("train", GSM[:7]), ("test", GSM[7:])):
        (repository / f"{name}.json").write_text("".join(json.dumps(r) + "\n" for r in rows))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    from gapg.tasks import maths

    source = maths.Source(str(repository), split="test", answer_pattern=PATTERN)
    assert [row["question"] for row in maths._hub("task.args.train", source)] == [r["question"] for r in GSM[7:]]
    with pytest.raises(ValueError, match=r"train\.path: cannot load .*name a local jsonl file instead"):
        maths._hub("task.args.train", maths.Source(str(repository), split="nope"))


# The real sets are not shipped; the rows above keep every path tested where they are absent.
if DATA.is_dir():

    def test_every_real_gold_is_accepted_and_a_changed_one_refused():
        gsm = {"path": str(DATA / "gsm8k"), "answer_pattern": PATTERN, "limit": 200}
        maths = {"path": str(DATA / "math500"), "question": "problem", "answer": "answer", "answer_pattern": None}
        task = Maths(gsm, maths)
        for prompt in [*task.prompts("train"), *task.prompts("heldout")]:
            boxed = f"So\n\n$\\boxed{{{prompt.answer}}}$"
            verdicts = task.verify(prompt, [prompt.answer, boxed, f"987654321 + {prompt.answer}", "987654321"])
            assert verdicts == [C, C, W, W], prompt

    def test_real_solutions_box_the_gold():
        held = {"path": str(DATA / "math500"), "question": "problem", "answer_pattern": None}
        gsm = {"path": str(DATA / "gsm8k"), "answer_pattern": PATTERN, "limit": 5}
        golds = Maths(gsm, {**held, "answer": "answer"}).prompts("heldout")
        assert [p.answer for p in Maths(gsm, {**held, "answer": "solution"}).prompts("heldout")] == [
            p.answer for p in golds
        ]


def test_problems_come_from_a_function_by_import_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_rows.py").write_text(
        "def rows(split):\n    return [{'question': f'{split} {i} + 1?', 'answer': str(i + 1)} for i in range(3)]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    task = load_task("maths", {"train": "own_rows:rows", "heldout": {"split": "test"}})
    assert [p.answer for p in task.prompts("heldout")] == ["1", "2", "3"]
    with pytest.raises(ValueError, match=r"task\.args\.train\.path: .*no class or function 'nothing'"):
        load_task("maths", {"train": "own_rows:nothing", "heldout": {"split": "test"}})


def test_worked_solutions_are_demonstrations(tmp_path: Path) -> None:
    """Each ends in an answer block or breaks off and calls; calculator notes and the answer line are gone."""
    path = tmp_path / "train.jsonl"
    rows = [
        {"question": f"What is {i} + {i}, twice over?", "answer": f"{i}+{i} = <<{i}+{i}={2 * i}>>{2 * i}\n#### {4 * i}"}
        for i in range(40)
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    other = {"path": str(tmp_path / "test.jsonl")}
    (tmp_path / "test.jsonl").write_text(json.dumps({"question": "What is 9?", "answer": "#### 9"}) + "\n")
    task = load_task("maths", {"train": {"path": str(path), "answer_pattern": "#### (.+)"}, "heldout": other})
    made = task.demonstrations(seed=0)
    assert len(made) == 40
    assert {parse(d.response).kind for d in made} == {"answer", "help"}
    for demo in made:
        assert "<<" not in demo.response and "####" not in demo.response
        if (answer := parse(demo.response).answer) is not None:
            assert answer == demo.prompt.answer
