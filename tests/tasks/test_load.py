"""Tasks by name and import path: what loads, one clear line for what does not, and nothing called that is no task."""

import sys
from pathlib import Path

import pytest

from gapg.commands.cli import main
from gapg.config import load_config
from gapg.errors import ConfigError
from gapg.judge import parse
from gapg.model.load import load_tokenizer
from gapg.tasks import load_task
from gapg.tasks.base import HELP_PHRASE, Verdict
from gapg.tasks.countdown import Countdown
from gapg.tasks.members import check_members
from gapg.tasks.vocabulary import word_tokenizer

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def importable(tmp_path, monkeypatch):
    """A folder on the import path; modules from it are forgotten afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("their_"):
            del sys.modules[name]


def test_by_name():
    task = load_task("countdown", {"seed": 4})
    assert isinstance(task, Countdown) and task.prompts("train") == Countdown(seed=4).prompts("train")


def test_the_example(monkeypatch, byte_tokenizer):
    monkeypatch.syspath_prepend(EXAMPLES)
    task = load_task("my_task:Sums", {"limit": 12})
    train, heldout = task.prompts("train"), task.prompts("heldout")
    assert len(train) + len(heldout) == 144 and not {p.id for p in train} & {p.id for p in heldout}
    assert task.verify(train[0], [train[0].answer, "no"]) == [Verdict.CORRECT, Verdict.WRONG]
    assert HELP_PHRASE not in byte_tokenizer.decode(task.render(train[0], byte_tokenizer))
    byte_tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert HELP_PHRASE in byte_tokenizer.decode(task.render(train[0], byte_tokenizer))
    assert parse(task.solve(task.question(train[0]).id)).answer == train[0].answer


def test_the_example_trains(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(EXAMPLES)
    few = ("--steps", "1", "--warm-start.steps", "2", "--eval.problems", "4", "--eval.heldout", "4")
    main(["train", str(EXAMPLES / "my_config.yaml"), *few, "--output-dir", str(tmp_path / "run")])
    assert (tmp_path / "run" / "summary.json").exists()


def test_all_that_a_task_lacks_is_said_at_once(importable):
    (importable / "their_four.py").write_text(
        "class Four:\n    name = 'four'\n    def prompts(self, split): return ()\n    def render(self, p, x): ...\n"
        "    def verify(self, prompt, answers): ...\n    def question(self, prompt): ...\n"
    )
    task, config = load_task("their_four:Four"), load_config("quickstart")
    with pytest.raises(ConfigError) as caught:
        check_members(config, task)
    assert str(caught.value) == (
        "task 'four' lacks what these settings want: tokenizer() (or set model.path to a model), demonstrations() (or "
        "name a jsonl in warm_start.demonstrations, or set warm_start=none), solve() (or set oracle.kind=openai)"
    )
    given = {"model.path": "x", "warm_start.demonstrations": "x.jsonl", "oracle.kind": "openai", "oracle.model": "x"}
    check_members(load_config("quickstart", given), task)
    check_members(config, Countdown())


@pytest.mark.parametrize(
    ("member", "body", "message"),
    [
        ("prompts", "raise KeyError('x')", r"prompts\(\) failed: KeyError: 'x' \(.*their_own.py:5\)$"),
        ("prompts", "raise ValueError('two\\nlines')", r"prompts\(\) failed: ValueError: two lines \("),
        ("prompts", "raise ValueError('task.args.file: is empty')", "^task.args.file: is empty$"),
        ("prompts", "return None", r"prompts\(\) must return a list of Prompt, not None"),
        ("prompts", "yield from super().prompts(split)", r"list of Prompt, not <generator"),
        ("prompts", "return ['a']", r"list of Prompt, not 'a'"),
        (
            "prompts",
            "return [replace(p, answer=39) for p in super().prompts(split)]",
            "answer=39, where a text is needed",
        ),
        ("demonstrations", "return [Demonstration(self.prompts('train')[0], b'x')]", "response=b'x', where a text"),
        (
            "demonstrations",
            "return [Demonstration(p, HELP_PHRASE) for s in ('train', 'heldout') for p in self.prompts(s)]",
            "shows '.*', which is held out: leave it out",
        ),
        ("demonstrations", "return 1 / 0", r"demonstrations\(\) failed: ZeroDivisionError: .*their_own.py:5\)"),
        ("demonstrations", "return [None]", r"list of Demonstration, not None"),
        ("tokenizer", "return [][0]", r"tokenizer\(\) failed: IndexError: .*their_own.py:5\)"),
        ("tokenizer", "pass", r"tokenizer\(\) returned None, no tokenizer"),
        ("tokenizer", "return word_tokenizer(['is it'])", "'is it' is not one word: blanks divide words"),
        ("tokenizer", "return gap()", "without gaps"),
    ],
)
def test_what_a_tasks_own_code_gets_wrong_is_one_line(importable, member, body, message):
    (importable / "their_own.py").write_text(
        "from dataclasses import replace; from gapg.tasks.base import HELP_PHRASE, Demonstration\n"
        "from gapg.tasks.countdown import Countdown; from gapg.tasks.vocabulary import word_tokenizer\n"
        "class Own(Countdown):\n"
        f"    def {member}(self, {'split' if member == 'prompts' else 'seed=0'}):\n        {body}\n"
        "from tokenizers import Tokenizer, models; from transformers import PreTrainedTokenizerFast\n"
        "def gap():\n    inner = Tokenizer(models.WordLevel({'a': 0, 'b': 7}, unk_token='a'))\n"
        "    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token='b')\n"
    )
    task, config = load_task("their_own:Own"), load_config("quickstart")
    with pytest.raises(ConfigError, match=message) as caught:
        check_members(config, task)
        load_tokenizer(config.model, task)
    assert "\n" not in str(caught.value)


def test_words_that_are_given_twice_are_one_token():
    words = word_tokenizer(["b", "a", "b", "<answer>", "<pad>"])
    assert sorted(words.get_vocab().values()) == list(range(len(words)))
    assert words.decode(words.encode("a b <answer> x")) == "a b <answer> <unk>"


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("chess", {}, "'chess' is neither countdown, maths, word-problems nor an import path"),
        ("their_missing:Task", {}, "cannot import 'their_missing': no module 'their_missing'"),
        ("their_broken:Task", {}, "cannot import 'their_broken': no module 'not_installed_anywhere'"),
        ("their_tasks:Nope", {}, "module 'their_tasks' has no class or function 'Nope'"),
        ("their_tasks:number", {}, "has no class or function 'number'"),
        ("their_tasks:Half", {}, "their_tasks:Half is no task, it lacks name, verify, question"),
        ("their_tasks:half", {}, "what their_tasks:half returns, Half, is no task, it lacks name, verify, question"),
        ("their_tasks:unsaid", {}, "their_tasks:unsaid is not called, as nothing says that it makes a task"),
        ("their_tasks:unknown", {}, "their_tasks:unknown is not called"),
        ("their_tasks:several", {}, "their_tasks:several is not called"),
        ("their_exit:Task", {}, "importing 'their_exit' failed: SystemExit: 7"),
        ("their tasks:Half", {}, "nor an import path"),
        ("their_tasks:", {}, "nor an import path"),
        ("countdown", {"numbrs": 3}, "countdown does not take them: got an unexpected keyword argument 'numbrs'"),
        ("countdown", {"numbers": 9}, "numbers: each count must be 2 to 6"),
        ("maths", {}, "maths does not take them: missing a required argument: 'train'"),
    ],
)
def test_errors(importable, name, args, message):
    (importable / "their_tasks.py").write_text(
        "number = 1\nclass Half:\n    def prompts(self, split): ...\n    def render(self, prompt, tokenizer): ...\n"
        "def half() -> Half: ...\ndef unsaid(): ...\ndef unknown() -> 'Nobody': ...\n"
        "def several() -> Half | None: ...\n"
    )
    (importable / "their_exit.py").write_text("raise SystemExit(7)\n")
    (importable / "their_broken.py").write_text("import not_installed_anywhere\n")
    with pytest.raises(ValueError) as caught:
        load_task(name, args)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("subprocess:Popen", {"args": "touch {mark}", "shell": True}),
        ("subprocess:run", {"args": "touch {mark}", "shell": True}),
        ("os:system", {"command": "touch {mark}"}),
        ("builtins:eval", {}),
        ("builtins:open", {"file": "{mark}", "mode": "w"}),
        ("pathlib:Path", {}),
        ("functools:partial", {}),
        ("their_tools:shell", {"args": "touch {mark}"}),
        ("their_tools:touch", {"path": "{mark}"}),
        ("their_tools:Touches", {"path": "{mark}"}),
    ],
)
def test_nothing_but_a_task_is_called(importable, name, args):
    mark = importable / "called"
    (importable / "their_tools.py").write_text(
        "import functools, subprocess\nshell = functools.partial(subprocess.Popen, shell=True)\n"
        "def touch(path): open(path, 'w')\n"
        "class Touches:\n    name = 'x'\n    def __init__(self, path): touch(path)\n"
        "    def __getattr__(self, key): return print\n"
    )
    with pytest.raises(ValueError, match=r"is no task|is not called"):
        load_task(name, {key: str(mark) if v == "{mark}" else v for key, v in args.items()})
    assert not mark.exists()


def test_a_function_that_says_what_it_makes(importable):
    (importable / "their_makers.py").write_text(
        "from __future__ import annotations\nfrom functools import cache, partial, wraps\n"
        "from typing import TYPE_CHECKING\n"
        "from gapg.tasks.base import Task\nfrom gapg.tasks.countdown import Countdown\n"
        "if TYPE_CHECKING:\n    from nowhere import Unseen\n"
        "class Small(Countdown):\n"
        "    def __init__(self, seed=0): super().__init__(max_number=5, max_target=20, seed=seed)\n"
        "def make(seed: Unseen = 0) -> Small: return Small(seed=seed)\n"
        "def any_task(seed: int = 0) -> Task: return Small(seed=seed)\n"
        "def wrapped(f):\n    @wraps(f)\n    def g(*a, **k): return f(*a, **k)\n    return g\n"
        "decorated, cached, ready = wrapped(make), cache(make), partial(partial(Small), 4)\n"
        "class Named:\n    def __init__(self, seed=0): self.name, self.prompts = 'x', Small(seed=seed).prompts\n"
        "    def prompts(self, split): ...\n"
        "    render, verify, question = Countdown.render, Countdown.verify, Countdown.question\n"
        "class Maker:\n    def __call__(self, seed: int = 0) -> Small: return Small(seed=seed)\n"
        "maker = Maker()\n"
    )
    right = Countdown(max_number=5, max_target=20, seed=4).prompts("train")
    for name in ("make", "any_task", "decorated", "Named", "cached", "maker"):
        assert load_task(f"their_makers:{name}", {"seed": 4}).prompts("train") == right
    assert load_task("their_makers:ready").prompts("train") == right


@pytest.mark.parametrize("raised", ["KeyError('x')", "SystemExit(3)", "AssertionError"])
def test_a_task_that_cannot_be_made_says_where(importable, raised):
    (importable / "their_failing.py").write_text(
        "from gapg.tasks.countdown import Countdown\nclass Mine(Countdown):\n"
        f"    def __init__(self):\n        raise {raised}\n"
    )
    with pytest.raises(ValueError, match=r"task.name: making their_failing:Mine failed: .*their_failing.py:4\)$"):
        load_task("their_failing:Mine")
