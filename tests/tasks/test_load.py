"""Tasks by name and import path, and demonstrations from a file: what loads, and one clear line for what does not."""

import json
import sys
from pathlib import Path

import pytest

from gapg.tasks import load_demonstrations, load_task
from gapg.tasks.base import HELP_PHRASE, Verdict
from gapg.tasks.countdown import Countdown

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
    assert HELP_PHRASE in byte_tokenizer.decode(task.render(train[0], byte_tokenizer))
    assert task.question(train[0]).id == train[0].id


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("chess", {}, "'chess' is neither countdown, maths nor an import path"),
        ("their_missing:Task", {}, "cannot import 'their_missing': no module 'their_missing'"),
        ("their_broken:Task", {}, "cannot import 'their_broken': no module 'not_installed_anywhere'"),
        ("their_tasks:Nope", {}, "module 'their_tasks' has no class or function 'Nope'"),
        ("their_tasks:number", {}, "has no class or function 'number'"),
        ("their_tasks:Half", {}, "their_tasks:Half is no task, it lacks name, verify, question"),
        ("their_tasks:", {}, "nor an import path"),
        ("countdown", {"numbrs": 3}, "countdown does not take them: got an unexpected keyword argument 'numbrs'"),
        ("countdown", {"numbers": 9}, "numbers: each count must be 2 to 6"),
        ("maths", {}, "maths does not take them: missing a required argument: 'train'"),
    ],
)
def test_errors(importable, name, args, message):
    (importable / "their_tasks.py").write_text(
        "number = 1\nclass Half:\n    def prompts(self, split): ...\n    def render(self, prompt, tokenizer): ...\n"
    )
    (importable / "their_broken.py").write_text("import not_installed_anywhere\n")
    with pytest.raises(ValueError) as caught:
        load_task(name, args)
    assert message in str(caught.value) and "\n" not in str(caught.value)


class TestDemonstrations:
    def write(self, path, *rows):
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return path

    def test_by_id_and_by_text(self, tmp_path):
        task = Countdown()
        made = task.demonstrations(0)[:4]
        rows = [
            {"id": made[0].prompt.id, "response": made[0].response},
            {"prompt": made[1].prompt.id, "response": made[1].response + "\n"},
            "",
            {"prompt": f" {made[2].prompt.text} ", "response": made[2].response, "note": "kept out"},
            {"prompt": made[3].prompt.text, "response": f"hard {HELP_PHRASE}"},
        ]
        loaded = load_demonstrations(self.write(tmp_path / "d.jsonl", *rows), task)
        assert loaded[:3] == list(made[:3])
        assert loaded[3].prompt == made[3].prompt and loaded[3].response.endswith(HELP_PHRASE)

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ("{", "d.jsonl:2: not JSON"),
            ([1], "needs strings 'prompt' (or 'id') and 'response', has list"),
            ({"prompt": "x", "completion": "y"}, "has prompt, completion"),
            ({"prompt": "x", "response": 3}, "has prompt, response"),
            ({"prompt": "1 1 1 = 60", "response": "<answer> 1 </answer>"}, "is the id or text of no training problem"),
            ({"heldout": True}, "is the id or text of no training problem"),
            ({"ending": "the answer is 4"}, "the response must end in </answer> or"),
            ({"ending": "<unknown> help </unknown>"}, "the response must end in"),
        ],
    )
    def test_errors_name_the_line(self, tmp_path, row, message):
        task = Countdown()
        good = task.demonstrations(0)[0]
        if isinstance(row, dict) and "heldout" in row:  # held-out problems must not be trained on
            row = {"prompt": task.prompts("heldout")[0].id, "response": good.response}
        if isinstance(row, dict) and "ending" in row:
            row = {"prompt": good.prompt.id, "response": row["ending"]}
        first = {"prompt": good.prompt.id, "response": good.response}
        with pytest.raises(ValueError) as caught:
            load_demonstrations(self.write(tmp_path / "d.jsonl", first, row), task)
        assert message in str(caught.value) and "d.jsonl:2" in str(caught.value)

    def test_missing_and_empty_files(self, tmp_path):
        with pytest.raises(ValueError, match="cannot read"):
            load_demonstrations(tmp_path / "none.jsonl", Countdown())
        with pytest.raises(ValueError, match="is empty"):
            load_demonstrations(self.write(tmp_path / "d.jsonl"), Countdown())
