"""A model on several sets of maths problems, those of its own task first: one table, and one suite.json.

In domain is the config's own task, and a set that shares problems with it. What was trained on is left out of a set.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
from gapg.runs.outage import check_evaluation
from gapg.tasks.base import Prompt, Task
from gapg.tasks.in_words import InWords
from gapg.tasks.maths import Maths
from gapg_rollout.records import Oracle, OracleUsage

SUITES = PRESETS / "suites"
FILE = "suite.json"
OWN = "in-domain"
"""The folder of the model's own task, and its key in suite.json: no set of a suite is called so."""
FIGURES = ("accuracy", "local_accuracy", "call_fraction")

Sources = Mapping[str, Mapping[str, Any]]
"""A suite: to each set's name the keys of `gapg.tasks.maths.Source`."""


@dataclass(frozen=True, slots=True)
class ProblemSet:
    """Problems to evaluate on. key: its folder and its key in suite.json. name: what it is called in the table.

    trained_on: how many problems it had that are training problems of the model's own task.
    """

    key: str
    name: str
    task: Task
    prompts: Sequence[Prompt]
    in_domain: bool = False
    trained_on: int = 0


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


def load_sets(sources: Sources, config: RunConfig, task: Task, tokenizer: PreTrainedTokenizerBase) -> list[ProblemSet]:
    """The held-out problems of the model's own task, then each set with what of it fits and was not trained on.

    A set that is what the task holds out gives the first one its name. Raises ConfigError.
    """
    trained, heldout = ({p.id for p in task_prompts(task, split)} for split in ("train", "heldout"))
    sets = [ProblemSet(OWN, task.name, task, heldout_prompts(config, task, tokenizer), in_domain=True)]
    checker = task.checker if isinstance(task, InWords) else None
    for name, source in sources.items():
        other = _load(name, source)
        # one set of worker processes for all
        checker = other.checker = checker or other.checker
        ids = {p.id for p in other.prompts("heldout")}
        if ids == heldout:
            sets[0] = replace(sets[0], name=name)
            continue
        fitting = heldout_prompts(config, other, tokenizer, name)
        prompts = [p for p in fitting if p.id not in trained]
        if known := len(fitting) - len(prompts):
            warn(f"{name}: {known} of {len(fitting)} problems are training problems of task {task.name!r}: left out")
        if prompts:
            sets.append(ProblemSet(name, name, other, prompts, not ids.isdisjoint(trained | heldout), known))
    return sets


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
    """Each set in its place, whose files are written as it is done; then the table, and suite.json in `folder`.

    oracles: one for each set, which may be the same.
    Raises OracleDown, after all is written, where the cloud failed every question.
    """
    (folder / FILE).unlink(missing_ok=True)  # an older one would not be of these sets' files
    summaries, judged = {}, list[Group]()
    for one, place, oracle in zip(sets, places, oracles, strict=True):
        summaries[one.key], groups = measure(setup, place, one.task, oracle, one.prompts, one.name, oracle.usage)
        judged += groups
    suite = {**setup.about, "oracle": setup.config.oracle.kind, **together(sets, summaries)}
    write_whole(folder / FILE, to_json(suite, indent=1) + "\n")
    print_suite(suite)
    say_usage(suite["oracle_usage"])
    say(str(folder / FILE))
    check_evaluation(judged)


def together(sets: Sequence[ProblemSet], summaries: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What suite.json says of these sets' summaries, by their keys; `mean` is the plain mean over the sets that are out
    of domain, NaN (null) where one of them is not known."""
    others = [one.key for one in sets if not one.in_domain]
    shown = [
        {"key": s.key, "name": s.name, "in_domain": s.in_domain, "n": len(s.prompts), "trained_on": s.trained_on}
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
    return {"sets": shown, "rows": rows, "decision": decision, "oracle_usage": usage}


def _mean(cells: Mapping[str, Mapping[str, Any]], keys: Sequence[str]) -> dict[str, float]:
    own = [figure for figure in FIGURES if all(figure in cell for cell in cells.values())]
    return {figure: sum(cells[key][figure] for key in keys) / len(keys) if keys else math.nan for figure in own}
