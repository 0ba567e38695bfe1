"""The sets of `gapg eval --suite`: what is read and what is left out, one line for each error, the shipped columns."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gapg.build import make_task
from gapg.commands.cli import main
from gapg.config import RunConfig
from gapg.config_sections import TaskConfig
from gapg.errors import ConfigError
from gapg.evaluation.suite import OWN, SUITES, load_sets, read_suite, suites
from gapg.model.load import load_tokenizer
from gapg.tasks.base import Prompt, Split
from gapg.tasks.in_words import InWords
from gapg.tasks.maths import Maths
from tests.evaluation.small_maths import make_config, sums, write


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return make_config(tmp_path_factory.mktemp("suite"))


def refused(capsys: pytest.CaptureFixture[str], *argv: str, said: int = 1) -> str:
    """The last line on stderr of a command that exits with 2, which is one of `said`."""
    with pytest.raises(SystemExit) as left:
        main(argv)
    captured = capsys.readouterr()
    assert (left.value.code, captured.out) == (2, "")
    lines = captured.err.splitlines()
    assert len(lines) == said, captured.err
    assert lines[-1].startswith("gapg: ")
    return lines[-1]


def of(config: RunConfig) -> list[str]:
    """The command's words for the config's model as it is."""
    return ["eval", str(config.model.path), "--config", str(config.output_dir.parent / "config.yaml")]


UNREAD = "{path: no.jsonl}"


@pytest.mark.parametrize(
    ("suite", "argv", "said", "words"),
    [
        (None, ["--suite", "nosuch"], 1, ["--suite nosuch: is neither a file nor a suite; suites: maths"]),
        (None, ["--suite", "x" * 300], 1, ["is neither a file nor a suite"]),
        (None, ["--suite", "maths", "--suite-data", "x" * 300], 1, ["no such folder"]),
        (None, ["--suite-data", "."], 1, ["--suite-data is the folder of a suite's sets: add --suite maths"]),
        (None, ["--suite", "maths", "--suite-data", "no"], 1, ["--suite-data no: no such folder"]),
        (
            None,
            ["--suite", "maths", "--suite-data", "."],
            1,
            ["--suite-data .: has none of the sets gsm8k, math500, amc23", "gsm8k/test.jsonl", "leave it out"],
        ),
        ("{}", [], 1, ["mine.yaml: names no set"]),
        ("[1]", [], 1, ["mine.yaml: expected a mapping"]),
        ("a: [1", [], 1, ["mine.yaml: not valid YAML"]),
        (f"../up: {UNREAD}", [], 1, ["mine.yaml: '../up' is no name for a set: use up to 60 letters"]),
        (f"own: {UNREAD}", [], 1, ["'own' is no name for a set"]),
        (f"suite.json: {UNREAD}", [], 1, ["'suite.json' is no name for a set: use up to 60 letters, digits, - and _"]),
        (f"oracle.sqlite: {UNREAD}", [], 1, ["'oracle.sqlite' is no name for a set"]),
        (f"2024: {UNREAD}", [], 1, ["2024 is no name for a set"]),
        ("a: no.jsonl", [], 1, ["mine.yaml: a: must be keys and values such as {path: …"]),
        (f"a: {UNREAD}", [], 1, ["suite: a.path: no.jsonl does not exist"]),
        ("a: {split: test}", [], 1, ["suite: a.path: required"]),
        ("a: {path: rows.jsonl, columns: x}", [], 1, ["suite: a.columns: unknown key; known are path, split"]),
        ("a: {path: rows.jsonl, answer: x}", [], 1, ["a.answer: ", "no column 'x'", "set a.answer to one of them"]),
        (
            "a: {path: rows.jsonl, question_pattern: x}",
            [],
            1,
            ["a.question_pattern: needs a group around the question"],
        ),
        (
            "a: {path: rows.jsonl}",
            ["--rollout.max-prompt-tokens", "56"],
            2,
            ["a: no held-out problem fits; raise rollout.max_prompt_tokens"],
        ),
        ("a: {path: rows.jsonl}", ["--eval.heldout", "0"], 1, ["--eval.heldout none"]),
        (
            None,
            ["--suite", "maths"],
            1,
            ["suite: gsm8k.path: cannot load 'openai/gsm8k' (subset main, split test)", "; give --suite-data FOLDER"],
        ),
    ],
)
def test_an_error_comes_before_anything_slow_in_one_line_with_its_fix(
    suite: str | None,
    argv: list[str],
    said: int,
    words: list[str],
    config: RunConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    if suite is not None:
        Path("mine.yaml").write_text(suite)
        write(Path("rows.jsonl"), {"question": "What is 1 + 1 ? " * 20, "answer": "5"})
        argv = ["--suite", "mine.yaml", *argv]
    shown = [] if "--eval.heldout" in argv else ["--eval.heldout", "4"]
    line = refused(capsys, *of(config), *argv, *shown, "--output-dir", "eval", said=said)
    assert all(word in line for word in words), line
    assert not Path("eval").exists(), "nothing is left behind"


@pytest.fixture
def own(config: RunConfig) -> tuple[RunConfig, Maths]:
    """The run's config and task, all its held-out problems wanted."""
    every = config.eval.model_copy(update={"heldout": None})
    task = make_task(config)
    assert isinstance(task, Maths)
    return config.model_copy(update={"eval": every}), task


def test_what_was_trained_on_is_no_evaluation(
    own: tuple[RunConfig, Maths], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The set that the task holds out is not decoded twice; one that shares problems with the task is in domain."""
    config, task = own
    known, new = sums(range(38, 43), "+"), sums(range(3), "-")
    seen, heldout = sums(range(5), "+"), sums(range(40, 60), "+")
    sources = {
        name: {"path": str(write(tmp_path / f"{name}.jsonl", *rows)), "answer_pattern": "#### (.+)"}
        for name, rows in {"same": heldout, "mixed": known + new, "seen": seen, "new": new}.items()
    }
    sets = load_sets(sources, config, task, load_tokenizer(config.model, task), task)
    assert [(s.key, s.name, len(s.prompts), s.in_domain, s.trained_on) for s in sets] == [
        (OWN, "same", 20, True, 0),
        ("mixed", "mixed", 6, True, 2),
        ("new", "new", 3, False, 0),
    ]
    assert not {p.id for p in sets[1].prompts} & {p.id for p in task.prompts("train")}
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "warning: mixed: the model was trained on 2 of 8 problems: left out",
        "warning: seen: the model was trained on 5 of 5 problems: left out",
    ]
    assert {id(s.task.checker) for s in sets if isinstance(s.task, Maths)} == {id(task.checker)}, "one set of processes"


class Numbered(Maths):
    """A task whose ids say nothing of its problems."""

    def prompts(self, split: Split) -> list[Prompt]:
        return [replace(p, id=str(n)) for n, p in enumerate(super().prompts(split))]


def test_a_problem_is_known_by_its_text_whatever_its_task_calls_it(
    own: tuple[RunConfig, Maths], tmp_path: Path
) -> None:
    config, task = own
    trained = Numbered(**config.task.args)
    rows = [*sums(range(38, 43), "+"), *sums(range(3), "-")]
    path = write(tmp_path / "mixed.jsonl", *rows)
    sources = {"mixed": {"path": str(path), "answer_pattern": "#### (.+)"}}
    sets = load_sets(sources, config, task, load_tokenizer(config.model, task), trained)
    assert [(s.key, len(s.prompts), s.in_domain, s.trained_on) for s in sets] == [
        (OWN, 20, True, 0),
        ("mixed", 6, True, 2),
    ]


@pytest.mark.parametrize(("new", "in_domain"), [(297, True), (298, False)])
def test_a_set_is_in_domain_where_a_hundredth_of_it_is_shared(
    new: int, in_domain: bool, own: tuple[RunConfig, Maths], tmp_path: Path
) -> None:
    """Of three problems that it shares, the two that were trained on are left out in any case."""
    config, task = own
    path = write(tmp_path / "set.jsonl", *sums(range(38, 41), "+"), *sums(range(new), "-"))
    source = {"path": str(path), "answer_pattern": "#### (.+)"}
    (_, one) = load_sets({"set": source}, config, task, load_tokenizer(config.model, task), task)
    assert (one.in_domain, one.trained_on, len(one.prompts)) == (in_domain, 2, new + 1)


def test_a_first_column_of_which_all_was_trained_on_is_refused(own: tuple[RunConfig, Maths], tmp_path: Path) -> None:
    """And of which a part was, that part is left out: it is in domain, although another task than the trained one."""
    config, trained = own
    for numbers, left in ((range(30, 40), 0), (range(30, 42), 2)):
        path = write(tmp_path / "own.jsonl", *sums(numbers, "+"))
        task = Maths(None, {"path": str(path), "answer_pattern": "#### (.+)"})
        if not left:
            with pytest.raises(ConfigError, match="trained on every held-out problem; name another --config"):
                load_sets({}, config, task, load_tokenizer(config.model, task), trained)
            continue
        (one,) = load_sets({}, config, task, load_tokenizer(config.model, task), trained)
        assert (one.key, one.in_domain, len(one.prompts), one.trained_on) == (OWN, True, left, 10)


def test_one_set_of_processes_checks_word_problems_and_all_sets(own: tuple[RunConfig, Maths], tmp_path: Path) -> None:
    config, maths = own
    settings = TaskConfig(name="word-problems", args={"problems": 8, "heldout": 4})
    config = config.model_copy(update={"task": settings})
    task = make_task(config)
    assert isinstance(task, InWords)
    sources = {
        sign: {"path": str(write(tmp_path / f"{n}.jsonl", *sums(range(3), sign)))} for n, sign in enumerate("-*")
    }
    sets = load_sets(sources, config, task, load_tokenizer(config.model, maths), task)
    assert [s.key for s in sets] == [OWN, "-", "*"]
    assert [s.task.checker is task.checker for s in sets if isinstance(s.task, InWords)] == [True] * 3


def test_prompts_that_do_not_fit_are_told_by_set(
    own: tuple[RunConfig, Maths], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, task = own
    long = {"question": "What is 1 + 1 ? " * 400, "answer": "5"}
    path = write(tmp_path / "long.jsonl", long, {"question": "What is 1 - 1 ?", "answer": "5"})
    sets = load_sets({"long": {"path": str(path)}}, config, task, load_tokenizer(config.model, task), task)
    assert [(len(s.prompts), s.too_long) for s in sets] == [(20, 0), (1, 1)]
    assert capsys.readouterr().err.startswith("left out of long: 1 of 2 prompts, over 900 tokens (the longest has ")


ROWS: dict[str, tuple[dict[str, Any], str, str]] = {
    "gsm8k": ({"question": "Two and two?", "answer": "2+2=<<2+2=4>>4\n#### 4"}, "Two and two?", "4"),
    "math500": (
        {
            "problem": "Half?",
            "solution": "It is $\\boxed{\\frac{1}{2}}$.",
            "answer": "\\frac{1}{2}",
            "subject": "Algebra",
            "level": 2,
            "unique_id": "test/algebra/1.json",
        },
        "Half?",
        "\\frac{1}{2}",
    ),
    "amc23": ({"id": 0, "question": "Miles?", "answer": "27", "url": "https://x.org/1"}, "Miles?", "27"),
    "minerva": ({"question": "Angle, in degrees?", "answer": "41.8"}, "Angle, in degrees?", "41.8"),
    "agieval-math": (
        {"query": "Q: Let $f$ be\n\\[x.\\]Find A: or B.\nA: The answer is", "answer": "(3,4]"},
        "Let $f$ be\n\\[x.\\]Find A: or B.",
        "(3,4]",
    ),
    "svamp": (
        {
            "ID": "chal-777",
            "Body": "There are 290 bananas in 2 groups",
            "Question": "How big is each group?",
            "Equation": "( 290.0 / 2.0 )",
            "Answer": "145",
            "Type": "Common-Division",
            "question_concat": "There are 290 bananas in 2 groups How big is each group?",
        },
        "There are 290 bananas in 2 groups How big is each group?",
        "145",
    ),
}
"""A row of each set in the columns that it has on the hub, its problem, and its answer."""


def test_the_shipped_suite_reads_the_columns_that_its_sets_have(tmp_path: Path) -> None:
    assert suites() == ["maths"] and (SUITES / "maths.yaml").is_file()
    for n, (name, (row, _, _)) in enumerate(ROWS.items()):
        write(tmp_path / name / "test.jsonl" if n % 2 else tmp_path / f"{name}.jsonl", row)
    sources = read_suite("maths", tmp_path)
    assert list(sources) == list(ROWS)
    for name, source in sources.items():
        (prompt,) = Maths(None, source).prompts("heldout")
        assert (prompt.text, prompt.answer) == ROWS[name][1:], name


def test_sets_that_are_not_in_the_folder_are_left_out(
    own: tuple[RunConfig, Maths], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "svamp" / "test.jsonl", ROWS["svamp"][0])
    write(tmp_path / "gsm8k" / "train.jsonl", ROWS["gsm8k"][0])
    sources = read_suite("maths", tmp_path)
    assert [(name, source["path"], source["subset"]) for name, source in sources.items()] == [
        ("gsm8k", str(tmp_path / "gsm8k"), None),
        ("svamp", str(tmp_path / "svamp"), None),
    ]
    assert capsys.readouterr().err == f"left out, not in {tmp_path}: math500, amc23, minerva, agieval-math\n"
    with pytest.raises(ConfigError, match=r"^suite: gsm8k.split: .*test.jsonl does not exist; splits in that folder: "):
        load_sets({"gsm8k": sources["gsm8k"]}, *own, load_tokenizer(own[0].model, own[1]), own[1])
