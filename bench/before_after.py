"""Models on a suite of maths sets, side by side: as they came, after a warm start, after training.

    python bench/before_after.py runs/arithmetic-smollm2/warm-start runs/arithmetic-smollm2 --suite-data DATA
    python bench/before_after.py A B --suite-data DATA --eval.heldout 150      # any key of the config

Each is evaluated by `gapg eval --suite`, in the order given, with the config of the last one's run: the same decoding,
and the same problems, less those that a model's own run trained it on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import record
from gapg.commands.cli import main as gapg
from gapg.commands.target import find_model
from gapg.files import write_whole

Row = dict[str, Any]


def evaluated(model: Path, options: Sequence[str], folder: Path) -> Row:
    """What suite.json says, without where its files lay."""
    gapg(["eval", str(model), *options, "--output-dir", str(folder)])
    suite = json.loads((folder / "suite.json").read_text())
    sets = [{key: value for key, value in one.items() if key != "source"} for one in suite["sets"]]
    return {"sets": sets} | {key: suite[key] for key in ("averaged", "rows", "decision", "not_evaluated")}


def table(models: Mapping[str, Row]) -> str:
    """A line a set and model, greedy: right with help masked, right together with the cloud, and called."""
    lines = []
    for key in (one["key"] for one in next(iter(models.values()))["sets"]):
        for name, suite in models.items():
            one = next((one for one in suite["sets"] if one["key"] == key), None)
            if one is None:
                continue
            rows = {row["name"]: row["sets"].get(key) for row in suite["rows"]}
            alone, together = rows.get("alone, greedy"), rows.get("greedy")
            cells = (_part(alone, "local_accuracy"), _part(together, "accuracy"), _part(together, "call_fraction"))
            lines.append((one["name"] + ", in domain" * one["in_domain"], str(one["n"]), name, *cells))
    head = ("set", "problems", "model", "right alone (95%)", "right together", "called")
    return record.markdown(head, lines, right=(1, 3, 4, 5))


def _part(cell: Row | None, figure: str) -> str:
    """With its interval; a dash where the set was not evaluated."""
    if cell is None:
        return "–"
    low, high = cell[f"{figure}_low"], cell[f"{figure}_high"]
    return f"{cell[figure]:.1%} ({low:.1%} to {high:.1%})"


def main() -> None:
    parser = record.parser(__doc__, "before_after")
    parser.add_argument("models", type=Path, nargs="+", help="folders of models, or of runs, the trained one last")
    parser.add_argument("--names", type=lambda text: text.split(","), help="what the table calls them: a,b")
    parser.add_argument("--suite", default="maths", help="as of `gapg eval`")
    parser.add_argument("--suite-data", type=Path, help="as of `gapg eval`")
    args, overrides = parser.parse_known_args()
    names = args.names or list(map(str, args.models))
    if len(set(names)) != len(args.models):
        parser.error(f"--names: {len(args.models)} models need as many different names")
    with record.refusing(parser):
        *_, (_, run) = map(find_model, args.models)
    if run is None:
        parser.error(f"{args.models[-1]} belongs to no run, whose config tells the task")
    options = ["--config", str(run / "config.yaml"), "--suite", args.suite, *overrides]
    options += ["--suite-data", str(args.suite_data)] if args.suite_data else []
    about: Row = {"revision": record.revision(), "machine": record.machine(), "versions": record.versions()}
    about |= {"overrides": overrides, "models": {}}
    for i, (name, model) in enumerate(zip(names, args.models, strict=True)):
        about["models"][name] = evaluated(model, options, args.output / f"{i}")
        write_whole(args.output / "before_after.json", json.dumps(about, indent=1) + "\n")
    print(table(about["models"]))


if __name__ == "__main__":
    main()
