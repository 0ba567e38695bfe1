"""Word problems and competition maths (GSM8K, MATH and the like): from the hub or from jsonl, checked by math-verify.

task:
  name: maths
  args:
    train: {path: openai/gsm8k, subset: main, split: train, answer_pattern: '#### (.+)'}
    heldout: {split: test}
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from gapg.rollout.records import OracleQuestion
from gapg.tasks import find_object
from gapg.tasks.base import ANSWER_CLOSE, ANSWER_OPEN, HELP_PHRASE, Demonstration, Prompt, Split, Verdict
from gapg.tasks.mathcheck import MathChecker
from gapg.tasks.templates import ANSWER_ONLY, ENDINGS, render_instruction

_HELP = 0.2
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Source:
    """Where a split comes from, and which columns hold what.

    path: a jsonl file, a folder of `<split>.jsonl`, a data set on the hub (then also `subset`, its configuration), or
        the import path of a function of your own, `mypkg.mydata:rows`, which maps a split to rows with those columns.
    answer_pattern: a regular expression whose first group is the answer within its column (GSM8K: `#### (.+)`).
    Without one the answer is the last `\\boxed{…}` of the column, or all of it where nothing is boxed.
    limit: the first so many rows only.
    """

    path: str
    split: str = "train"
    subset: str | None = None
    question: str = "question"
    answer: str = "answer"
    answer_pattern: str | None = None
    limit: int | None = None


class Maths:
    """The task. `heldout` takes from `train` whatever it does not say itself, save `split` (test) and `limit`.

    Problems are known by the hash of their text; a training problem that is also held out is dropped, with a warning.
    seconds, max_chars: limits on checking one answer, beyond which it is LIMIT.
    Raises ValueError, before anything slow but the download, on data that are not there or lack a column.
    """

    name = "maths"

    def __init__(
        self,
        train: str | Mapping[str, Any],
        heldout: str | Mapping[str, Any],
        seconds: float = 2.0,
        max_chars: int = 20_000,
    ) -> None:
        source = _source("train", train, {})
        inherited = {k: getattr(source, k) for k in ("path", "subset", "question", "answer", "answer_pattern")}
        held = _source("heldout", heldout, inherited | {"split": "test"})
        if replace(held, limit=None) == replace(source, limit=None):
            raise ValueError("task.args.heldout: is the same data as task.args.train; name another path or split")
        self._solutions: dict[str, str] = {}
        loaded, held_out = self._load("train", source), self._load("heldout", held)
        # Whatever the rows say, nothing is trained on that is evaluated on.
        trained = {key: prompt for key, prompt in loaded.items() if key not in held_out}
        if dropped := len(loaded) - len(trained):
            _log.warning("%d training problems are also held out: dropped from training", dropped)
        if not trained:
            raise ValueError("task.args.train: every problem is also in task.args.heldout; name another path or split")
        self._splits: dict[Split, tuple[Prompt, ...]] = {
            "train": tuple(trained.values()),
            "heldout": tuple(held_out.values()),
        }
        self.checker = MathChecker(seconds, max_chars)

    def _load(self, which: Split, source: Source) -> dict[str, Prompt]:
        where = f"task.args.{which}"
        rows = _rows(where, source)
        if source.limit is not None:
            rows = rows[: source.limit]
        if not rows:
            raise ValueError(f"{where}.path: {source.path} has no rows")
        found: dict[str, Prompt] = {}
        for n, row in enumerate(rows, 1):
            text, answer = (_cell(where, source, key, row, n) for key in ("question", "answer"))
            key = hashlib.sha256(" ".join(text.lower().split()).encode()).hexdigest()[:16]
            gold = _gold(where, source, answer, n)
            found.setdefault(key, Prompt(key, text, gold, self.name))
            if which == "train" and answer != gold:
                self._solutions.setdefault(key, _worked(answer, source.answer_pattern))
        return found

    def prompts(self, split: Split) -> Sequence[Prompt]:
        """Problems of a split in the order of the data, repeats removed."""
        return self._splits[split]

    def render(self, prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """One user turn of the model's chat template: the problem, then the two endings. Plain text without one."""
        return render_instruction(f"{prompt.text}\n\n{ENDINGS}", tokenizer)

    def verify(self, prompt: Prompt, answers: Sequence[str]) -> list[Verdict]:
        """math-verify's verdicts against the gold, in a worker process under limits."""
        return self.checker.check(prompt.answer, answers)

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

    def question(self, prompt: Prompt) -> OracleQuestion:
        """One user message: the problem, and a request for an answer block."""
        return OracleQuestion(prompt.id, ({"role": "user", "content": f"{prompt.text}\n\n{ANSWER_ONLY}"},))


def _source(which: Split, given: str | Mapping[str, Any], defaults: Mapping[str, Any]) -> Source:
    settings = {**defaults, **({"path": given} if isinstance(given, str) else given)}
    known = [f.name for f in fields(Source)]
    if unknown := sorted(set(settings) - set(known)):
        raise ValueError(f"task.args.{which}.{unknown[0]}: unknown key; known are {', '.join(known)}")
    if "path" not in settings:
        raise ValueError(f"task.args.{which}.path: required; a jsonl file, a folder of jsonl files or a hub data set")
    source = Source(**settings)
    if source.answer_pattern is not None:
        try:
            groups = re.compile(source.answer_pattern).groups
        except re.error as error:
            raise ValueError(f"task.args.{which}.answer_pattern: no regular expression: {error}") from None
        if groups < 1:
            raise ValueError(f"task.args.{which}.answer_pattern: needs a group around the answer, like '#### (.+)'")
    return source


def _rows(where: str, source: Source) -> Sequence[Mapping[str, Any]]:
    path = Path(source.path).expanduser()
    if path.is_dir():
        path = path / f"{source.split}.jsonl"
        if not path.is_file():
            present = ", ".join(sorted(p.stem for p in path.parent.glob("*.jsonl"))) or "none"
            raise ValueError(f"{where}.split: {path} does not exist; splits in that folder: {present}")
    if path.is_file():
        return _jsonl(where, path)
    if re.fullmatch(r"[\w.]+:\w+", source.path):
        return list(find_object(source.path, f"{where}.path")(source.split))
    if path.suffix in (".jsonl", ".json") or source.path.startswith((".", "/", "~")):
        raise ValueError(f"{where}.path: {source.path} does not exist")
    return _hub(where, source)


def _jsonl(where: str, path: Path) -> list[Mapping[str, Any]]:
    rows: list[Mapping[str, Any]] = []
    with path.open(encoding="utf-8") as lines:
        for n, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}.path: {path}:{n}: not JSON: {error.msg}") from None
            if not isinstance(row, dict):
                raise ValueError(f"{where}.path: {path}:{n}: expected an object, got {type(row).__name__}")
            rows.append(row)
    return rows


def _hub(where: str, source: Source) -> Sequence[Mapping[str, Any]]:
    import datasets  # slow to import, and not needed for local files

    try:
        rows: list[Mapping[str, Any]] = list(datasets.load_dataset(source.path, source.subset, split=source.split))
        return rows
    except Exception as error:  # hub, network and parser errors have no common type
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{where}.path: cannot load {source.path!r} (subset {source.subset}, split {source.split}): {reason}; "
            "name a local jsonl file instead if the hub cannot be reached"
        ) from None


def _cell(where: str, source: Source, key: str, row: Mapping[str, Any], n: int) -> str:
    column = getattr(source, key)
    if column not in row:
        raise ValueError(
            f"{where}.{key}: row {n} of {source.path} has no column {column!r}; it has {', '.join(map(str, row))}; "
            f"set {where}.{key} to one of them"
        )
    value = str(row[column]).strip() if isinstance(row[column], str | int | float) else ""
    if not value:
        raise ValueError(f"{where}.{key}: row {n} of {source.path} has nothing in column {column!r}")
    return value


def _gold(where: str, source: Source, text: str, n: int) -> str:
    if source.answer_pattern is None:
        return _last_boxed(text) or text
    matches = list(re.finditer(source.answer_pattern, text))
    if not matches or not matches[-1][1]:
        raise ValueError(
            f"{where}.answer_pattern: {source.answer_pattern!r} matches nothing in row {n} of {source.path}, "
            f"which ends in {text[-60:]!r}"
        )
    return matches[-1][1].strip()


def _worked(solution: str, answer_pattern: str | None) -> str:
    """A solution without its final answer line and without GSM8K's calculator notes (`<<48/2=24>>`)."""
    if answer_pattern is not None:
        solution = re.sub(answer_pattern, "", solution)
    return re.sub(r"<<[^<>]*>>", "", solution).strip()


def _last_boxed(text: str) -> str | None:
    """The inside of the last `\\boxed{…}`, braces balanced."""
    start = text.rfind("\\boxed{")
    depth = 0
    for at in range(start + len("\\boxed"), len(text) if start >= 0 else 0):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if depth == 0:
            return text[start + len("\\boxed{") : at].strip()
    return None
