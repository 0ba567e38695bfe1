"""What happened on each problem, for every method of a comparison: collected from runs, and kept in a small file.

A row of the table is a problem under a method and a seed: the columns of `studies.statistics`, with the method's name
as `arm`, and `split`, "validation" or "heldout". Thresholds, the best of several prices and fitted scores are chosen on
the validation problems, which no run is trained on; all that is reported is measured on the held-out ones.

The file is jsonl, compressed. For each seed and split there is one line of {"seed", "split", "ids", "cloud"}, and for
each method one of {"seed", "split", "method", "score", "local"}, and for a trained model, of the held-out problems as
trained, "called" and "correct"; all lists in the order of the ids. A score of null is -inf: never called by choice.
"""

from __future__ import annotations

import json
import lzma
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from gapg.data import split_validation
from gapg.files import replacing
from gapg.tasks.base import Prompt
from studies.arms import Entrant, Finished, Rows
from studies.routers import doubt
from studies.stacked import features, stacked_score
from studies.statistics import DIFFERENT, FloatArray, of_answers, of_run

VALIDATION, HELDOUT = "validation", "heldout"
DIGITS = 3
"""Significant digits of a kept score. Figures are computed from what is kept, so that anybody can compute them."""
TRAINED = ("called", "correct")

Router = Callable[[Finished, str, Rows], tuple[FloatArray, FloatArray]]
"""(run, split, its greedy answers with help masked) -> (score [n], right without a call [n])."""


def stacked(name: str) -> str:
    return f"{name}, stacked"


def right_alone(answers: Rows) -> FloatArray:
    return np.array([float(row["outcome"] == "local_correct") for row in answers])


def log_prob_router(key: str) -> Router:
    """Calls where a log-prob of the answer is low."""
    return lambda run, split, answers: (doubt(answers, key), right_alone(answers))


# ---- collected


def collect(
    runs: Sequence[Finished], entrants: Sequence[Entrant], routers: Mapping[str, Mapping[str, Router]]
) -> pd.DataFrame:
    """The table of all entrants, of the routers of each label's runs, and of every entrant that sees its answer with
    the answer's log-probs and length beside its score. Problems on which the cloud failed are left out of all.

    Raises ValueError where runs or predictions are of different problems, or the cloud was not the same for all.
    """
    parts: list[pd.DataFrame] = []
    for run in runs:
        answers = {VALIDATION: validation_answers(run), HELDOUT: run.rows("heldout-masked")}
        alone = {split: of_answers(rows) for split, rows in answers.items()}
        for entrant in (e for e in entrants if e.arm(run.arm.seed).label == run.arm.label):
            parts += _of_entrant(run, entrant, answers, alone)
        for name, router in routers.get(run.arm.label, {}).items():
            parts += [
                _part(run, name, split, alone[split], *router(run, split, rows)) for split, rows in answers.items()
            ]
    table = pd.concat(parts, ignore_index=True)
    _check(table)
    failed = table["cloud"].isna() | (table["called"].notna() & table["correct"].isna())
    return table[~table["id"].isin(table.loc[failed, "id"])].reset_index(drop=True)


def validation_answers(run: Finished) -> Rows:
    """The run's greedy answers to its validation problems, with help masked."""
    rows = run.rows("train-masked")
    prompts = [Prompt(row["id"], "", "", "") for row in rows]
    kept = {p.id for p in split_validation(prompts, run.config.eval.problems, run.config.seed)[1]}
    return [row for row in rows if row["id"] in kept]


def _of_entrant(
    run: Finished, entrant: Entrant, answers: Mapping[str, Rows], alone: Mapping[str, pd.DataFrame]
) -> list[pd.DataFrame]:
    found = {split: _scored(run, entrant, split, alone[split]) for split in answers}
    # what the model did as trained is its own, and not that of a router put on it
    base = alone if entrant.predictions else {**alone, HELDOUT: of_run(run)}
    parts = [_part(run, entrant.name, split, base[split], *found[split]) for split in answers]
    if entrant.sees == "answer":
        # the margin is among the features already
        more = {split: [score] if entrant.predictions else [] for split, (score, _) in found.items()}
        x = {split: features(_judged(run, entrant, split, rows), more[split]) for split, rows in answers.items()}
        scores = stacked_score(x[VALIDATION], 1 - found[VALIDATION][1], list(x.values()))
        for split, score in zip(x, scores, strict=True):
            parts.append(_part(run, stacked(entrant.name), split, alone[split], score, found[split][1]))
    return parts


def _judged(run: Finished, entrant: Entrant, split: str, answers: Rows) -> Rows:
    """The answers that an entrant decides on: the run's, or in their place those of a model of its own."""
    made = run.rows(entrant.predictions.name) if entrant.predictions else []
    own = {row["id"]: row for row in made if row["split"] == split and "response" in row}
    return [own.get(row["id"], row) for row in answers]


def _scored(run: Finished, entrant: Entrant, split: str, base: pd.DataFrame) -> tuple[FloatArray, FloatArray]:
    """(score, right without a call) of an entrant on the problems of `base`, in their order."""
    if entrant.predictions is None:
        return base["score"].to_numpy(), base["local"].to_numpy()
    rows = {row["id"]: row for row in run.rows(entrant.predictions.name) if row["split"] == split}
    if rows.keys() != set(base["id"]):
        raise ValueError(f"{entrant.name}: its predictions are not of the {len(base)} {split} problems of {run.folder}")
    score = np.array([rows[i]["score"] for i in base["id"]], dtype=np.float64)
    if not np.isfinite(score).all():
        raise ValueError(f"{entrant.name}: a score of its predictions is no finite number ({run.folder})")
    local = [rows[i].get("local", own) for i, own in zip(base["id"], base["local"], strict=True)]
    return score, np.array(local, dtype=np.float64)


def _part(
    run: Finished, name: str, split: str, base: pd.DataFrame, score: FloatArray, local: FloatArray
) -> pd.DataFrame:
    return base.assign(arm=name, seed=run.arm.seed, split=split, score=score, local=local)


def _check(table: pd.DataFrame) -> None:
    for (_, split), part in table.groupby(["seed", "split"], sort=False):
        seen = [tuple(ids) for _, ids in part.groupby("arm", sort=False)["id"]]
        if any(ids != seen[0] for ids in seen):
            raise ValueError(DIFFERENT if split == HELDOUT else DIFFERENT.replace("held-out", "validation"))
        if (part.groupby("id")["cloud"].nunique() > 1).any():
            raise ValueError("the cloud answered the same problems differently in different runs: they do not compare")


# ---- kept


def write_problems(path: Path, table: pd.DataFrame) -> None:
    """Writes the table, whole. Raises as `gapg.files.replacing` does."""
    lines: list[dict[str, Any]] = []
    for (seed, split), part in table.groupby(["seed", "split"], sort=False):
        about = {"seed": int(seed), "split": split}
        methods = list(part.groupby("arm", sort=False))
        first = methods[0][1]
        lines.append({**about, "ids": first["id"].tolist(), "cloud": _compact(first["cloud"])})
        for name, rows in methods:
            score = [float(f"{x:.{DIGITS}g}") if np.isfinite(x) else None for x in rows["score"]]
            line = {**about, "method": name, "score": score, "local": _compact(rows["local"])}
            if rows["called"].notna().all():
                line |= {key: _compact(rows[key]) for key in TRAINED}
            lines.append(line)
    text = "".join(json.dumps(line, separators=(",", ":"), allow_nan=False) + "\n" for line in lines)
    with replacing(path) as partial:
        # not gzip: methods put on one model share its answers, far apart in the file
        partial.write_bytes(lzma.compress(text.encode(), preset=9))


def _compact(values: pd.Series) -> str | list[float]:
    """Of zeros and ones a text of them."""
    numbers = values.tolist()
    return "".join(str(int(x)) for x in numbers) if set(numbers) <= {0.0, 1.0} else [round(x, 6) for x in numbers]


def read_problems(path: Path) -> pd.DataFrame:
    """What `write_problems` wrote."""
    parts: list[pd.DataFrame] = []
    of_split: dict[tuple[int, str], tuple[list[str], FloatArray]] = {}
    for line in map(json.loads, lzma.decompress(path.read_bytes()).decode().splitlines()):
        at = line["seed"], line["split"]
        if "ids" in line:
            of_split[at] = line["ids"], _numbers(line["cloud"])
            continue
        ids, cloud = of_split[at]
        score = np.array([-np.inf if x is None else x for x in line["score"]], dtype=np.float64)
        columns = {"id": ids, "score": score, "local": _numbers(line["local"]), "cloud": cloud}
        columns |= {key: _numbers(line[key]) if key in line else np.nan for key in TRAINED}
        parts.append(pd.DataFrame({"arm": line["method"], "seed": at[0], "split": at[1], **columns}))
    return pd.concat(parts, ignore_index=True)


def _numbers(values: str | list[float]) -> FloatArray:
    return np.array([float(x) for x in values], dtype=np.float64)
