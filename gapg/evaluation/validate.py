"""The evaluation during training: the policy as it samples, on problems kept out of training."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gapg.console import say, warn
from gapg.evaluation.evaluate import as_result, respond
from gapg.judge import Group, Judge, Outcome
from gapg.runs.outage import OracleDown, check_evaluation

if TYPE_CHECKING:
    from gapg.runs.run import Run


def validate(run: Run) -> dict[str, float]:
    """`eval/accuracy`, `eval/local_accuracy`, `eval/call_fraction`; prints and logs one transcript of each outcome."""
    if not run.validation:
        return {}
    # only calls need the cloud here, so that a failed oracle leaves out no wrong answer
    judge = Judge(run.task, run.oracle, ask_unsolved=False, thinking=run.judge.thinking)
    groups = respond(run.engine, run.task, run.tokenizer, judge, run.validation, run.sampling("validate"))
    row = as_result("", groups).row()
    unknown = sum(g.unknown for g in groups)
    together = "unknown" if unknown == row["n"] else f"{row['accuracy']:.3f}"
    say(
        f"step {run.state.step}: together {together}, local {row['local_accuracy']:.3f}, "
        f"called {row['call_fraction']:.3f} of {row['n']} validation problems"
    )
    try:
        check_evaluation(groups)
    except OracleDown as error:  # whether training ends is said by its own questions
        warn(str(error))
    _transcripts(run, groups)
    figures = {f"eval/{key}": row[key] for key in ("accuracy", "local_accuracy", "call_fraction")}
    return figures | {"eval/unknown": unknown}


def _transcripts(run: Run, groups: list[Group]) -> None:
    shown: dict[Outcome, Group] = {}
    for group in groups:
        shown.setdefault(group.outcomes[0], group)
    for outcome, group in sorted(shown.items(), key=lambda item: item[0].value):
        text = f"{group.prompt.text} {group.completions[0].text}"
        flat = " ".join(text.split())
        say(f"    {outcome.value:<13} {flat[:150]}{'…' if len(flat) > 150 else ''}")
        run.tracker.text(f"transcripts/{outcome.value}", text, run.state.step)
