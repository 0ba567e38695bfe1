"""Demonstrations from a file: what loads, and one clear line for what does not."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from gapg.tasks.base import HELP_PHRASE
from gapg.tasks.countdown import Countdown
from gapg.tasks.demonstrations import load_demonstrations


@pytest.fixture(scope="module")
def task() -> Countdown:
    return Countdown(max_number=6, max_target=20)


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_by_id_and_by_text(task, tmp_path):
    made = task.demonstrations(0)[:4]
    rows = [
        {"id": made[0].prompt.id, "response": made[0].response},
        {"prompt": made[1].prompt.id, "response": made[1].response + "\n"},
        "",
        {"prompt": f" {made[2].prompt.text} ", "response": made[2].response, "score": 0.5},
        {"id": 17, "prompt": made[3].prompt.text, "response": f"hard {HELP_PHRASE}"},
        {"id": "their-17", "prompt": made[0].prompt.text, "response": made[0].response},
    ]
    loaded = load_demonstrations(write(tmp_path / "d.jsonl", *rows), task)
    assert loaded[:3] == list(made[:3])
    assert loaded[3].prompt == made[3].prompt and loaded[3].response.endswith(HELP_PHRASE)
    assert loaded[4] == made[0]


@pytest.mark.parametrize(
    "separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\r", "\n", "\t", "\U0001f600"]
)
@pytest.mark.parametrize("escaped", [True, False])
def test_responses_are_kept_as_they_are(task, tmp_path, separator, escaped):
    prompt = task.prompts("train")[0]
    row = {"id": prompt.id, "response": f"first{separator}then <answer> 2 </answer>"}
    path = tmp_path / "d.jsonl"
    path.write_bytes(json.dumps(row, ensure_ascii=escaped).encode() + b"\r\n")
    assert [d.response for d in load_demonstrations(path, task)] == [row["response"]]


def test_a_byte_order_mark_and_gzip(task, tmp_path, monkeypatch):
    prompt = task.prompts("train")[0]
    row = json.dumps({"id": prompt.id, "response": "<answer> 2 </answer>"}).encode()
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + row))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert [d.prompt for d in load_demonstrations("~/d.jsonl.gz", task)] == [prompt]
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(row)[:-4])
    with pytest.raises(ValueError, match=r"^demonstrations: .*d\.jsonl\.gz: damaged or cut short gzip"):
        load_demonstrations(tmp_path / "d.jsonl.gz", task)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "not JSON"),
        ([1], "expected an object, got a list"),
        ({}, "needs the texts 'prompt' (or 'id') and 'response', has nothing"),
        ({"prompt": "x", "completion": "y"}, "has prompt (a text), completion (a text)"),
        ({"prompt": "x", "response": 3}, "has prompt (a text), response (a number)"),
        ({"prompt": "x", "response": None}, "response (null)"),
        ({"id": 7, "response": "y"}, "has id (a number)"),
        ({"prompt": "x", "response": [{"role": "assistant", "content": "y"}]}, "response (a list)"),
        ({"prompt": "1 1 1 = 60", "response": "<answer> 1 </answer>"}, "is the id or text of no training problem"),
        ({"two": True}, "is the id or text of two training problems, id and prompt differ"),
        ({"heldout": True}, "is the id or text of no training problem"),
        ({"ending": "the answer is 4"}, "the response must end in </answer> or"),
        ({"ending": "<unknown> help </unknown>"}, "the response must end in"),
        ({"ending": "\ud83d <answer> 4 </answer>"}, "the response holds half of a surrogate pair"),
    ],
)
def test_errors_name_the_line(task, tmp_path, row, message):
    good = task.demonstrations(0)[0]
    if isinstance(row, dict) and "heldout" in row:  # held-out problems must not be trained on
        row = {"prompt": task.prompts("heldout")[0].id, "response": good.response}
    if isinstance(row, dict) and "two" in row:
        row = {"id": good.prompt.id, "prompt": task.prompts("train")[1].text, "response": good.response}
    if isinstance(row, dict) and "ending" in row:
        row = {"prompt": good.prompt.id, "response": row["ending"]}
    first = {"prompt": good.prompt.id, "response": good.response}
    with pytest.raises(ValueError) as caught:
        load_demonstrations(write(tmp_path / "d.jsonl", first, "", row), task)
    assert str(caught.value).startswith(f"demonstrations: {tmp_path}/d.jsonl:3: ")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_missing_and_empty_files(task, tmp_path):
    with pytest.raises(ValueError, match=r"demonstrations: cannot read .*none\.jsonl: No such file"):
        load_demonstrations(tmp_path / "none.jsonl", task)
    with pytest.raises(ValueError, match=r"demonstrations: cannot read .*: Is a directory"):
        load_demonstrations(tmp_path, task)
    with pytest.raises(ValueError, match="is empty"):
        load_demonstrations(write(tmp_path / "d.jsonl", "", " "), task)
