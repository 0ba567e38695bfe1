"""Word problems and competition maths (GSM8K, MATH and the like): from the hub or from jsonl, checked by math-verify.

task:
  name: maths
  args:
    train: {path: openai/gsm8k, subset: main, split: train, answer_pattern: '#### (.+)'}
    heldout: {split: test}
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import random
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from decimal import Decimal
from itertools import islice
from numbers import Integral, Rational, Real
from pathlib import Path
from typing import Any

from gapg.jsonl import check_text, kind, read_data
from gapg.tasks import find_object
from gapg.tasks._mathreading import last_box
from gapg.tasks.base import ANSWER_CLOSE, ANSWER_OPEN, HELP_PHRASE, Demonstration, Prompt, Split
from gapg.tasks.in_words import InWords
from gapg.tasks.mathcheck import MathChecker

_HELP = 0.2
_INHERITED = ("path", "subset", "question", "answer", "question_pattern", "answer_pattern")
"""What of `train` is `heldout`'s too, where that does not say otherwise."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Source:
    """Where a split comes from, and which columns hold what.

    path: a jsonl file, a folder of `<split>.jsonl` (both also as `.jsonl.gz`), a data set on the hub (then also
        `subset`, its configuration), or the import path of a function of your own, `mypkg.mydata:rows`, which maps a
        split to rows with those columns.
    question, answer: columns of texts or numbers. A number of a jsonl keeps its digits.
    question_pattern: a regular expression whose first group is the problem within its column; empty: all of it.
    answer_pattern: one whose first group is the answer within its column (GSM8K: `#### (.+)`). Without one the answer
        is in the last `\\boxed{…}` of the column, or all of it where nothing is boxed.
    limit: the first so many rows only.
    """

    path: str
    split: str = "train"
    subset: str | None = None
    question: str = "question"
    answer: str = "answer"
    question_pattern: str | None = None
    answer_pattern: str | None = None
    limit: int | None = None


class Maths(InWords):
    """The task (Solvable: the gold is known; Demonstrated where the data have worked solutions).

    `heldout` takes from `train` whatever it does not say itself, save `split` (test) and `limit`. With `train` None
    there are no training problems: enough to evaluate a model on.

    Problems are known by the hash of their text, blanks collapsed and accents composed (NFC), the case kept. A training
    problem that is also held out is dropped, with a warning; so is a repeat of a problem, which warns where its answer
    is another one.
    seconds, max_chars: limits on checking one answer, beyond which it is LIMIT (`MathChecker` says how many answers of
        a step may take so long).
    Raises ValueError, before anything slow but the download, naming the key, the line and the column: data that are not
    there or cannot be read, a column that is missing, or holds no text and no finite number.
    """

    name = "maths"

    def __init__(
        self,
        train: str | Mapping[str, Any] | None,
        heldout: str | Mapping[str, Any],
        seconds: float = 2.0,
        max_chars: int = 20_000,
    ) -> None:
        super().__init__(MathChecker(seconds, max_chars))
        source = None if train is None else _source("train", train, {})
        inherited = {} if source is None else {k: getattr(source, k) for k in _INHERITED}
        held = _source("heldout", heldout, inherited | {"split": "test"})
        if source is not None and replace(held, limit=None) == replace(source, limit=None):
            raise ValueError("task.args.heldout: is the same data as task.args.train; name another path or split")
        self._solutions: dict[str, str] = {}
        loaded = {} if source is None else self._load("train", source)
        held_out = self._load("heldout", held)
        # Whatever the rows say, nothing is trained on that is evaluated on.
        trained = {key: prompt for key, prompt in loaded.items() if key not in held_out}
        if dropped := len(loaded) - len(trained):
            _log.warning("%d training problems are also held out: dropped from training", dropped)
        if loaded and not trained:
            raise ValueError("task.args.train: every problem is also in task.args.heldout; name another path or split")
        self._golds = {key: prompt.answer for key, prompt in (loaded | held_out).items()}
        self._splits: dict[Split, tuple[Prompt, ...]] = {
            "train": tuple(trained.values()),
            "heldout": tuple(held_out.values()),
        }

    def _load(self, which: Split, source: Source) -> dict[str, Prompt]:
        where = f"task.args.{which}"
        found: dict[str, Prompt] = {}
        places: dict[str, str] = {}
        clashes: list[str] = []
        for place, row in islice(_rows(where, source), source.limit):
            text, answer = (_cell(where, source, key, row, place) for key in ("question", "answer"))
            if source.question_pattern is not None:
                text = _matched(where, "question", source.question_pattern, text, place)
            key, gold = identity(text), _gold(where, source, answer, place)
            first = found.setdefault(key, Prompt(key, text, gold, self.name))
            if places.setdefault(key, place) != place and first.answer != gold:
                clashes.append(f"{places[key]} ({first.answer!r:.40}) and {place} ({gold!r:.40})")
            if which == "train" and answer != gold:
                self._solutions.setdefault(key, _worked(answer, source.answer_pattern))
        if not found:
            raise ValueError(f"{where}.path: {source.path} has no rows")
        if clashes:
            _log.warning("%s: %d rows repeat a problem with another answer: %s", where, len(clashes), clashes[0])
        return found

    def prompts(self, split: Split) -> Sequence[Prompt]:
        """Problems of a split in the order of the data, repeats removed."""
        return self._splits[split]

    def solve(self, question_id: str) -> str:
        """The gold of this problem, of either split, in an answer block. Raises ValueError for another problem."""
        if question_id not in self._golds:
            raise ValueError(f"no problem of this task has the id {question_id!r}")
        return f"{ANSWER_OPEN} {self._golds[question_id]} {ANSWER_CLOSE}"

    def demonstrations(self, seed: int) -> Sequence[Demonstration]:
        """The data's own worked solutions, ended by an answer block; every fifth breaks off and calls for help.

        Raises ValueError where the answer column holds answers only.
        """
        if not self._solutions:
            raise ValueError("task.args.train: has no worked solutions to demonstrate; set warm_start.demonstrations")
        rng = random.Random(seed)
        made = []
        for prompt in self._splits["train"]:
            if worked := self._solutions.get(prompt.id):
                ending = f"\n{ANSWER_OPEN} {prompt.answer} {ANSWER_CLOSE}"
                if rng.random() < _HELP:
                    worked, ending = worked[: rng.randrange(len(worked))].rsplit(" ", 1)[0], f"\n{HELP_PHRASE}"
                made.append(Demonstration(prompt, worked + ending))
        return made


def identity(text: str) -> str:
    """A problem's id: equal texts but for blanks and how accents are written have the same one."""
    return hashlib.sha256(" ".join(unicodedata.normalize("NFC", text).split()).encode()).hexdigest()[:16]


def _source(which: Split, given: str | Mapping[str, Any], defaults: Mapping[str, Any]) -> Source:
    where = f"task.args.{which}"
    if isinstance(given, str | os.PathLike):
        given = {"path": given}
    if not isinstance(given, Mapping):
        raise ValueError(f"{where}: must be a path, or keys and values such as {{path: …, split: …}}, not {given!r}")
    settings = {**defaults, **given}
    known = [f.name for f in fields(Source)]
    if unknown := sorted(set(settings) - set(known), key=str):
        raise ValueError(f"{where}.{unknown[0]}: unknown key; known are {', '.join(known)}")
    if "path" not in settings:
        raise ValueError(f"{where}.path: required; a jsonl file, a folder of jsonl files or a hub data set")
    if isinstance(settings["path"], os.PathLike):
        settings["path"] = os.fspath(settings["path"])
    for field in fields(Source):
        value = settings.get(field.name, field.default)
        if value is None and field.default is None:
            continue
        if field.name == "limit":
            if type(value) is not int or value < 1:
                raise ValueError(f"{where}.limit: must be a whole number of rows, 1 or more, not {value!r}")
        elif not isinstance(value, str) or not value:
            raise ValueError(f"{where}.{field.name}: must be a text, not {value!r}; in YAML, quote it")
    source = Source(**settings)
    for key in ("question", "answer"):
        if (pattern := getattr(source, f"{key}_pattern")) is None:
            continue
        try:
            groups = re.compile(pattern).groups
        except re.error as error:
            raise ValueError(f"{where}.{key}_pattern: no regular expression: {error}") from None
        if groups < 1:
            raise ValueError(f"{where}.{key}_pattern: needs a group around the {key}, like '#### (.+)'")
    return source


def _rows(where: str, source: Source) -> Iterable[tuple[str, Any]]:
    """Rows, each with where it stands: `file:line`, or `row n of …`."""
    if (path := _local(where, source)) is not None:
        try:
            return [(f"{path}:{n}", row) for n, row in read_data(path)]
        except ValueError as error:
            raise ValueError(f"{where}.path: {error}") from None
    is_function = re.fullmatch(r"[\w.]+:\w+", source.path)
    rows = _function(where, source) if is_function else _hub(where, source)
    return ((f"row {n} of {source.path}", row) for n, row in enumerate(rows, 1))


def _local(where: str, source: Source) -> Path | None:
    """The file that the source names; None where it names none."""
    try:
        path = Path(source.path).expanduser()
        if path.is_dir():
            for file in (path / f"{source.split}.jsonl", path / f"{source.split}.jsonl.gz"):
                if file.exists():
                    return file
            present = sorted({p.name.partition(".jsonl")[0] for p in path.iterdir() if ".jsonl" in p.suffixes})
            raise ValueError(
                f"{where}.split: {path / source.split}.jsonl does not exist; splits in that folder: "
                f"{', '.join(present) or 'none'}"
            )
        if path.exists():
            return path
    except (OSError, RuntimeError) as error:  # the second where the user of a ~user is unknown
        raise ValueError(f"{where}.path: cannot read {source.path}: {getattr(error, 'strerror', error)}") from None
    if path.suffix in (".jsonl", ".json", ".gz") or source.path.startswith((".", "/", "~")):
        raise ValueError(f"{where}.path: {source.path} does not exist")
    return None


def _function(where: str, source: Source) -> Iterable[Any]:
    function = find_object(source.path, f"{where}.path")
    try:
        # a generator's errors too; no further than asked for, it may be long
        return list(islice(function(source.split), source.limit))
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ValueError(f"{where}.path: {source.path}({source.split!r}) fails to give rows: {reason}") from error


def _hub(where: str, source: Source) -> Iterable[Any]:
    import datasets  # slow to import, and not needed for local files

    try:
        return list(islice(datasets.load_dataset(source.path, source.subset, split=source.split), source.limit))
    except Exception as error:  # hub, network and parser errors have no common type
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{where}.path: cannot load {source.path!r} (subset {source.subset}, split {source.split}): {reason}; "
            "name a local jsonl file instead if the hub cannot be reached"
        ) from None


def _cell(where: str, source: Source, key: str, row: Any, place: str) -> str:
    """The text of a row's column, never empty."""
    if not isinstance(row, Mapping):
        raise ValueError(f"{where}.path: {place}: expected an object with columns, got {kind(row)}")
    column = getattr(source, key)
    if column not in row:
        raise ValueError(
            f"{where}.{key}: {place} has no column {column!r}; it has {', '.join(map(str, row)) or 'none'}; "
            f"set {where}.{key} to one of them"
        )
    value = row[column]
    text = value.strip() if isinstance(value, str) else _digits(value)
    if text is None:
        raise ValueError(
            f"{where}.{key}: {place} has {kind(value)} in column {column!r}, where a text or a number is needed; "
            f"mend or drop the row, or name a function of your own as {where}.path (mypkg.mydata:rows)"
        )
    if not text:
        raise ValueError(f"{where}.{key}: {place} has nothing in column {column!r}; fill it in or drop the row")
    try:
        check_text(text)
    except ValueError as error:
        raise ValueError(f"{where}.{key}: {place} has, in column {column!r}, {error}") from None
    return str(text)


def _digits(value: object) -> str | None:
    """The digits of a finite number, of whichever type Python, NumPy and the hub have them; None of all else."""
    if isinstance(value, bool):
        return None
    if isinstance(value, Integral):
        return format(Decimal(int(value)), "f")  # str() refuses more than 4,300 digits
    if isinstance(value, Rational):
        return str(value)
    if isinstance(value, Decimal):
        return str(value) if value.is_finite() else None
    return format(Decimal(str(value)), "f") if isinstance(value, Real) and math.isfinite(value) else None


def _gold(where: str, source: Source, text: str, place: str) -> str:
    if text.lower() in ("nan", "null"):
        raise ValueError(
            f"{where}.answer: {place} has {text!r}, which an export writes for an empty cell; drop the row"
        )
    if source.answer_pattern is None:
        boxed = last_box(text)
        if boxed == "":
            raise ValueError(f"{where}.answer: {place} has an empty \\boxed{{}}, which ends in {text[-60:]!r}")
        return boxed or text
    return _matched(where, "answer", source.answer_pattern, text, place)


def _matched(where: str, key: str, pattern: str, text: str, place: str) -> str:
    """The first group of the pattern's last match, never empty."""
    matches = list(re.finditer(pattern, text))
    found = (matches[-1][1] or "").strip() if matches else ""
    if not found:
        raise ValueError(f"{where}.{key}_pattern: {pattern!r} finds no {key} in {place}, which ends in {text[-60:]!r}")
    return found


def _worked(solution: str, answer_pattern: str | None) -> str:
    """A solution without its final answer line and without GSM8K's calculator notes (`<<48/2=24>>`)."""
    if answer_pattern is not None:
        solution = re.sub(answer_pattern, "", solution)
    return re.sub(r"<<[^<>]*>>", "", solution).strip()
