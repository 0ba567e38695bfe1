"""Maths problems from jsonl, functions and the hub: what a row may hold, what makes two problems one, and errors."""

import gzip
import json
from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy
import pytest

from gapg.judge import parse
from gapg.tasks import load_task
from gapg.tasks.base import HELP_PHRASE, Verdict
from gapg.tasks.maths import Maths

C, W = Verdict.CORRECT, Verdict.WRONG
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


@pytest.fixture
def folder(tmp_path):
    for name, rows in (("train", GSM[:7]), ("test", GSM[7:]), ("maths", COMPETITION)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return tmp_path


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
    again = {**GSM[7], "question": "  " + GSM[7]["question"].replace(" ", " \u2028 ")}
    (folder / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [*GSM[:3], GSM[0], again]))
    task = Maths({"path": str(folder), "answer_pattern": PATTERN}, {})
    assert len(task.prompts("train")) == 3
    assert not {p.id for p in task.prompts("train")} & {p.id for p in task.prompts("heldout")}
    assert "1 training problems are also held out" in caplog.text
    assert "another answer" not in caplog.text  # a repeat with the same one is no news


def write_problems(folder: Path, *answers: str, questions: Sequence[str] = ()) -> dict[str, str]:
    """A folder's train.jsonl with answers as JSON writes them, and a held-out problem beside it: a source."""
    questions = questions or [f"problem {n}" for n in range(len(answers))]
    lines = (f'{{"question": {json.dumps(q)}, "answer": {a}}}\n' for q, a in zip(questions, answers, strict=True))
    (folder / "train.jsonl").write_text("".join(lines))
    (folder / "test.jsonl").write_text('{"question": "held out", "answer": "1"}\n')
    return {"path": str(folder)}


def test_problems_that_differ_in_case_are_two(tmp_path, caplog):
    texts = ["Find A", "Find a", "find a", "x² = 4", "x2 = 4", "caf\u00e9", "cafe\u0301", "Find  a "]
    (tmp_path / "held.jsonl").write_text('{"question": "FIND A", "answer": "1"}\n')
    task = Maths(write_problems(tmp_path, *["1"] * 8, questions=texts), {"path": str(tmp_path / "held.jsonl")})
    assert [p.text for p in task.prompts("train")] == texts[:6]  # an accent is the same however it is written
    assert not caplog.records  # and so no leak
    other = Maths(write_problems(tmp_path, "2", "2", questions=["new", texts[1]]), {})
    assert other.prompts("train")[1].id == task.prompts("train")[1].id  # whatever else the data hold


def test_one_problem_with_two_answers_warns(tmp_path, caplog):
    source = write_problems(tmp_path, "1", "2", "3", '"1"', "4", questions=["a", "b", " a", "a", "b"])
    task = Maths(source, {})
    assert [p.answer for p in task.prompts("train")] == ["1", "2"]
    assert (
        f"task.args.train: 2 rows repeat a problem with another answer: {tmp_path}/train.jsonl:1 ('1') and "
        f"{tmp_path}/train.jsonl:3 ('3')"
    ) in caplog.text


@pytest.mark.parametrize("digits", ["0.00005", "1e22", "1.50", "-7", "0", "1E-3", "12345678901234567890", "9" * 5000])
def test_a_number_of_a_jsonl_keeps_its_digits(tmp_path, digits):
    assert Maths(write_problems(tmp_path, digits), {}).prompts("train")[0].answer == digits


GIVEN = []


def given_rows(split):
    """Yields, as a function that reads a large file would."""
    for n, answer in enumerate(GIVEN):
        yield {"question": f"{split} {n}", "answer": answer}


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (42, "42"),
        (0.00005, "0.00005"),
        (1e22, "10000000000000000000000"),
        (0.1, "0.1"),
        (2.0, "2.0"),
        (-2.5e-7, "-0.00000025"),
        pytest.param(10**5000, "1" + "0" * 5000, id="5,001 digits"),
        (numpy.float64(0.00005), "0.00005"),
        (numpy.float32(0.1), "0.1"),
        (numpy.int8(-3), "-3"),
        (Decimal("1.50"), "1.50"),
        (Fraction(8, 3), "8/3"),
        (numpy.str_(" x+1 "), "x+1"),
    ],
)
def test_numbers_of_a_function_or_the_hub(tmp_path, number, text):
    """They come as Python's and NumPy's."""
    GIVEN[:] = [number]
    task = Maths(f"{__name__}:given_rows", write_problems(tmp_path, "1") | {"split": "test"})
    assert [p.answer for p in task.prompts("train")] == [text]


@pytest.mark.parametrize("cell", ["nan", "NaN", "null"])
def test_what_an_export_writes_for_an_empty_cell_is_no_answer(tmp_path, cell):
    (tmp_path / "train.jsonl").write_text(json.dumps({"question": "q", "answer": cell}) + "\n")
    (tmp_path / "test.jsonl").write_text('{"question": "r", "answer": "1"}\n')
    with pytest.raises(ValueError, match=rf"task.args.train.answer: .*train.jsonl:1 has '{cell}', which an export"):
        Maths(train=str(tmp_path), heldout={"path": str(tmp_path), "split": "test"})


NEEDED = "in column {column!r}, where a text or a number is needed; mend or drop the row, or name a function"


@pytest.mark.parametrize(
    ("cell", "said"),
    [
        ("NaN", f"has NaN {NEEDED}"),
        ("-Infinity", f"has -Infinity {NEEDED}"),
        ("true", f"has true {NEEDED}"),
        ("null", f"has null {NEEDED}"),
        ('["42"]', f"has a list {NEEDED}"),
        ('{"value": 42}', f"has an object {NEEDED}"),
        ('" "', "has nothing in column {column!r}; fill it in or drop the row"),
        ('"\\ud83d"', "has, in column {column!r}, half of a surrogate pair (\\ud83d)"),
    ],
)
@pytest.mark.parametrize("column", ["question", "answer"])
def test_what_is_no_text_and_no_number_is_refused_by_name(tmp_path, cell, said, column):
    source = write_problems(tmp_path, "1")
    row = '{"question": %s, "answer": "1"}' if column == "question" else '{"question": "q", "answer": %s}'
    (tmp_path / "train.jsonl").write_text('\n{"question": "a", "answer": 1, "unused": NaN}\n' + row % cell)
    with pytest.raises(ValueError) as caught:
        Maths(source, {})
    where = f"task.args.train.{column}: {tmp_path}/train.jsonl:3 "
    assert str(caught.value).startswith(where + said.replace("{column!r}", repr(column)))
    assert len(Maths(source | {"limit": 1}, {}).prompts("train")) == 1  # rows behind the limit are nobody's


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (float("nan"), "NaN"),
        (numpy.float32("inf"), "Infinity"),
        (True, "true"),
        (numpy.bool_(True), "a bool"),
        (None, "null"),
        (b"42", "a bytes"),
        (numpy.array([42]), "a ndarray"),
        (2j, "a complex"),
        (Decimal("nan"), "a Decimal"),
    ],
)
def test_what_is_no_number_of_a_function_is_refused_too(tmp_path, value, said):
    GIVEN[:] = [1, value]
    with pytest.raises(ValueError) as caught:
        Maths(f"{__name__}:given_rows", write_problems(tmp_path, "1") | {"split": "test"})
    assert f"task.args.train.answer: row 2 of {__name__}:given_rows has {said} in column 'answer'" in str(caught.value)


def test_a_function_that_fails_or_gives_no_rows_is_named(monkeypatch, tmp_path):
    (tmp_path / "their_rows.py").write_text(
        "def fails(split):\n    yield {'question': 'a', 'answer': 1}\n    raise KeyError(split)\n"
        "def nothing(split): ...\n"
        "def texts(split): return ['a', 'b']\n"
        "import itertools\n"
        "def endless(split):\n    for n in itertools.count():\n        yield {'question': str(n), 'answer': n}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    held = write_problems(tmp_path, "1") | {"split": "test"}
    for name, said in {
        "fails": r"path: their_rows:fails\('train'\) fails to give rows: KeyError: 'train'",
        "nothing": r"path: their_rows:nothing\('train'\) fails to give rows: TypeError",
        "texts": r"path: row 1 of their_rows:texts: expected an object with columns, got a text",
    }.items():
        with pytest.raises(ValueError, match=said):
            Maths(f"their_rows:{name}", held)
    assert len(Maths({"path": "their_rows:endless", "limit": 5}, held).prompts("train")) == 5


def test_a_folder_of_gzipped_splits(folder):
    for name in ("train", "test"):
        file = folder / f"{name}.jsonl"
        (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + file.read_bytes()))
        file.unlink()
    task = Maths({"path": folder, "answer_pattern": PATTERN}, {})  # a Path will do as well as a text
    assert [len(task.prompts("train")), len(task.prompts("heldout"))] == [7, 3]
    with pytest.raises(ValueError, match=r"splits in that folder: maths, test, train$"):
        Maths({"path": str(folder), "split": "dev"}, {})


def test_the_last_box_of_a_solution_is_the_gold(tmp_path):
    solutions = {
        r"so \boxed{\left\{ x \right.} and more}": r"\left\{ x \right.",
        r"\boxed{1}, no, \boxed{\{1, \frac{1}{2}\}}": r"\{1, \frac{1}{2}\}",
        r"\boxed 4 of 7": "4",
        "1": "1",
    }
    task = Maths(write_problems(tmp_path, *map(json.dumps, solutions)), {})
    assert [p.answer for p in task.prompts("train")] == list(solutions.values())


def test_an_empty_box_is_no_answer(tmp_path):
    with pytest.raises(ValueError, match=r"train\.answer: .*train\.jsonl:1 has an empty \\boxed"):
        Maths(write_problems(tmp_path, r'"It is \\boxed{ }."'), {})


@pytest.mark.parametrize(
    ("train", "heldout", "message"),
    [
        ({"path": "{folder}"}, {"path": "{folder}"}, None),
        ({"path": "{folder}/none.jsonl"}, {}, r"train\.path: .*none\.jsonl does not exist"),
        (
            {"path": "{folder}", "split": "dev"},
            {},
            r"train\.split: .*splits in that folder: broken, empty, list, maths, test, train",
        ),
        ({"path": "{folder}", "question": "problem"}, {}, r"no column 'problem'; it has question, answer; set task"),
        (
            {"path": "{folder}"},
            {"answer": "gold"},
            r"heldout\.answer: .*test\.jsonl:1 has no column 'gold'; it has question, answer",
        ),
        (
            {"path": "{folder}", "answer_pattern": "= (.+)$$$"},
            {},
            r"answer_pattern: .* finds no answer in .*train\.jsonl:1, which ends in",
        ),
        ({"path": "{folder}", "answer_pattern": "####"}, {}, r"answer_pattern: needs a group"),
        ({"path": "{folder}", "answer_pattern": "("}, {}, r"answer_pattern: no regular expression"),
        ({"path": "{folder}"}, {"split": "train"}, r"heldout: is the same data"),
        ({"path": "{folder}", "columns": "x"}, {}, r"train\.columns: unknown key; known are path, split"),
        ({}, {}, r"train\.path: required"),
        ({"path": "{folder}/test.jsonl"}, {"path": "{folder}"}, r"train: every problem is also in"),
        ({"path": "{folder}", "answer_pattern": r"####(\s)"}, {}, r"answer_pattern: .* finds no answer in"),
        ({"path": "{folder}/empty.jsonl"}, {}, r"train\.path: .*empty\.jsonl has no rows"),
        ({"path": "{folder}", "limit": 0}, {}, r"train\.limit: must be a whole number of rows, 1 or more, not 0"),
        ({"path": "{folder}", "limit": -1}, {}, r"train\.limit: .* not -1"),
        ({"path": "{folder}", "limit": True}, {}, r"train\.limit: .* not True"),
        ({"path": "{folder}", "limit": "10"}, {}, r"train\.limit: .* not '10'"),
        ({"path": "{folder}", "limit": 10.0}, {}, r"train\.limit: .* not 10\.0"),
        ({"path": "{folder}", "split": 2024}, {}, r"train\.split: must be a text, not 2024; in YAML, quote it"),
        ({"path": "{folder}", "split": None}, {}, r"train\.split: must be a text, not None"),
        ({"path": "{folder}", "answer": False}, {}, r"train\.answer: must be a text, not False"),
        ({"path": "{folder}", "subset": ["main"]}, {}, r"train\.subset: must be a text, not \['main'\]"),
        ({"path": ""}, {}, r"train\.path: must be a text, not ''"),
        ({"path": "{folder}", 3: "x"}, {}, r"train\.3: unknown key"),
        ({"path": "{folder}"}, {"limit": 1.5}, r"heldout\.limit: "),
        ({"path": "~nobody_at_all/x.jsonl"}, {}, r"train\.path: cannot read ~nobody_at_all/x\.jsonl"),
        ({"path": "./" + "x" * 300}, {}, r"train\.path: cannot read .*too long"),
        (
            {"path": "{folder}/maths.jsonl", "question": "problem"},
            {"path": "{folder}"},
            r"answer: .*maths\.jsonl:2 has nothing in column 'answer'",
        ),
        ({"path": "{folder}/broken.jsonl"}, {}, r"broken\.jsonl:2: not JSON"),
        ({"path": "{folder}/list.jsonl"}, {}, r"list\.jsonl:1: expected an object, got a list"),
    ],
)
def test_bad_data_is_one_clear_line(folder, train, heldout, message):
    (folder / "broken.jsonl").write_text('{"question": "a", "answer": "1"}\n{"question"\n')
    (folder / "list.jsonl").write_text("[1]\n")
    (folder / "empty.jsonl").write_text("\n")

    def fill(source):
        return {k: v.replace("{folder}", str(folder)) if isinstance(v, str) else v for k, v in source.items()}

    if message is None:
        Maths(fill(train), fill(heldout))
        return
    with pytest.raises(ValueError, match=message) as caught:
        Maths(fill(train), fill(heldout))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("given", [None, ["a", "b"], 7])
def test_a_source_that_is_none_is_named(folder, given):
    with pytest.raises(ValueError, match=r"task\.args\.heldout: must be a path, or keys and values"):
        Maths(str(folder), given)


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
