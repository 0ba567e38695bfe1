"""A model on several sets of maths problems, those of its config's task first: one table, and one suite.json.

In domain is the task that the model was trained by, and a set that shares problems with it. What was trained on is left
out of a set. Problems are the same whose texts are, whatever task they come from.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from gapg.build import task_prompts
from gapg.config import PRESETS, RunConfig, read_tree
from gapg.console import say, warn
from gapg.errors import ConfigError
from gapg.evaluation.heldout import Setup, heldout_prompts, measure, say_usage
from gapg.evaluation.report import print_suite
from gapg.files import write_whole
from gapg.jsonl import to_json
from gapg.judge import Group
from gapg.runs.outage import check_evaluation, failures
from gapg.tasks.base import Prompt, Task
from gapg.tasks.in_words import InWords
from gapg.tasks.maths import Maths, identity
from gapg_rollout.records import Oracle, OracleUsage

SUITES = PRESETS / "suites"
FILE = "suite.json"
OWN = "own"
"""The folder of the config's own task, and its key in suite.json: no set of a suite is called so."""
SHARED = 0.01
"""The part of a set's problems that makes it one in domain where they are the trained task's too. Collections of maths
problems repeat each other here and there: fewer move an accuracy by less than 0.01, and chance moves that of a thousand
problems by 0.03."""
LOST = 10
"""Questions in a row, over sets, that the cloud failed before it is taken to be down, where it did not say so: a set
may have two calls, and both be slow."""
FIGURES = ("accuracy", "local_accuracy", "call_fraction")

Sources = Mapping[str, Mapping[str, Any]]
"""A suite: to each set's name the keys of `gapg.tasks.maths.Source`."""


@dataclass(frozen=True, slots=True)
class ProblemSet:
    """Problems to evaluate on. key: its folder and its key in suite.json. name: what it is called in the table.

    trained_on, too_long: how many problems it had that the model was trained on, and that were over
    `max_prompt_tokens`. source: the keys of `gapg.tasks.maths.Source`; of the config's own task its arguments.
    """

    key: str
    name: str
    task: Task
    prompts: Sequence[Prompt]
    in_domain: bool = False
    trained_on: int = 0
    too_long: int = 0
    source: Mapping[str, Any] = field(default_factory=dict)


def suites() -> list[str]:
    return sorted(path.stem for path in SUITES.glob("*.yaml"))


def read_suite(name: str, data: Path | None = None) -> Sources:
    """The suite of this name, or a YAML file. data: a folder that has the sets, `gsm8k/test.jsonl` or `gsm8k.jsonl`.

    Says which sets are not in `data`, and so left out. Raises ConfigError, also where none is.
    """
    path = SUITES / f"{name}.yaml" if name in suites() else Path(name)
    if not os.path.isfile(path):
        raise ConfigError(f"--suite {name}: is neither a file nor a suite; suites: {', '.join(suites())}")
    tree = read_tree(path)
    for key, source in tree.items():
        if not isinstance(key, str) or not re.fullmatch(r"\w[\w-]{0,59}", key) or key == OWN:
            raise ConfigError(
                f"{path}: {key!r:.80} is no name for a set: use up to 60 letters, digits, - and _, and not {OWN!r}"
            )
        if not isinstance(source, Mapping):
            raise ConfigError(
                f"{path}: {key}: must be keys and values such as {{path: …, split: …}}, not {source!r:.60}"
            )
    if not tree:
        raise ConfigError(f"{path}: names no set; write one a line, as in `mine: {{path: mine.jsonl, answer: gold}}`")
    return tree if data is None else _from_folder(tree, data)


def _from_folder(sources: Sources, data: Path) -> Sources:
    if not os.path.isdir(data):
        raise ConfigError(f"--suite-data {data}: no such folder; name the one in which the sets lie")
    places = {name: (data / name, data / f"{name}.jsonl", data / f"{name}.jsonl.gz") for name in sources}
    found = {name: next(filter(os.path.exists, paths), None) for name, paths in places.items()}
    missing = ", ".join(name for name, path in found.items() if path is None)
    if not any(found.values()):
        raise ConfigError(
            f"--suite-data {data}: has none of the sets {missing}: put NAME/SPLIT.jsonl or NAME.jsonl there, as in "
            f"{places[next(iter(sources))][0]}/test.jsonl, or leave it out to read them from the hub"
        )
    if missing:
        say(f"left out, not in {data}: {missing}")
    return {n: {**sources[n], "path": str(path), "subset": None} for n, path in found.items() if path is not None}


def load_sets(
    sources: Sources, config: RunConfig, task: Task, tokenizer: PreTrainedTokenizerBase, trained: Task
) -> list[ProblemSet]:
    """The held-out problems of the config's task, then each set: what of them fits and was not trained on.

    trained: the task that the model was trained by, which may be another than the config's.
    A set that is what the config's task holds out gives the first one its name. Raises ConfigError.
    """
    taught = _texts(task_prompts(trained, "train"))
    known = taught | _texts(task_prompts(trained, "heldout"))
    heldout = _texts(task_prompts(task, "heldout"))
    args = config.task.model_dump(mode="json")["args"]
    own = replace(_fitting(config, OWN, task.name, task, tokenizer), in_domain=True, source=args)
    sets = [own if trained is task else _compared(own, taught, known)]
    if not sets[0].prompts:
        raise ConfigError(f"task {task.name!r}: the model was trained on every held-out problem; name another --config")
    checker = task.checker if isinstance(task, InWords) else None
    for name, source in sources.items():
        other = _load(name, source)
        # one set of worker processes for all
        checker = other.checker = checker or other.checker
        if _texts(other.prompts("heldout")) == heldout:
            sets[0] = replace(sets[0], name=name)
            continue
        # `test` is the split that Maths reads of a set that names none
        read = {"path": source["path"], "subset": None, "split": "test", "limit": None, **source}
        one = _compared(replace(_fitting(config, name, name, other, tokenizer), source=read), taught, known)
        if one.prompts:
            sets.append(one)
    return sets


def _fitting(config: RunConfig, key: str, name: str, task: Task, tokenizer: PreTrainedTokenizerBase) -> ProblemSet:
    prompts = heldout_prompts(config, task, tokenizer, None if key == OWN else name)
    too_long = len(task_prompts(task, "heldout")[: config.eval.heldout]) - len(prompts)
    return ProblemSet(key, name, task, prompts, too_long=too_long)


def _texts(prompts: Sequence[Prompt]) -> set[str]:
    return {identity(p.text) for p in prompts}


def _compared(one: ProblemSet, taught: Set[str], known: Set[str]) -> ProblemSet:
    """The set beside the trained task: without problems that were `taught`, in domain where enough of it is `known`."""
    prompts = [p for p in one.prompts if identity(p.text) not in taught]
    if left_out := len(one.prompts) - len(prompts):
        warn(f"{one.name}: the model was trained on {left_out} of {len(one.prompts)} problems: left out")
    texts = _texts(task_prompts(one.task, "heldout"))
    in_domain = len(texts & known) >= SHARED * len(texts)
    return replace(one, prompts=prompts, in_domain=in_domain, trained_on=left_out)


def _load(name: str, source: Mapping[str, Any]) -> Maths:
    try:
        return Maths(None, source)
    except ValueError as error:
        # the task speaks of its own keys, and knows no --suite-data
        text = " ".join(str(error).split()).replace("task.args.heldout", name)
        text = text.replace("name a local jsonl file instead", "give --suite-data FOLDER, which has its jsonl,")
        raise ConfigError(f"suite: {text}") from None


def evaluate_suite(
    setup: Setup, folder: Path, places: Sequence[Path], sets: Sequence[ProblemSet], oracles: Sequence[Oracle]
) -> None:
    """Each set in its place, and suite.json of those so far in `folder`, written as it is done; then the table.

    oracles: one for each set, which may be the same.
    Raises OracleDown, after all is written, where the cloud failed every question; at once, without the other sets,
    where it failed every one of a set and said that it answers no other, or failed `LOST` in a row.
    """
    (folder / FILE).unlink(missing_ok=True)  # an older one would not be of these sets' files
    summaries, judged, lost = {}, list[Group](), set[str]()
    for done, (one, place, oracle) in enumerate(zip(sets, places, oracles, strict=True), 1):
        summaries[one.key], groups = measure(setup, place, one.task, oracle, one.prompts, one.name, oracle.usage)
        judged += groups
        left = [s.key for s in sets[done:]]
        state = {"oracle": setup.config.oracle.kind, "complete": not left, "not_evaluated": left}
        suite = {**setup.about, **state, **together(sets[:done], summaries)}
        write_whole(folder / FILE, to_json(suite, indent=1) + "\n")
        if down := _is_down(groups, lost):
            break
    print_suite(suite)
    say_usage(suite["oracle_usage"])
    say(str(folder / FILE))
    if left:
        warn(f"stopped after {one.name}, as the cloud answers nothing; not evaluated: {', '.join(left)}")
    check_evaluation(groups if down else judged)


def _is_down(groups: Sequence[Group], lost: set[str]) -> bool:
    """Whether the cloud failed every question of a set, not for what is in them or in the replies, and so do others.

    lost: the questions that it failed since it last answered one, by their problems' ids; those of the set are added.
    """
    asked = [g for g in groups if g.oracle_asked]
    failed = {g.prompt.id for g in asked if g.oracle_score is None and not all(a.own for a in failures([g]))}
    if any(g.oracle_score is not None for g in asked):
        lost.clear()
        return False
    lost |= failed
    return bool(failed) and (len(lost) >= LOST or any(a.permanent for a in failures(asked)))


def together(sets: Sequence[ProblemSet], summaries: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What suite.json says of these sets' summaries, by their keys; `mean` is the plain mean over the sets `averaged`,
    those out of domain, NaN (null) where one of them is not known."""
    others = [one.key for one in sets if not one.in_domain]
    shown = [
        {"key": s.key, "name": s.name, "in_domain": s.in_domain, "n": len(s.prompts)}
        | {"trained_on": s.trained_on, "too_long": s.too_long, "source": s.source}
        for s in sets
    ]
    rows = []
    for i, named in enumerate(summaries[OWN]["rows"]):
        cells = {key: {k: v for k, v in s["rows"][i].items() if k != "name"} for key, s in summaries.items()}
        rows.append({"name": named["name"], "sets": cells, "mean": _mean(cells, others)})
    decision = {
        key: {k: v for k, v in s["decision"].items() if k != "bins"} for key, s in summaries.items() if "decision" in s
    }
    if decision:
        cells = {
            key: {"n": d["n"]} | {f"local_accuracy{end}": d[f"right{end}"] for end in ("", "_low", "_high")}
            for key, d in decision.items()
        }
        rows.append({"name": "alone, greedy", "sets": cells, "mean": _mean(cells, others)})
    keys = OracleUsage.__dataclass_fields__
    usage = {key: sum(s["oracle_usage"][key] for s in summaries.values()) for key in keys}
    return {"sets": shown, "averaged": others, "rows": rows, "decision": decision, "oracle_usage": usage}


def _mean(cells: Mapping[str, Mapping[str, Any]], keys: Sequence[str]) -> dict[str, float]:
    own = [figure for figure in FIGURES if all(figure in cell for cell in cells.values())]
    return {figure: sum(cells[key][figure] for key in keys) / len(keys) if keys else math.nan for figure in own}
